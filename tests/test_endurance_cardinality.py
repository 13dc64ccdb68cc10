"""Names made up by the thousand, for every label there is: series and memory stay bounded, totals exact."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from agents_support import iso
from coding_agent_exporter import families
from process_support import Exporter, fallen
from support import total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support import Samples

SEED = 11
MAX_SERIES = 100
# The rest of what docs/operating.md says under "Bounds".
OTHERS, MAX_TOOLS, MAX_WINDOWS, MAX_FILES = 100, 200, 100, 1000
MODES = 2
ACCOUNTS, DIRECTORIES = 20, 40
"""Agents, and made-up harnesses, that write each."""


class Names:
    """Names that nobody has used yet."""

    def __init__(self) -> None:
        self.chance = random.Random(SEED)
        self._numbers = itertools.count()

    def __call__(self) -> str:
        number = next(self._numbers)
        return self.chance.choice((
            f"name-{number}", f"{number}\n# HELP coding_agent_cost_usd_total x\n# EOF\n", f'{number}"}} 1e9\nx{{y="',
            f"{number}\\", f"\x00\x01\x1b[31m{number}", f"\ud800{number}", f"{number}\udfff", f"\u2028\u2029\r{number}",
            "\U0001f916" * 150 + str(number), "n" * 200 + str(number), "n" * 3000 + str(number), f"{number}/{number}/",
            f"/{number}", f"{number}',root='u", f"é{number}", f"{number}\ufeff\u202e", f'le="{number}"', f"__{number}",
        ))


class World:
    """A home where everybody makes names up."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.names = Names()
        self.usd = 0
        self.tokens = 0
        self.calls = 0
        self._clock = itertools.count(1_796_083_200_000)

    def write(self, lines: int) -> None:
        """So many lines more, in usage logs and session files."""
        chance, name = self.names.chance, self.names
        written: dict[Path, list[bytes]] = {}
        for number in range(lines):
            source = chance.choice(("opencode", "pi-coding", "codex", f"made-up-{chance.randrange(DIRECTORIES)} \"\n"))
            path = self.home / f"mngr/agents/agent-{chance.randrange(ACCOUNTS)}'\"/events/{source}/usage/events.jsonl"
            written.setdefault(path, []).append(self._event(source, name, number))
            if number % 4 == 0:
                log = f"2026-12-01T00-00-00-000Z_{number % 5:08d}-0000-4000-8000-000000000000.jsonl"
                path = self.home / "sessions/--p--" / log
                written.setdefault(path, []).extend(self._turn(name))
        for path, found in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in found))

    def _event(self, source: str, name: Names, number: int) -> bytes:
        at = next(self._clock)
        windows = {name(): {"used_percentage": 1}, "five_hour": {"used_percentage": 5}}
        event: dict[str, Any] = {
            "type": "cost_snapshot", "timestamp": iso(at / 1000),
            "session_id": f"{name()}{at}", "message_id": f"{name()}{at}", "event_id": f"e{at}",
            "model": f"{name()}/{name()}", "cost_mode": name.chance.choice(("API_KEY", "SUBSCRIPTION", name())),
            "rate_limits": windows if number % 50 == 0 else None,
        }
        if source in {"opencode", "pi-coding", "codex"}:
            event["cost"] = {"total_cost_usd": 0.5}
            event["tokens"] = {"input": at % 1_000_000_000}
            self.usd += 1
            self.tokens += at % 1_000_000_000
        else:  # a running total that never moves: its first reading counts, whoever wrote it
            event["cost"] = {"total_cost_usd": 0}
        return json.dumps(event).encode()

    def _turn(self, name: Names) -> Iterator[bytes]:
        at = next(self._clock)
        self.usd += 1
        self.tokens += 10
        self.calls += 1
        base = {"type": "message", "timestamp": iso(at / 1000 + 1)}
        yield json.dumps({**base, "id": f"{name()}{at}", "message": {
            "role": "assistant", "provider": name(), "model": name(), "timestamp": at, "stopReason": name(), "ttft": 5,
            "usage": {"input": 10, "cost": {"total": 0.5}},
            "content": [{"type": "toolCall", "id": f"t{at}", "name": name()}],
        }}).encode()
        yield json.dumps({**base, "id": f"r{at}", "message": {
            "role": "toolResult", "toolCallId": f"t{at}", "timestamp": at + 5, "isError": name()}}).encode()

    def instances(self, count: int, *, fresh: int) -> None:
        """Instance files, of which one in so many is fresh; the others show little."""
        directory = self.home / "instances"
        directory.mkdir(exist_ok=True)
        for pid in range(1, count + 1):
            name = self.names
            path = directory / f"{pid}.json"
            at = int(time.time() * 1000) if pid % fresh == 0 else 1_700_000_000_000
            path.write_text(json.dumps({
                "process": {"pid": pid, "updatedAt": at, "startedAt": at},
                "session": {"id": name(), "name": name()}, "model": {"provider": name(), "id": name()},
                "workspace": {"cwd": name(), "git": {"branch": name()}}, "system": {"host": name()},
                "context": {"percent": pid % 100, "pressure": name()}, "state": {"activity": name()},
                "lastEvent": name(),
            }))
            os.utime(path, (pid, pid))


def series(samples: Samples) -> Counter[str]:
    return Counter(name for name, _ in samples)


def check_bounds(samples: Samples, instances: int) -> None:
    """No family has more series than its bound."""
    found = series(samples)
    sets = MAX_SERIES + 2 * OTHERS + MODES * 2
    models = max(10, MAX_SERIES // 16) + 3
    assert found[families.COST.name] <= 2 * sets
    assert found[families.TOKENS.name] <= 4 * sets
    for family in (families.MESSAGES, families.UNPRICED, families.SESSIONS):
        assert found[family.name] <= sets
    assert found[families.TURNS.name] <= models
    assert found[f"{families.TURN_SECONDS.name}_count"] <= models
    assert found[f"{families.GENAI_DURATION.name}_count"] <= 2 * models
    assert 0 < found[families.TOOL_CALLS.name] <= 3 * (MAX_TOOLS + 1)
    assert found[families.RATE_LIMIT_USED.name] <= MAX_WINDOWS
    assert found[families.INSTANCE_INFO.name] <= min(instances, MAX_FILES)
    assert total(samples, families.SOURCE_FILES.name, state="ignored") == max(0, instances - MAX_FILES)
    assert total(samples, families.SERIES_DROPPED.name, reason="usage") > 0
    assert total(samples, families.SERIES_DROPPED.name, reason="turn_models") > 0
    longest = max(len(value) for _, labels in samples for _, value in labels)
    assert longest <= 255  # of a file's name; what a file says is cut at 200


def test_names_without_end_cost_no_series_no_memory_and_no_amount(
    amount: Callable[[int, int], int], tmp_path: Path, tool: Callable[[str], str]
) -> None:
    """Models, providers, tools, sessions, harnesses, agents, windows, stop reasons, and all that an instance says."""
    lines, instances = amount(400, 30_000), amount(1_050, 10_000)
    world = World(tmp_path)
    world.instances(instances, fresh=amount(50, 1))
    peaks = []
    seen: Samples = {}
    with Exporter(
        tmp_path, f"--usage.root=u={tmp_path / 'mngr'}", f"--sessions.dir=s={tmp_path / 'sessions'}",
        f"--telemetry.dir=t={tmp_path / 'instances'}", "--telemetry.stale-after=10h", "--usage.agent-label",
        f"--counters.max-series={MAX_SERIES}",
    ) as exporter:
        exporter.scrape()
        for _ in range(4):
            world.write(lines)
            before, seen = seen, exporter.scrape()
            assert fallen(before, seen) == []
            peaks.append(exporter.peak_memory())
        while total(seen, families.LAG_BYTES.name):
            seen = exporter.scrape()
        seen = exporter.scrape()  # series that had to be shown at their first value show theirs now
        check_bounds(seen, instances)
        assert total(seen, families.COST.name) == world.usd / 2
        assert total(seen, families.TOKENS.name) == world.tokens
        assert total(seen, families.TOOL_CALLS.name) <= world.calls
        assert total(seen, families.RATE_LIMIT_USED.name, window="five_hour") > 0
        reply = exporter.get(headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert list(parse_openmetrics(reply.text))  # type: ignore[no-untyped-call]  # theirs
        checked = subprocess.run(
            [tool("promtool"), "check", "metrics"], input=exporter.get().body, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stdout.decode() + checked.stderr.decode()
        assert exporter.get("/").status == 200
        # The caps outlive a restart, and so do the totals.
        exporter.kill()
        exporter.start()
        again = exporter.scrape()
        assert fallen(seen, again) == []
        assert total(again, families.COST.name) == world.usd / 2
        world.write(200)
        exporter.scrape()
        check_bounds(after := exporter.scrape(), instances)
        assert total(after, families.COST.name) == world.usd / 2
        assert exporter.terminate() == 0
    # All caps were reached in the first quarter: what is made up later finds no more room.
    assert peaks[-1] - peaks[0] < 24 << 20
    print(f"{4 * lines} lines with names of their own, {instances} instance files: {len(seen)} series, peak memory "
          f"{' '.join(str(peak >> 20) for peak in peaks)} MB, seed {SEED}")
