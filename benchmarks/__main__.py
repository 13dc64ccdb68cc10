"""Takes the command line, prints the report: `python -m benchmarks [--full] [--markdown] [--only SECTION]`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import linear, many, sections, spans, table, wrap
from benchmarks.sections import Size

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.table import Row

EVENTS, SESSIONS, AGENTS = 400_000, 5_000, 200
FULL = Size(5_000_000, 25_000, 1_000)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=EVENTS, help=f"lines of the generated logs (default: {EVENTS:,})")
    parser.add_argument("--full", action="store_true", help="also 5,000,000 events in 25,000 sessions: 2 GB, minutes")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/performance.md")
    parser.add_argument("--only", metavar="SECTION",
                        help="one of: speed, memory, scrapes, freshness, idle, linear, many, spans, wrap")
    parser.add_argument("--dir", type=Path, help="where to write the generated files (default: a temporary directory)")
    arguments = parser.parse_args(argv)
    sessions, count = max(2, arguments.events * SESSIONS // EVENTS), max(2, min(AGENTS, arguments.events // 100))
    size = Size(arguments.events, sessions, count)
    parts: dict[str, tuple[str, Callable[[Path], list[Row]]]] = {
        "speed": ("Speed of a cold start", partial(sections.speed, size=size)),
        "memory": ("Memory and start", partial(sections.memory, size=size)),
        "scrapes": ("Scrapes", sections.scrapes),
        "freshness": ("Freshness", sections.freshness),
        "idle": ("Idle", sections.idle),
        "linear": ("Beside history", linear.linear),
        "many": ("10,000 log files", many.many),
        "spans": ("Spans", spans.spans),
        "wrap": ("Wrap", wrap.wrap),
    }
    if arguments.full:
        parts["full"] = ("Memory and start, 5,000,000 events", partial(sections.memory, size=FULL))
    if arguments.only:
        if arguments.only not in parts:
            parser.error(f"no section {arguments.only}")
        parts = {arguments.only: parts[arguments.only]}
    show = table.markdown if arguments.markdown else table.text
    sys.stdout.write(f"{machine()}\n\n")
    for title, measure in parts.values():
        with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.dir) as work:
            sys.stdout.write(show(title, measure(Path(work))) + "\n")
            sys.stdout.flush()
    return 0


def machine() -> str:
    """What the numbers were taken on, without saying whose it is."""
    model, memory = platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        kilobytes = Path("/proc/meminfo").read_text().split()[1]
        memory = f", {int(kilobytes) / 2**20:.0f} GiB of memory"
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores ({model}){memory}, Python {platform.python_version()}"


if __name__ == "__main__":
    raise SystemExit(main())
