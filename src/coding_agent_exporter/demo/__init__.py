"""Takes a seed, gives agents that look alive: a made-up fleet (`simulation`), and the show of it, with an exporter."""

OWN_SETTINGS = frozenset({
    "config.file", "web.config.file", "telemetry.dir", "usage.root", "sessions.dir", "state.path",
    "counters.max-series", "input.max-line-size",
})
"""What cannot be set for the demo: its files are its own, it reads its own /metrics, and counts all there is."""
