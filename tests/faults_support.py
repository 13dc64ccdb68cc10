"""Takes an exporter process, gives the tests the faults that it meets, and what it did to stay well."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from process_support import Exporter, wait_for
from support import Samples, total

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agents_support import Truth

COST = "coding_agent_cost_usd_total"
FILES = "coding_agent_exporter_files"
COMMITS = "coding_agent_exporter_store_commits_total"
POLLING = "coding_agent_exporter_watch_polling"
RUNNING = "coding_agent_exporter_step_running_seconds"
PEAK = "coding_agent_context_percent_peak"


class Faults:
    """What the calls of an exporter meet, from now on; see faults/sitecustomize.py."""

    def __init__(self, home: Path) -> None:
        self._file = home / "faults.json"
        self.env = {"FAULTS": str(self._file), "PYTHONPATH": str(Path(__file__).parent / "faults")}
        self._clock = 0.0
        self.none()

    def none(self) -> None:
        self._write()

    def meet(self, path: Path, *calls: str, **what: Any) -> None:
        """These calls on what lies at or below a path fail (`errno`), are slow (`delay`), or `hang`."""
        self._write(*({"call": call, "path": str(path), **what} for call in calls))

    def clock(self, seconds: float) -> None:
        """The exporter's clock is ahead by so much."""
        self._clock = seconds
        self._write()

    def _write(self, *rules: dict[str, Any]) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_text(json.dumps({"rules": rules, "clock": self._clock}))
        beside.rename(self._file)


@contextmanager
def mounted(place: Path, size: str = "1m") -> Iterator[Path]:
    """A small disk of its own; skips the test where nothing can be mounted."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def settled(exporter: Exporter, truth: Truth) -> Samples:
    """Wait until a scrape has what was really spent, to the last token; that scrape."""
    seen: list[Samples] = []

    def right() -> bool:
        seen[:] = [exporter.scrape()]
        return not truth.differences(seen[0])

    try:
        wait_for(right, "the truth")
    except AssertionError:
        raise AssertionError(truth.differences(seen[0])) from None
    return seen[0]


def spent(exporter: Exporter, truth: Truth) -> Samples:
    """One scrape, which must show what was really spent: no second chance."""
    samples = exporter.scrape()
    assert truth.differences(samples) == []
    return samples


def unreadable(samples: Samples, kind: str = "usage") -> float:
    return total(samples, FILES, kind=kind, state="unreadable")


def descriptors(exporter: Exporter) -> int:
    return len(os.listdir(f"/proc/{exporter.pid}/fd"))  # noqa: PTH208  counted, not named


def threads(exporter: Exporter) -> int:
    return len(os.listdir(f"/proc/{exporter.pid}/task"))  # noqa: PTH208


def cpu(exporter: Exporter) -> float:
    """Seconds of CPU so far."""
    fields = Path(f"/proc/{exporter.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(exporter: Exporter) -> float:
    """MB resident now."""
    lines = Path(f"/proc/{exporter.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS"))
