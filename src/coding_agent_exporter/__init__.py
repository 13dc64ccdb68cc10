"""Prometheus exporter for coding agents."""
