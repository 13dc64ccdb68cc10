"""Takes the settings and what was asked for, gives the live screen of `top`, or one frame of it."""
