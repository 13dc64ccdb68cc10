"""The promise of near_limit on day one: a peak that no scrape saw arrives at the webhook of a real Alertmanager."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import replay_support
from process_support import Exporter, free_port, wait_for
from prometheus_support import prometheus, server
from replay_support import Change, Replay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RULES = Path(__file__).parent.parent / "grafana" / "rules"
PERCENT = "coding_agent_context_percent"
PATIENCE = 120.0
"""Seconds, for what a scrape and an evaluation every 15 s do within 30."""
PEAK = 0.5
"""Seconds after the start of pid 10646 at which its context is still nearly empty; the peak is over at 1.2."""


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A receiver on loopback: its URL, and the alerts that it was sent so far."""
    alerts: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            alerts.extend(json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{receiver.server_port}/", alerts
    finally:
        receiver.shutdown()
        receiver.server_close()
        thread.join()


@contextmanager
def alertmanager(program: str, home: Path, url: str) -> Iterator[int]:
    """An Alertmanager that sends all alerts to one webhook at once; its port."""
    home.mkdir()
    (home / "alertmanager.yml").write_text(json.dumps({  # JSON is YAML
        "route": {"receiver": "webhook", "group_wait": "0s", "group_interval": "1s", "repeat_interval": "1h"},
        "receivers": [{"name": "webhook", "webhook_configs": [{"url": url}]}],
    }))
    port = free_port()
    with server(home, program, f"--config.file={home / 'alertmanager.yml'}", f"--storage.path={home / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", "--log.level=warn", port=port):
        yield port


def of_one_process(change: Change) -> bool:
    """The beginning of pid 10646: started, 97 % for 300 ms, compacted."""
    return change.path.endswith("10646.json") and change.document is not None and change.at < 1795225190.0


def test_a_peak_that_no_scrape_saw_is_an_alert(tmp_path: Path, tool: Callable[[str], str]) -> None:
    """The recorded peak of 300 ms falls between two scrapes that are 15 s apart; the webhook gets the shipped alert.

    That the alert ends is not waited for: the peak stays in its gauge for a minute.
    """
    replay = Replay(tmp_path, replay_support.pi().where(of_one_process), hold=PEAK)
    port = free_port()
    with (
        webhook() as (url, alerts),
        alertmanager(tool("prometheus-alertmanager"), tmp_path / "alertmanager", url) as manager,
        Exporter(tmp_path, f"--web.listen-address=127.0.0.1:{port}", *replay.flags),
        replay,
        prometheus(tool("prometheus"), tmp_path / "prometheus", port, "15s", job="coding-agent-exporter",
                   rules=[RULES / "recording.yaml", RULES / "alerts.yaml"], alertmanager=manager) as metrics,
    ):
        replay.wait_until_held()
        before = metrics.last_scrape()
        wait_for(lambda: metrics.last_scrape() != before and metrics.query(PERCENT), "a scrape of the quiet agent",
                 every=0.1, deadline=PATIENCE)
        before = metrics.last_scrape()
        replay.release()
        replay.wait_until_played()
        assert metrics.last_scrape() == before, "this machine is too slow to place the peak between two scrapes"

        def arrived() -> list[dict[str, Any]]:
            return [alert for alert in alerts if alert["labels"]["alertname"] == "CodingAgentContextNearLimit"]

        wait_for(arrived, "the alert at the webhook", every=0.2, deadline=PATIENCE)
        (seen,) = metrics.stored(PERCENT)
        assert max(seen.values) < 1
        (peak,) = metrics.stored(f"{PERCENT}_peak")
        assert max(peak.values) == pytest.approx(97.08, abs=0.01)
    (alert, *_) = arrived()
    assert alert["status"] == "firing"
    assert alert["labels"]["severity"] in {"info", "warning", "critical"}
    assert alert["labels"]["pid"] == "10646"
    assert alert["annotations"]["summary"]
    assert "97" in alert["annotations"]["summary"] + alert["annotations"]["description"]
    assert alert["annotations"]["runbook_url"].endswith("/docs/runbooks.md#codingagentcontextnearlimit")
