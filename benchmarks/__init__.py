"""How fast, how small and how fresh the exporter is: `python -m benchmarks`, or `make bench`."""
