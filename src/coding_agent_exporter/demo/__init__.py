"""Takes nothing but a directory and a seed, gives agents that look alive: a made-up fleet, and `demo`, its stage."""
