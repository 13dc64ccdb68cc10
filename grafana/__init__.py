"""Takes the metric catalogue and PromQL, gives dashboards for Grafana: `python -m grafana` writes them."""
