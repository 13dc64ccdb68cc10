"""Drivers, transports and disks that are not as the common ones: nothing is lost, and nothing reaches the driver."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.decode import usage as decode_usage
from coding_agent_exporter.integrations.agent import Agent
from coding_agent_exporter.integrations.files import InstanceFile, Places, UsageLog
from coding_agent_exporter.integrations.pidriver import observed
from coding_agent_exporter.integrations.sessions import SessionFiles
from process_support import DEADLINE, wait_for
from rpc_support import PIDS, Replay, recorded

if TYPE_CHECKING:
    from collections.abc import Callable

    Wrap = Callable[..., Any]

QUESTION = "coding-agent-exporter-1"


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wrap:
    """Gives a transport telemetry below `tmp_path`."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def make(inner: Any) -> Any:
        return observed(lambda *_: inner, telemetry_dir=tmp_path, agent_dir=tmp_path, heartbeat_ms=250)(None)

    return make


def instance(directory: Path) -> InstanceFile:
    return InstanceFile(Places.of({}, telemetry_dir=directory), 7, 1000, str(directory))


def test_an_inode_that_is_used_again_is_not_ours(tmp_path: Path) -> None:
    """Another writer's file has the number of the one that it took away, every other time."""
    path, file = tmp_path / "7.json", instance(tmp_path)
    file.write(Agent(), 1000)
    for number in range(20):
        path.with_suffix(".new").write_text(json.dumps({"process": {"startedAt": 999, "updatedAt": 2000 + number}}))
        path.with_suffix(".new").rename(path)
        file.write(Agent(), 3000)
        file.remove()
        assert json.loads(path.read_text())["process"]["updatedAt"] == 2000 + number


def test_agents_that_share_a_pid_do_not_meet(tmp_path: Path) -> None:
    """A driver whose transports tell no pid has several that write one file."""
    errors: list[Exception] = []

    def write(file: InstanceFile) -> None:
        try:
            for number in range(200):
                file.write(Agent(), number)  # before the start of any: none gives way
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(instance(tmp_path),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["7.json"]


def test_half_a_line_of_another_writer_costs_only_itself(tmp_path: Path) -> None:
    """A process that met a full disk has ended: the next one's line is a line of its own."""
    log = UsageLog(tmp_path)
    line = (b'{"type":"cost_snapshot","event_id":"1","timestamp":"2026-01-01T00:00:00Z","session_id":"s",'
            b'"tokens":{"input":1}}')
    log.append(line)
    with log.path.open("ab") as file:
        file.write(line[:30])
    log.append(line)
    log.append(line)
    assert log.path.read_bytes() == line + b"\n" + line[:30] + b"\n" + line + b"\n" + line + b"\n"
    assert len(decode_usage.decode(log.path.read_bytes())[0]) == 3


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run under a user id that nobody has heard of: what is given is used all the same."""
    monkeypatch.setattr(os.path, "expanduser", str)
    places = Places.of({"PI_TELEMETRY_DIR": "/t"})
    assert (places.telemetry.as_posix(), places.agent.as_posix()) == ("/t", "/.mngr/agents/pi-rpc")
    assert SessionFiles(["pi"], {}, "/srv").kept


def test_directories_below_a_tilde(tmp_path: Path) -> None:
    """pi takes `~/` in its variables for the home directory."""
    (tmp_path / "pi/sessions").mkdir(parents=True)
    files = SessionFiles(["pi"], {"HOME": str(tmp_path), "PI_CODING_AGENT_DIR": "~/pi"}, "/srv")
    assert tmp_path / "pi/sessions" in files._directories
