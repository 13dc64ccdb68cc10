"""The exposition of the running program over the recordings: promtool finds nothing in it, OpenMetrics parses."""

from __future__ import annotations

import gzip
import subprocess
from typing import TYPE_CHECKING

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from agents_support import ClaudeLog, PiInstance, PiLog
from coding_agent_exporter import families
from process_support import Exporter
from support import CAPTURES, parse, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CLASSIC = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
"""Newer clients of Prometheus append how names are escaped."""
BY_PROMETHEUS = ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
                 "text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
"""What a Prometheus server sends."""
RECORDED_USD = 0.185294525 + 0.2556029 + 0.58487835
"""opencode, claude-code and oh-my-pi: what the recordings' own notes say was spent."""


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    """One exporter over all recordings, with live agents beside them, scraped until every series shows its value."""
    home = tmp_path_factory.mktemp("recordings")
    live = home / "instances"
    with Exporter(
        home, f"--telemetry.dir=pi={live}", "--telemetry.stale-after=1h", f"--usage.root=live={home / 'mngr'}",
        *(f"--usage.root={name}={CAPTURES / name}" for name in ("pi", "opencode", "claude-code")),
        f"--sessions.dir=pi={CAPTURES / 'pi' / 'sessions'}", f"--sessions.dir=omp={CAPTURES / 'oh-my-pi' / 'sessions'}",
    ) as exporter:
        exporter.scrape()
        for pid, percent in ((1, 20), (2, 90), (3, 97), (4, 102), (5, None)):
            PiInstance(live, pid).write(percent, activity="waiting_input" if percent is None else "working")
        (live / "6.json").write_text("{")
        log = PiLog(home / "mngr", "agent-1")
        log.message('anthropic/"quoted"', 10**12)
        log.append({**log.event("nobody/unpriced", 0, (1, 2, 3, 4)), "cost": None})
        log.write(b"garbage\n")
        claude = ClaudeLog(home / "mngr", "agent-2", subscription=True)
        claude.spend("opus", 10**12)
        claude.append({**log.event("anthropic/opus", 0), "cost": None, "tokens": None,
                       "rate_limits": {"weekly": {"used_percentage": 1, "resets_at": 4e9, "window_seconds": 604800}}})
        exporter.scrape()
        claude.replay(exporter.scrape)
        exporter.scrape()
        yield exporter


def test_promtool_finds_nothing(exporter: Exporter, tool: Callable[[str], str]) -> None:
    """Names, types, units and help are as Prometheus wants them."""
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=exporter.get().body, capture_output=True, check=False
    )
    assert (done.stdout + done.stderr).decode() == ""
    assert done.returncode == 0


def test_every_family_of_the_catalogue_is_served_with_its_type_and_help(exporter: Exporter) -> None:
    """None is left over that no input brings about."""
    text = exporter.get().text
    for family in families.FAMILIES:
        if family.otlp:
            continue  # goes out over OTLP only
        kind = family.type if family.type in {"counter", "histogram"} else "gauge"
        assert f"# HELP {family.name} {family.help}\n# TYPE {family.name} {kind}\n{family.name}" in text


def test_the_exposition_shows_what_the_recordings_come_to(exporter: Exporter) -> None:
    """The money in it is the money of the recordings: what is linted here is not an empty page."""
    samples = exporter.scrape()
    cost = "coding_agent_cost_usd_total"
    recorded = sum(total(samples, cost, root=root) for root in ("opencode", "claude-code", "omp"))
    assert recorded == pytest.approx(RECORDED_USD, abs=1e-9)


def test_openmetrics_parses_and_says_the_same_as_the_classic_format(exporter: Exporter) -> None:
    """The strict parser takes it, and both formats have the same counters of ours."""
    reply = exporter.get(headers={"Accept": OPENMETRICS})
    assert reply.text.endswith("# EOF\n")
    openmetrics = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_openmetrics(reply.text)  # type: ignore[no-untyped-call]  # prometheus_client
        for sample in family.samples
    }
    classic = parse(exporter.get().text)

    def usage(samples: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> dict[object, float]:
        return {
            key: value for key, value in samples.items()
            if key[0].startswith("coding_agent_") and not key[0].startswith("coding_agent_exporter_")
        }

    assert len(usage(classic)) > 80
    assert usage(openmetrics) == usage(classic)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", CLASSIC), ("*/*", CLASSIC), ("text/html,*/*;q=0.8", CLASSIC), ("text/plain;version=0.0.4", CLASSIC),
        (BY_PROMETHEUS, OPENMETRICS), (OPENMETRICS, OPENMETRICS),
    ],
)
def test_the_accept_header_chooses_the_format(accept: str, content_type: str, exporter: Exporter) -> None:
    """A Prometheus server gets OpenMetrics, a browser and curl the classic text."""
    reply = exporter.get(headers={"Accept": accept} if accept else {})
    assert reply.status == 200
    assert reply.headers["content-type"].startswith(content_type)


def test_a_client_that_takes_gzip_gets_the_same_text_compressed(exporter: Exporter) -> None:
    """Prometheus asks for it in every scrape."""
    reply = exporter.get(headers={"Accept": BY_PROMETHEUS, "Accept-Encoding": "gzip"})
    assert reply.headers["content-encoding"] == "gzip"
    text = gzip.decompress(reply.body).decode()
    assert text.endswith("# EOF\n")
    assert len(reply.body) < len(text) / 3
