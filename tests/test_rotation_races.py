"""Logs that are rotated while the exporter looks at them: parts are read in the order in which they were written."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents_support import ClaudeLog
from coding_agent_exporter.pipeline import Pipeline
from support import Samples, drain, scrape, settings


def started(home: Path, *, rotated: bool) -> tuple[ClaudeLog, Pipeline]:
    """A log that has been read, and then grew: its running total is only right in order."""
    log = ClaudeLog(home / ".mngr", "agent")
    pipeline = Pipeline(settings(home))
    log.spend("opus", 10**12)
    if rotated:
        log.rotate()
        log.spend("opus", 10**12)
    drain(pipeline)
    log.spend("haiku", 2 * 10**12)
    return log, pipeline


def twice(pipeline: Pipeline) -> Samples:
    scrape(pipeline)
    return scrape(pipeline)


def rotate(log: ClaudeLog) -> None:
    """The writer goes on in a new file."""
    log.rotate()
    log.spend("sonnet", 4 * 10**12)


def once(before: Callable[..., Any], act: Callable[[], object], wanted: Callable[..., bool]) -> Callable[..., Any]:
    """A function that acts before the first call that is `wanted`."""
    done = False

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal done
        if not done and wanted(*arguments):
            done = True
            act()
        return before(*arguments, **named)

    return call


@pytest.mark.parametrize("rotated", [False, True])
def test_a_log_that_is_rotated_between_a_look_and_the_read(
    rotated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it grew by since it was read last comes before what the new file under its name says."""
    log, pipeline = started(tmp_path, rotated=rotated)

    tail = pipeline.inputs._tail
    monkeypatch.setattr(tail, "read", once(tail.read, partial(rotate, log), lambda path, *_: path == log.path))
    assert log.truth.differences(twice(pipeline)) == []
    pipeline.close()


@pytest.mark.parametrize("rotated", [False, True])
def test_a_log_that_is_rotated_while_it_is_looked_at(
    rotated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its older part was looked at before, it itself is another file by now."""
    log, pipeline = started(tmp_path, rotated=rotated)

    monkeypatch.setattr(os, "stat", once(os.stat, partial(rotate, log), lambda path, *_: path == str(log.path)))
    assert log.truth.differences(twice(pipeline)) == []
    pipeline.close()


def test_a_file_system_whose_open_files_have_other_inode_numbers_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It only takes some looks more."""
    log, pipeline = started(tmp_path, rotated=False)
    fstat = os.fstat

    def other(descriptor: int) -> Any:
        found = fstat(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").readlink() != log.path:
            return found
        values = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return SimpleNamespace(**values | {"st_ino": found.st_ino + 1})

    monkeypatch.setattr(os, "fstat", other)
    assert log.truth.differences(twice(pipeline)) == []
    pipeline.close()
