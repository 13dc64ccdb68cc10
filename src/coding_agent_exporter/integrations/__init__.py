"""What programs that run agents themselves can use: it writes the files that the exporter reads."""
