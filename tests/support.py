"""What several test modules share: settings, a clock that the test moves, and reading back what was counted."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from coding_agent_exporter import config
from coding_agent_exporter.expose import render
from coding_agent_exporter.model import PICO
from coding_agent_exporter.schema import account_seal, seal

if TYPE_CHECKING:
    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.pipeline import Pipeline

DATA = Path(__file__).parent / "data"
CAPTURES = DATA / "captures"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Clock:
    """Epoch seconds that pass when the test says so. Starts after all recordings."""

    now: float = 2_600_000_000.0

    def __call__(self) -> float:
        return self.now


def settings(home: Path, *flags: str) -> Settings:
    """Settings with nothing below `home` but what the flags name; the state file is `home/state.db`."""
    return config.load(["--state.path", str(home / "state.db"), *flags], {}, home=home, cwd=home)


def reseal(state: sqlite3.Connection) -> None:
    """Make checksums right that a test's change has made wrong."""
    state.create_function("seal", -1, lambda *row: seal(row))
    state.create_function("account_seal", 4, account_seal)
    state.execute("UPDATE accounts SET crc = account_seal(key, touched, settled, value)")
    state.execute("UPDATE outbox SET crc = seal(created, value)")
    state.execute("UPDATE counters SET crc = seal(family, labels, exact, shown, first, open)")
    for table in ("accounts", "counters"):
        total = f"SELECT coalesce(sum(crc & 4294967295), 0) FROM {table}"
        state.execute(f"UPDATE sums SET value = ({total}) WHERE name = '{table}'")


def drain(pipeline: Pipeline) -> None:
    """Step until everything on disk has been read."""
    while pipeline.step():
        pass


def exact(pipeline: Pipeline) -> dict[tuple[str, tuple[str, ...]], int]:
    """What the logs come to, as integers: the totals that the shown values never fall short of."""
    return {key: series.exact for key, series in pipeline._store.counters()}


def scrape(pipeline: Pipeline) -> Samples:
    """One delivered scrape, parsed."""
    snapshot, delivered = pipeline.scrape()
    body, _ = render(snapshot)
    delivered()
    return parse(body.decode())


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum over the samples of a name that have these labels."""
    wanted = set(labels.items())
    return sum(value for (found, having), value in samples.items() if found == name and wanted <= having)


def by_source(counted: dict[tuple[str, tuple[str, ...]], int]) -> dict[tuple[str, str], dict[str, float]]:
    """(source, cost mode) -> reported dollars and tokens by type, from exact totals."""
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (family, labels), amount in counted.items():
        if family == "coding_agent_cost_usd_total" and labels[-1] == "reported":
            sums[labels[1], labels[4]]["usd"] += amount / PICO
        elif family == "coding_agent_tokens_total":
            sums[labels[1], labels[4]][labels[-1]] += amount
    return sums


def differences(counted: dict[tuple[str, tuple[str, ...]], int], expected: dict[str, Any]) -> list[str]:
    """Where exact totals differ from an `expected.json`: reported cost beyond 1e-6 USD, tokens at all."""
    sums, found = by_source(counted), []
    for source, modes in expected.items():
        for mode in ("api_key", "subscription"):
            wanted = modes[mode]
            got = sums.get((source, mode), {})
            usd = wanted["reported_cost_usd"] or 0
            if abs(got.get("usd", 0) - usd) > 1e-6:
                found.append(f"{source} {mode}: {got.get('usd', 0)} USD instead of {usd}")
            for kind, tokens in wanted["tokens"].items():
                if got.get(kind, 0) != (tokens or 0):
                    found.append(f"{source} {mode}: {got.get(kind, 0)} {kind} tokens instead of {tokens or 0}")
    return found


def expected(folder: Path, name: str = "expected.json") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / name).read_text())
    return loaded
