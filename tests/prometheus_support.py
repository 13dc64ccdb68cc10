"""Takes the address of an exporter, gives tests a real Prometheus that scrapes it, and a client of that."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode

from coding_agent_exporter import families
from process_support import DEADLINE, environment, free_port, get, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

OURS = [family.name for family in families.FAMILIES
        if family.type == "counter" and not family.name.startswith("coding_agent_exporter_")]
"""The counters that no restart may reset."""


class Stored(NamedTuple):
    """All samples that Prometheus has of one series."""

    labels: dict[str, str]
    values: list[float]
    times: list[float]

    @property
    def rise(self) -> float:
        return self.values[-1] - self.values[0]

    @property
    def usage(self) -> tuple[str, str, str, str]:
        labels = self.labels
        return labels["source"], labels["provider"], labels["model"], labels["cost_mode"]

    def __str__(self) -> str:
        inner = ",".join(f'{name}="{value}"' for name, value in self.labels.items() if name != "__name__")
        return f"{self.labels['__name__']}{{{inner}}}"


class Prometheus:
    """A Prometheus server that scrapes one target. What it answers with an error or a warning fails the test."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, **parameters: object) -> Any:
        """`data` of the answer to a request below `/api/v1/`."""
        reply = json.loads(get(self.port, f"/api/v1/{path}?{urlencode(parameters)}").text)
        assert reply["status"] == "success", reply
        assert not reply.get("warnings"), reply["warnings"]
        assert not reply.get("infos"), reply["infos"]
        return reply["data"]

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The result of an instant query, by default as of now. A scalar is a series without labels."""
        data = self.ask("query", query=expression, time=f"{at or time.time():.3f}")
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The result of a range query; times in epoch seconds."""
        result: list[dict[str, Any]] = self.ask(
            "query_range", query=expression, start=f"{start:.3f}", end=f"{end:.3f}", step=step)["result"]
        return result

    def exemplars(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """Exemplars of the series that an expression selects; needs `--enable-feature=exemplar-storage`."""
        found = self.ask("query_exemplars", query=expression, start=f"{start:.3f}", end=f"{end:.3f}")
        return [exemplar for series in found for exemplar in series["exemplars"]]

    def rules(self) -> list[dict[str, Any]]:
        """All rules that were loaded, with their state as it is now."""
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]

    def last_scrape(self) -> str:
        """When the target was last scraped; another text each time. Empty before it is known."""
        targets = self.ask("targets", state="active")["activeTargets"]
        return str(targets[0]["lastScrape"]) if targets else ""

    def stored(self, selector: str) -> list[Stored]:
        """Every raw sample of these series."""
        found = []
        for series in self.query(f"{selector}[1h]"):
            times, values = zip(*series["values"], strict=True)
            found.append(Stored(series["metric"], [float(value) for value in values], list(times)))
        return found

    def one(self, expression: str, at: float) -> float:
        (result,) = self.query(expression, at)
        return float(result["value"][1])

    def resets(self) -> list[float]:
        """How often each series of OURS was reset."""
        return [float(series["value"][1]) for name in OURS for series in self.query(f"resets({name}[1h])")]

    def rise(self, name: str) -> float:
        """Last minus first, summed over all series of this name."""
        return sum(series.rise for series in self.stored(name))


@contextmanager
def prometheus(program: str, home: Path, target: int, interval: str, *, job: str = "agents",
               rules: Sequence[Path] = (), evaluation: str | None = None, alertmanager: int | None = None,
               flags: Sequence[str] = ()) -> Iterator[Prometheus]:
    """A server that keeps its data in `home` and scrapes a port, stopped at the end.

    `evaluation` is how often rules are evaluated that do not say so themselves, by default as often as scrapes are.
    """
    configuration: dict[str, Any] = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval,
                   "evaluation_interval": evaluation or interval},
        "scrape_configs": [{"job_name": job, "static_configs": _at(target)}],
        "rule_files": [str(path) for path in rules],
    }
    if alertmanager is not None:
        configuration["alerting"] = {"alertmanagers": [{"static_configs": _at(alertmanager)}]}
    home.mkdir()
    (home / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML
    port = free_port()
    with server(home, program, f"--config.file={home / 'prometheus.yml'}", f"--storage.tsdb.path={home / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", *flags, port=port):
        yield Prometheus(port)


@contextmanager
def server(home: Path, program: str, *flags: str, port: int) -> Iterator[None]:
    """A program that says at `/-/ready` that it is; its output goes to `home/log`. Stopped at the end."""
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([program, *flags], cwd=home, env=environment(home),
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            def ready() -> bool:
                assert process.poll() is None, (home / "log").read_text()
                try:
                    return get(port, "/-/ready").status == 200
                except OSError:
                    return False

            wait_for(ready, f"{program} to be ready", every=0.1, deadline=2 * DEADLINE)
            yield
        finally:
            process.terminate()
            process.wait(DEADLINE)


def _at(port: int) -> list[dict[str, list[str]]]:
    return [{"targets": [f"127.0.0.1:{port}"]}]
