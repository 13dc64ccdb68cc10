"""The made-up fleet of `demo/simulation.py`: its files say what its truth says, and depend on the seed alone."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter import check, config, inspection
from coding_agent_exporter.demo.simulation import BENCH, DESK, POD, Fleet
from coding_agent_exporter.demo.work import CODEX, PREVIEW
from coding_agent_exporter.demo.writers import TOKEN_TYPES, Truth, Usage
from coding_agent_exporter.model import PICO
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.pricing import Prices
from support import Clock, Samples, scrape, total

if TYPE_CHECKING:
    from pathlib import Path

    from coding_agent_exporter.config import Settings

MORNING = 1_767_744_000.0 + 8 * 3600
"""A Wednesday, 8:00 UTC."""
TWO_DAYS = 2 * 86_400 - 12 * 3600
"""Until the second evening: a session has been forked, and a process killed."""
COST = "coding_agent_cost_usd_total"


def settings(home: Path) -> Settings:
    """What an exporter that nobody configured reads in that home directory."""
    return config.load(["--state.path", str(home / "state.db")], {}, home=home, cwd=home)


class Watched:
    """A fleet with an exporter that was there from the start, sees all its files, and is scraped every minute."""

    def __init__(self, home: Path) -> None:
        self.clock = Clock(MORNING)
        self.fleet = Fleet(home, seed=3, start=MORNING)
        self.pipeline = Pipeline(settings(home), clock=self.clock)
        self.samples: Samples = {}
        self.peaks: list[float] = []

    def run(self, seconds: int, every: int) -> None:
        for at in range(0, seconds + 1, every):
            self.fleet.advance(MORNING + at, self.look)
            self.clock.now = MORNING + at
            self.samples = scrape(self.pipeline)
            self.peaks += self.all("coding_agent_context_percent_peak")

    def look(self, at: float) -> None:
        self.clock.now = at
        self.pipeline.step()

    def all(self, name: str) -> list[float]:
        return [value for (found, _), value in self.samples.items() if found == name]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Scraped every ten minutes of two days, and twice at the end: the last new series then show their values."""
    made = Watched(tmp_path_factory.mktemp("fleet"))
    made.run(TWO_DAYS, 600)
    made.samples = scrape(made.pipeline)
    made.pipeline.close()
    return made


def shown(samples: Samples, name: str, usage: Usage, **labels: str) -> float:
    return total(samples, name, **usage._asdict(), **labels)


def test_the_exporter_counts_what_the_fleet_spent(watched: Watched) -> None:
    """Money that agents report, to 1e-9 USD for each label set, and nothing beside it."""
    spent = watched.fleet.truth.pico()
    for usage, pico in spent.items():
        assert shown(watched.samples, COST, usage, provenance="reported") == pytest.approx(pico / PICO, abs=1e-9)
    assert total(watched.samples, COST, provenance="reported") == pytest.approx(spent.total() / PICO, abs=1e-6)
    assert {usage.source for usage in spent} == {"pi-coding", "omp", "opencode", "claude"}
    assert {usage.root for usage in spent} == {"pi", "omp", "mngr"}
    assert spent.total() > 50 * PICO


def test_the_exporter_counts_the_tokens_that_the_fleet_used(watched: Watched) -> None:
    """Exactly, for each label set and type; those of no price are unpriced."""
    used = watched.fleet.truth.tokens()
    name = "coding_agent_tokens_total"
    for (usage, kind), count in used.items():
        assert shown(watched.samples, name, usage, token_type=kind) == count
    assert total(watched.samples, name) == used.total()
    unpriced = sum(count for (usage, _), count in used.items() if usage.model == PREVIEW.name)
    assert total(watched.samples, "coding_agent_unpriced_tokens_total") == unpriced > 0


def test_what_is_reported_as_tokens_alone_is_estimated(watched: Watched) -> None:
    """Each reading of Codex at the list price of what it adds."""
    estimate, pico = Prices().estimate, 0
    for spend in watched.fleet.truth.spends:
        if spend.usage.model == CODEX.name:
            at = datetime.fromtimestamp(spend.at / 1000, UTC)
            price = estimate(CODEX.provider, CODEX.name, spend.tokens, at)
            assert price is not None
            pico += price
    assert total(watched.samples, COST, provenance="estimated") == pytest.approx(pico / PICO, abs=1e-9)


def test_there_is_something_to_see_in_every_dashboard(watched: Watched) -> None:
    """A peak of 300 ms, a process that was killed, copies of a fork, rate limits, tools that failed."""
    samples = watched.samples
    assert max(watched.peaks) >= 95
    assert total(samples, "coding_agent_context_limit_crossings_total", pressure="near_limit") >= 3
    assert total(samples, "coding_agent_compactions_total") >= 3
    assert total(samples, "coding_agent_instances_lost_total") == 1
    assert total(samples, "coding_agent_exporter_rejected_total", reason="copied") >= 3
    assert total(samples, "coding_agent_rate_limit_used_percent", window="seven_day") > 1
    assert total(samples, "coding_agent_tool_calls_total", outcome="error") > 5
    assert total(samples, "coding_agent_time_to_first_token_seconds_count", source="omp") > 50
    for stop in ("stop", "toolUse", "length", "error", "aborted"):
        assert total(samples, "coding_agent_turns_total", stop_reason=stop) > 0


def test_only_a_copy_is_ever_rejected(watched: Watched) -> None:
    """Every other line is one that the exporter knows: the formats are right."""
    reasons: Counter[str] = Counter()
    for (name, labels), value in watched.samples.items():
        if name == "coding_agent_exporter_rejected_total":
            reasons[dict(labels)["reason"]] += int(value)
    assert {reason for reason, count in reasons.items() if count} == {"copied"}


def test_check_finds_no_problem_in_the_files(watched: Watched) -> None:
    """`coding-agent-exporter check` as a person would run it in that home directory."""
    found = settings(watched.pipeline.settings.state_path.parent)
    report = check.examine(found, inspection.inspect(found))
    assert report.problems == ()
    assert all(root.found for root in report.roots)


def content(home: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {
        str(path.relative_to(home)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in home.rglob("*") if path.is_file()
    }


def lived(home: Path, seed: int, slices: list[float]) -> Truth:
    fleet = Fleet(home, seed, start=MORNING)
    for at in slices:
        fleet.advance(MORNING + at, lambda _: None)
    return fleet.truth


def test_in_which_slices_time_passes_makes_no_difference(tmp_path: Path) -> None:
    """In one go, in random steps of up to an hour, and by quarters of a second for a while: the same files."""
    chance, end = random.Random(5), 33 * 3600.0
    steps = [0.0]
    while steps[-1] < end - 3600:
        steps.append(steps[-1] + chance.choice((0.25, 1.5, 60, 900, 3600, 7200)) * chance.random())
    steps += [steps[-1] + quarter / 4 for quarter in range(200)]
    once = lived(tmp_path / "once", 7, [end])
    sliced = lived(tmp_path / "sliced", 7, [*steps, end])
    files = content(tmp_path / "once")
    assert files == content(tmp_path / "sliced")
    assert once == sliced
    assert len(files) > 10
    assert any(name.endswith(".json") for name in files)


def test_the_seed_decides(tmp_path: Path) -> None:
    """The same one gives the same files, another one others."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        lived(tmp_path / name, seed, [6 * 3600.0])
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a").keys() != content(tmp_path / "c").keys()


def test_what_is_on_disk_at_a_time_is_what_had_been_spent_by_then(tmp_path: Path) -> None:
    """`Truth` tells of any window, and windows that adjoin add up."""
    truth = lived(tmp_path, 1, [7200.0])
    half = MORNING + 3600
    first, second, both = truth.pico(0, half), truth.pico(half, MORNING + 7200), truth.pico()
    assert first.total() > 0 < second.total()
    assert first + second == both
    assert truth.pico(until=MORNING) == Counter()


def test_a_job_ends_and_leaves_no_instance_file(tmp_path: Path) -> None:
    """What a pod's agent does is done at some time; only its session file is left."""
    fleet = Fleet(tmp_path, 1, start=MORNING, cast=POD)
    at = MORNING
    while not fleet.done:
        at += 60
        fleet.advance(at)
    assert MORNING + 120 < at < MORNING + 7200
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".jsonl"]


def test_with_always_there_is_work_at_night(tmp_path: Path) -> None:
    """For whoever wants to see something whatever the time is."""
    for name, always in (("office", False), ("always", True)):
        fleet = Fleet(tmp_path / name, 1, start=MORNING - 6 * 3600, cast=(*DESK, *BENCH[:2]), always=always)
        fleet.advance(MORNING - 5 * 3600)
        assert bool(fleet.truth.spends) is always


def test_token_types_are_those_of_the_exporter(watched: Watched) -> None:
    """In the order in which the truth has them."""
    assert {dict(labels)["token_type"] for (name, labels), _ in watched.samples.items()
            if name == "coding_agent_tokens_total"} == set(TOKEN_TYPES)
