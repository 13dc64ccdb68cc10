"""Takes a work directory, gives what `wrap` adds to a round trip: a frame through `cat`, with it and without."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.table import Row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FRAME = b'{"type":"message_end","message":{"role":"assistant","content":"' + b"x" * 900 + (
    b'","usage":{"input":1,"output":2,"cost":{"total":0.1}},"timestamp":1700000000000}}\n')


def wrap(work: Path, *, count: int = 2000) -> list[Row]:
    """Both in one run."""
    plain, wrapped = (round_trips(work, command, count) for command in (
        ["cat"], [sys.executable, "-m", "coding_agent_exporter", "wrap", "--", "cat"]))
    note = f"{count} frames of {len(FRAME):,} bytes, one after the other"
    return [
        Row("round trip through cat, median", _us(statistics.median(plain)), "", note),
        Row("the same through wrap -- cat, median", _us(statistics.median(wrapped)), "", note),
        Row("  that / without", f"{statistics.median(wrapped) / statistics.median(plain):.1f}"),
    ]


def round_trips(home: Path, command: Sequence[str], count: int) -> list[float]:
    """Seconds from writing a frame to having it back. Raises EOFError when the command has ended."""
    took = []
    with subprocess.Popen(  # noqa: S603  our own program, and cat
        command, env={**os.environ, "HOME": str(home)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(count + 20):
            begun = time.perf_counter()
            process.stdin.write(FRAME)
            left = len(FRAME)
            while left:
                piece = process.stdout.read(65536)
                if not piece:
                    raise EOFError(f"{command[-1]} has ended")
                left -= len(piece)
            took.append(time.perf_counter() - begun)
        process.stdin.close()
    return took[20:]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"
