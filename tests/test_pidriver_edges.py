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


async def received(transport: Any, count: int) -> list[Any]:
    await transport.start()
    async with asyncio.timeout(DEADLINE):
        got = [await transport.receive() for _ in range(count)]
    await transport.aclose()
    transport._recorder.join()
    return got


@pytest.mark.parametrize("kind", [str, str.encode])
def test_an_answer_that_comes_as_a_line(kind: Callable[[str], Any], wrapped: Wrap) -> None:
    """It is kept from the driver too."""
    answer = {"id": QUESTION, "type": "response", "command": "get_state", "success": True, "data": {}}
    lines = [kind(json.dumps(frame)) for frame in (answer, {"type": "agent_start", "name": QUESTION})]
    inner = Replay("c", lines, answers=False)
    assert asyncio.run(received(wrapped(inner), 1)) == lines[1:]


@pytest.mark.parametrize("identity", [7, 7.0, [], "x"])
def test_a_refusal_with_an_id_is_the_drivers(identity: Any, wrapped: Wrap) -> None:
    """Only that without any can be the answer to our question."""
    frame = {"id": identity, "type": "response", "command": "get_state", "success": False, "error": "x"}
    assert asyncio.run(received(wrapped(Replay("c", [frame], answers=False)), 1)) == [frame]


def test_an_agent_that_had_to_be_killed_is_not_lost(tmp_path: Path, wrapped: Wrap) -> None:
    """The driver closed it, and its reader saw the end before `aclose` was over."""
    class Stubborn(Replay):
        reader: asyncio.Task[Any]

        async def aclose(self) -> None:
            self.died(-9)
            await self.reader

    async def run() -> None:
        transport = wrapped(inner)
        await transport.start()
        await asyncio.to_thread(wait_for, (tmp_path / f"{PIDS['c']}.json").exists, "the file")
        inner.reader = asyncio.create_task(transport.receive())
        await asyncio.sleep(0)
        await transport.aclose()
        transport._recorder.join()

    inner = Stubborn("c", [])
    asyncio.run(run())
    assert not (tmp_path / f"{PIDS['c']}.json").exists()


def test_arguments_results_and_attributes_pass(wrapped: Wrap) -> None:
    """Of transports that take and give more than they must; what is set is set on the transport."""
    class More(Replay):
        async def start(self, *given: Any, **named: Any) -> Any:
            return given, named

        async def receive(self, *given: Any, **named: Any) -> Any:
            return {"type": "x", "given": [given, named]}

        async def send(self, obj: Any, *given: Any, **named: Any) -> Any:
            return obj, given, named

    async def run() -> None:
        inner = More("c", [])
        transport = wrapped(inner)
        assert await transport.start(1, a=2) == ((1,), {"a": 2})
        assert await transport.send({}, 1, a=2) == ({}, (1,), {"a": 2})
        assert (await transport.receive(1, a=2))["given"] == [(1,), {"a": 2}]
        transport.extra = "set"
        assert inner.extra == "set"
        assert copy.copy(transport).extra == "set"
        await transport.aclose()

    asyncio.run(run())


def test_methods_that_give_something_to_await(wrapped: Wrap) -> None:
    """They need not be coroutine functions: what closes the transport tells that it is of asyncio."""
    class Plain:
        def __init__(self) -> None:
            inner = Replay("c")
            self.pid, self.returncode = inner.pid, None
            self.start, self.send, self.receive, self.aclose = (
                (lambda *given, call=call: call(*given)) for call in (
                    inner.start, inner.send, inner.receive, inner.aclose))

    assert asyncio.run(received(wrapped(Plain()), 3)) == recorded("c")[:3]
