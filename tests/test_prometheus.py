"""The promise, in a real Prometheus: what its stored samples say was spent is what the logs say was spent.

How the money is read back matters. Over a window that holds all samples of a series

- `max_over_time(x[w]) - min_over_time(x[w])`, last minus first of the raw samples, is exact: series start at zero
  (or at their baseline) and never reset.
- `increase(x[w])` is the same number times a factor, because Prometheus extrapolates from the samples towards the
  edges of the window: all the way to an edge that is less than 1.1 intervals away, else by half an interval. To the
  left it goes no further than to where the counter would have been zero, and ours are zero in their first sample. So
  nothing is missing, `increase()` is exact where it is evaluated at the time of the last sample, and after that it is
  too high by a factor of at most 1 + 1.1 / (samples - 1), on average half of that. 0.1 % is certain from 1,101
  samples of a series on: 18 minutes at the 1 s of these tests, 4.6 hours at 15 s. The tests check the bound for every
  series at the number of samples that it has; the 0.1 % follows from it. A series that starts at a baseline is
  extrapolated to the left too, by half an interval.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from agents_support import TOKEN_TYPES, ClaudeLog, OpenCodeLog, PiLog, Truth, UsageLog, some_money, some_tokens
from coding_agent_exporter.model import PICO
from process_support import DEADLINE, Exporter, free_port
from prometheus_support import Prometheus, prometheus

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COST = "coding_agent_cost_usd_total"
TOKENS = "coding_agent_tokens_total"
MESSAGES = "coding_agent_messages_total"
SECONDS = 60.0
"""How long agents work in the long test."""


class Fleet:
    """Agents that come and go: each writes a little, then lies there, is preserved, or is deleted.

    `read` is called before anything is deleted: what nobody has read when it is deleted is lost to everybody.
    """

    def __init__(self, root: Path, seed: int, read: Callable[[], None]) -> None:
        self.truth = Truth()
        self.fates = 0
        self._root, self._read, self._chance = root, read, random.Random(seed)
        self._numbers = iter(range(10**6))
        self._models = 3
        self._alive: list[UsageLog] = [self._born() for _ in range(4)]

    def work(self) -> None:
        """Somebody spends something; sometimes on a model that nobody has used before."""
        chance = self._chance
        log = chance.choice(self._alive)
        if chance.random() < 0.08:
            self._models += 1
        model = f"model-{chance.randrange(self._models)}"
        if isinstance(log, ClaudeLog):
            log.spend(model, some_money(chance))
            if chance.random() < 0.2:
                chance.choice([log.restart, log.clear])()
        else:
            assert isinstance(log, PiLog | OpenCodeLog)
            log.message(f"anthropic/{model}", some_money(chance), some_tokens(chance))

    def happen(self) -> None:
        """Something befalls an agent or its log, or a new agent starts."""
        chance = self._chance
        log = chance.choice(self._alive)
        self.fates += 1
        match chance.randrange(6):
            case 0 if log.path.exists():
                log.rotate()
            case 1 if log.path.exists():
                log.replay(self._read)
            case 2 if log.home.exists():
                log.preserve()
                self._alive[self._alive.index(log)] = self._born()
            case 3 if log.home.exists():
                self._read()
                log.delete()
                self._alive[self._alive.index(log)] = self._born()
            case _ if len(self._alive) < 12:
                self._alive.append(self._born())

    def _born(self) -> UsageLog:
        agent = f"agent-{next(self._numbers)}"
        match self._chance.randrange(4):
            case 0:
                return OpenCodeLog(self._root, agent, self.truth)
            case 1:
                return ClaudeLog(self._root, agent, self.truth, subscription=self._chance.random() < 0.3)
            case _:
                return PiLog(self._root, agent, self.truth)


def differences(server: Prometheus, truth: Truth, baseline: Truth | None = None) -> list[str]:
    """Where what is stored differs from the truth, series by series: money beyond 1e-9 USD, counts at all."""
    found = []
    firsts = baseline.pico if baseline else {}
    seen: dict[object, float] = {}
    for series in server.stored(f'{{__name__=~"{COST}|{TOKENS}|{MESSAGES}"}}'):
        kind = series.labels.get("token_type", "")
        seen[series.labels["__name__"], series.usage, kind] = series.rise
        if series.labels["__name__"] == COST and abs(series.values[0] - firsts.get(series.usage, 0) / PICO) > 1e-9:
            found.append(f"{series} begins at {series.values[0]}")
    expected: dict[object, float] = {(COST, usage, ""): pico / PICO for usage, pico in truth.pico.items()}
    expected |= {(MESSAGES, usage, ""): count for usage, count in truth.messages.items()}
    expected |= {(TOKENS, usage, kind): truth.tokens[usage, kind]
                 for usage in truth.messages for kind in TOKEN_TYPES if truth.tokens[usage, kind]}
    for key in expected.keys() | seen.keys():
        wanted, got = expected.get(key, 0), seen.get(key, 0)
        if abs(wanted - got) > 1e-9:
            found.append(f"{key}: {got} instead of {wanted}")
    return found


def settle(server: Prometheus, truth: Truth) -> None:
    """Wait until the last values have been scraped, or for long enough: the assertions then say what is wrong."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and abs(server.rise(COST) - truth.usd) > 1e-9:
        time.sleep(0.5)


def check_increase(server: Prometheus, *, baseline: frozenset[tuple[str, ...]] = frozenset()) -> None:
    """What the docstring of this module says of `increase()`."""
    stored = [series for series in server.stored(COST) if series.rise > 0]
    now = time.time()
    for series in stored:
        exact = series.rise
        lifetime = round((series.times[-1] - series.times[0]) * 1000)
        # Nothing is left of zero. A baseline needs a window that begins with the first sample, or just before it:
        # newer servers leave out a sample at the very edge.
        window, tolerance = (lifetime + 1, 1.1 / lifetime) if series.usage in baseline else (lifetime + 60_000, 1e-9)
        at_last = server.one(f"increase({series}[{window}ms])", series.times[-1])
        assert at_last == pytest.approx(exact, rel=tolerance)
        later = server.one(f"increase({series}[1h])", now)
        bound = 1 + (1.6 if series.usage in baseline else 1.1) / (len(series.values) - 1)
        assert exact * (1 - 1e-9) <= later <= exact * bound * (1 + 1e-9)
    in_all = server.query(f"sum(max_over_time({COST}[1h]) - min_over_time({COST}[1h]))")
    assert float(in_all[0]["value"][1]) == pytest.approx(sum(series.rise for series in stored), abs=1e-9)


@pytest.mark.parametrize("seed", [11])
def test_every_dollar_arrives_once_in_prometheus(seed: int, tmp_path: Path, tool: Callable[[str], str]) -> None:
    """A minute of agents, models, rotations, truncations and deletions, of kills and restarts of the exporter.

    Per series and to 1e-9 USD; tokens and messages exactly; no series ever resets.
    """
    program, root, chance = tool("prometheus"), tmp_path / "mngr", random.Random(seed)
    port = free_port()
    exporter = Exporter(
        tmp_path, f"--web.listen-address=127.0.0.1:{port}", f"--usage.root=m={root}", "--shutdown.linger=20s"
    )

    def read() -> None:
        # Of chosen metrics: reads all that is there, and takes no zero from Prometheus.
        assert exporter.get("/metrics?name[]=coding_agent_exporter_build_info").status == 200

    baseline = Truth()
    old = PiLog(root, "old", baseline)
    for hour in range(5):
        old.message("anthropic/model-0", some_money(chance), at=time.time() - 3600.5 * (hour + 1))
    old.message("anthropic/retired", some_money(chance), at=time.time() - 9000.5)
    fleet = Fleet(root, seed, read)
    kills = restarts = 0
    with exporter, prometheus(program, tmp_path / "prometheus", port, "1s") as server:
        end, mishap = time.monotonic() + SECONDS, time.monotonic() + 3
        while time.monotonic() < end:
            for _ in range(chance.randrange(8)):
                fleet.work()
            fleet.happen()
            if time.monotonic() > mishap:
                mishap = time.monotonic() + chance.uniform(1, 5)
                if chance.random() < 0.65:
                    exporter.kill()
                    kills += 1
                else:
                    # The last turn of a pod: written right before it is told to go.
                    fleet.work()
                    exporter.signal(signal.SIGTERM)
                    assert exporter.wait() == 0
                    restarts += 1
                for _ in range(5):
                    fleet.work()
                exporter.start()
            time.sleep(chance.uniform(0, 0.3))  # agents take their time
        settle(server, fleet.truth)
        assert kills >= 5
        assert restarts >= 3
        assert fleet.fates > 50
        assert differences(server, fleet.truth, baseline) == []
        assert server.rise(COST) == pytest.approx(fleet.truth.usd, abs=1e-6)
        retired = [series for series in server.stored(COST) if series.labels["model"] == "retired"]
        assert [set(series.values) for series in retired] == [
            {baseline.pico["pi-coding", "anthropic", "retired", "api_key"] / PICO}
        ]
        resets = server.resets()
        assert len(resets) > 100
        assert set(resets) == {0}
        check_increase(server, baseline=frozenset(baseline.pico))


def test_two_servers_with_different_intervals_both_see_every_dollar(
    tmp_path: Path, tool: Callable[[str], str]
) -> None:
    """With a hold longer than the slower interval; the exporter is killed in the middle of holds."""
    program, root = tool("prometheus"), tmp_path / "mngr"
    port = free_port()
    exporter = Exporter(
        tmp_path, f"--web.listen-address=127.0.0.1:{port}", f"--usage.root=m={root}", "--counters.zero-hold=5s",
    )
    fleet = Fleet(root, 5, lambda: None)
    stop = threading.Event()
    with (
        exporter,
        prometheus(program, tmp_path / "one", port, "1s") as one,
        prometheus(program, tmp_path / "two", port, "2s") as two,
    ):
        for number in range(50):
            fleet.work()
            if number in {17, 34}:
                exporter.kill()
                exporter.start()
            stop.wait(0.25)  # agents take their time
        for server in (one, two):
            settle(server, fleet.truth)
            assert differences(server, fleet.truth) == []
            assert set(server.resets()) == {0}
            check_increase(server)
