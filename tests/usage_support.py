"""Takes events, gives the tests of `usage` logs to read, the program, and what it says."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from coding_agent_exporter import config
from process_support import DEADLINE, environment
from support import CAPTURES

if TYPE_CHECKING:
    from pathlib import Path

    from coding_agent_exporter.config import Settings

RECORDINGS = [
    f"--usage.root=pi={CAPTURES / 'pi'}", f"--usage.root=oc={CAPTURES / 'opencode'}",
    f"--usage.root=cc={CAPTURES / 'claude-code'}", f"--sessions.dir=pi={CAPTURES / 'pi' / 'sessions'}",
    f"--sessions.dir=omp={CAPTURES / 'oh-my-pi' / 'sessions'}",
]
"""All of them at once, as the daemon would read them."""


def run(home: Path, *argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The program, with nothing to read but what the flags name."""
    return subprocess.run(
        [sys.executable, "-m", "coding_agent_exporter", "usage", *argv], cwd=home, capture_output=True, text=True,
        env=environment(home, env), stdin=subprocess.DEVNULL, timeout=DEADLINE, check=False,
    )


def ask(home: Path, *argv: str, env: dict[str, str] | None = None) -> str:
    """What the program prints, where nothing is wrong."""
    result = run(home, *argv, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def table(home: Path, *argv: str, env: dict[str, str] | None = None) -> list[dict[str, str]]:
    """The rows of the CSV file, by the names of its columns."""
    return list(csv.DictReader(io.StringIO(ask(home, "--format=csv", *argv, env=env))))


def dollars(rows: list[dict[str, str]], mode: str = "api") -> Decimal:
    """The money of a mode, to the last digit."""
    return sum((Decimal(row[f"{mode}_cost_usd"] or 0) for row in rows), Decimal(0))


def settings(home: Path, *flags: str) -> Settings:
    """Settings for what runs in this process; without roots in the flags there is nothing to read."""
    return config.load([*flags], {}, home=home, cwd=home)


def log(home: Path, source: str, *events: dict[str, Any], agent: str = "agent-1", root: str = "mngr") -> Path:
    """Append events to an agent's usage log. Returns the root."""
    directory = home / root / "agents" / agent / "events" / source / "usage"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(event)}\n" for event in events)
    return home / root


_NUMBER = iter(range(10**9))


def event(at: str, session: str = "s1", usd: float | None = None, **fields: Any) -> dict[str, Any]:
    """A line of a usage log; each has an id of its own."""
    cost = {} if usd is None else {"cost": {"total_cost_usd": usd}}
    return {"type": "cost_snapshot", "event_id": f"e{next(_NUMBER)}", "timestamp": at, "session_id": session,
            **cost, **fields}


def tokens(new: int = 0, output: int = 0, read: int = 0, created: int = 0) -> dict[str, int]:
    return {"input": new, "output": output, "cache_read": read, "cache_creation": created}
