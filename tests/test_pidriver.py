"""Telemetry of agents that a Python program drives: what is written, and that the driver does not notice."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import stat
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.decode import usage as decode_usage
from coding_agent_exporter.decode.heartbeat import parse
from coding_agent_exporter.integrations.pidriver import observed
from coding_agent_exporter.model import Activity, Heartbeat
from process_support import wait_for
from rpc_support import PIDS, SESSIONS, Replay, recorded, recorded_lines, reply, session_file
from support import CAPTURES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Make = Callable[..., Any]

LOG = "events/pi-coding/usage/events.jsonl"


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Gives transports telemetry that is written below `tmp_path`: instances/ and agent/."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def make(inner: Any, **options: Any) -> Any:
        given = {"telemetry_dir": tmp_path / "instances", "agent_dir": tmp_path / "agent", "heartbeat_ms": 250}
        return observed(lambda *_: inner, **{**given, **options})(None)

    return make


async def consume(transport: Any, count: int) -> list[Any]:
    """The next frames that a driver gets."""
    return [await transport.receive() for _ in range(count)]


def drive(transport: Any, inner: Replay, *, close: bool = True) -> list[Any]:
    """All of a recording, as a driver gets it."""
    async def run() -> list[Any]:
        await transport.start()
        got = await consume(transport, len(inner.frames))
        if close:
            await transport.aclose()
        return got

    got = asyncio.run(run())
    if close:
        transport._recorder.join()
    return got


def usage(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "agent" / LOG).read_text().splitlines()]


def instance(home: Path, pid: int) -> Heartbeat:
    found = parse((home / "instances" / f"{pid}.json").read_bytes())
    assert isinstance(found, Heartbeat)
    return found


@pytest.mark.parametrize(("name", "agent"), [("a", "agent-a"), ("b", "agent-b"), ("c", "agent-c"), ("b2", "agent-b")])
def test_the_log_is_the_one_that_mngrs_writer_kept(name: str, agent: str, tmp_path: Path, wrapped: Make) -> None:
    """To the line, but for the ids of events: session, start of the call, tokens, cost and model."""
    inner = Replay(name)
    drive(wrapped(inner), inner)
    written = (CAPTURES / "pi" / "agents" / agent / LOG).read_text().splitlines()
    sessions = [session_file(name, place).stem for place in range(len(SESSIONS[name]))]
    wanted = [line for line in map(json.loads, written) if line["session_id"] in sessions]
    got = usage(tmp_path)
    assert len(got) > 1
    for line in (*wanted, *got):
        line.pop("event_id")
        line.pop("cost_mode", None)
    assert got == wanted


@pytest.mark.parametrize("frame", [
    {}, {"type": 7}, {"type": []}, {"type": "message_end"}, {"type": "message_end", "message": []},
    reply(5, usage=None), reply(5, usage=[]), reply(5, usage={"input": "x", "cost": 3}), reply(-5),
    reply(5, timestamp="now"), reply(5, timestamp=1e300, usage={"input": float("nan"), "cost": {"total": "1"}}),
    {"type": "response", "success": True}, {"type": "response", "success": True, "command": ["fork"], "data": "x"},
    {"type": "response", "success": True, "command": "get_state", "data": {"model": 7, "sessionId": {}}},
    {"type": "response", "success": True, "command": "get_state", "data": {"contextUsage": {"tokens": None}}},
    {"type": "response", "success": True, "command": "get_available_models", "data": {"models": [None, 3]}},
    {"type": "compaction_end", "result": "text"}, {"type": "queue_update", "steering": 3}, [], "null", 7,
    "text", b"\xff{",
])
def test_odd_frames_do_no_harm(frame: Any, tmp_path: Path, wrapped: Make, caplog: pytest.LogCaptureFixture) -> None:
    """They reach the driver as they are, as objects and as lines, and what follows is logged."""
    line = json.dumps(frame) if not isinstance(frame, bytes) else frame
    inner = Replay("c", [frame, line, *recorded("c")])
    with caplog.at_level(logging.WARNING):
        got = drive(wrapped(inner), inner)
    assert (got[0], got[1]) == (frame, line)
    assert len([one for one in usage(tmp_path) if one["timestamp"] > "2026"]) == 2
    assert not caplog.records


def test_the_driver_gets_what_the_transport_gives(tmp_path: Path, wrapped: Make) -> None:
    """The same objects, in order, without the answer to our own question; its own attributes stay reachable."""
    inner = Replay("a")
    wanted = list(inner.frames)
    transport = wrapped(inner)
    got = drive(transport, inner)
    assert [id(one) for one in got] == [id(one) for one in wanted]
    assert [one["type"] for one in inner.sent] == ["get_state", "get_state"]
    assert transport.extra == "an attribute of its own"
    assert not list((tmp_path / "instances").iterdir())


def test_without_asking_nothing_is_sent(tmp_path: Path, wrapped: Make) -> None:
    """The session is then found on disk, by the message that stands in its file."""
    place = tmp_path / ".pi" / "agent" / "sessions" / "--srv-project--"
    place.mkdir(parents=True)
    for number in range(2):
        copy = shutil.copy(session_file("a", number), place)
        os.utime(copy, (2e9, 2e9))
    inner = Replay("a")
    drive(wrapped(inner, ask=False), inner)
    assert inner.sent == []
    wanted = (CAPTURES / "pi" / "agents" / "agent-a" / LOG).read_text().splitlines()
    assert [line["session_id"] for line in usage(tmp_path)] == [json.loads(line)["session_id"] for line in wanted]


def test_without_a_session_file_the_session_has_a_name_of_its_own(tmp_path: Path, wrapped: Make) -> None:
    """One for each session, of the shape that pi's have."""
    inner = Replay("a", answers=False)
    drive(wrapped(inner, ask=False), inner)
    names = list(dict.fromkeys(line["session_id"] for line in usage(tmp_path)))
    assert len(names) == 2
    assert all(len(name) == len(session_file("a").stem) for name in names)


def test_no_content_is_written(tmp_path: Path, wrapped: Make) -> None:
    """No text of a frame reaches any file."""
    async def run() -> str:
        inner = Replay("a")
        transport = wrapped(inner)
        await transport.start()
        await transport.send({"type": "prompt", "message": "CONTENT"})
        await consume(transport, len(inner.frames))
        path = tmp_path / "instances" / f"{PIDS['a']}.json"
        await asyncio.to_thread(wait_for, lambda: path.exists() and b"agent_end" in path.read_bytes(), "the last state")
        text = path.read_text() + (tmp_path / "agent" / LOG).read_text()
        await transport.aclose()
        return text

    text = asyncio.run(run())
    assert "CONTENT" in recorded_lines("a").decode()
    assert "CONTENT" not in text
    assert "sonnet-like" in text


def test_the_instance_file_lives_as_long_as_the_agent(tmp_path: Path, wrapped: Make) -> None:
    """There at once, moved by the heartbeat, whole at any time, readable by a sidecar, gone after the end."""
    path = tmp_path / "instances" / f"{PIDS['c']}.json"

    async def run() -> None:
        inner = Replay("c")
        transport = wrapped(inner)
        await transport.start()
        await asyncio.to_thread(wait_for, path.exists, "the file")
        first = instance(tmp_path, PIDS["c"])
        assert (first.activity, first.last_event) == (Activity.WAITING_INPUT, "session_start")
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 & ~_umask()
        await asyncio.to_thread(
            wait_for, lambda: instance(tmp_path, PIDS["c"]).updated_at > first.updated_at, "a heartbeat")
        await transport.aclose()
        transport._recorder.join()

    asyncio.run(run())
    assert list((tmp_path / "instances").iterdir()) == []


@pytest.mark.parametrize(("code", "stays"), [(0, False), (143, False), (-9, True), (1, True)])
def test_an_agent_that_dies_leaves_its_file(code: int, stays: bool, tmp_path: Path, wrapped: Make) -> None:
    """As any agent that was killed: its heartbeat stops although the driver lives on. An orderly end leaves nothing."""
    path = tmp_path / "instances" / f"{PIDS['c']}.json"

    async def run() -> None:
        inner = Replay("c")
        transport = wrapped(inner)
        await transport.start()
        await consume(transport, len(inner.frames))
        inner.died(code)
        assert await transport.receive() is None
        await asyncio.to_thread(wait_for, lambda: not transport._recorder._beating, "the end to be noticed")
        assert path.exists() is stays
        await transport.aclose()
        transport._recorder.join()

    asyncio.run(run())
    assert path.exists() is stays


def test_pis_own_extension_goes_first(tmp_path: Path, wrapped: Make) -> None:
    """A file that a writer inside of pi renews is left to it; one of an earlier process with that pid is replaced."""
    path = tmp_path / "instances" / f"{PIDS['c']}.json"
    path.parent.mkdir()

    def write(started: float) -> bytes:
        text = json.dumps({"process": {"startedAt": started, "updatedAt": started, "pid": PIDS["c"]}})
        path.with_suffix(".other").write_text(text)
        path.with_suffix(".other").rename(path)
        return text.encode()

    async def run() -> bytes:
        write(1e12)
        inner = Replay("c")
        transport = wrapped(inner)
        await transport.start()
        await asyncio.to_thread(wait_for, lambda: b"schemaVersion" in path.read_bytes(), "the old file to be replaced")
        its_own = write(time.time() * 1000 + 5)
        await consume(transport, len(inner.frames))
        await transport.aclose()
        transport._recorder.join()
        return its_own

    its_own = asyncio.run(run())
    assert path.read_bytes() == its_own


@pytest.mark.parametrize("blocked", ["instances", "agent"])
def test_a_disk_that_refuses_is_logged_once(
    blocked: str, tmp_path: Path, wrapped: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver gets everything; the other file is written."""
    (tmp_path / blocked).write_text("not a directory")
    inner = Replay("a")
    wanted = list(inner.frames)
    with caplog.at_level(logging.WARNING):
        assert drive(wrapped(inner), inner) == wanted
    kind = "instance file" if blocked == "instances" else "usage log"
    assert len([one for one in caplog.messages if kind in one]) == 1
    assert (blocked == "agent") != (tmp_path / "agent" / LOG).exists()


def test_usage_survives_a_disk_that_was_full(tmp_path: Path, wrapped: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was cut off is written again once there is room; a reader loses nothing."""
    real = os.write
    full = threading.Event()
    full.set()

    def write(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[:20]) if full.is_set() and b"cost_snapshot" in data else real(descriptor, data)

    monkeypatch.setattr(os, "write", write)

    async def run() -> None:
        inner = Replay("a")
        transport = wrapped(inner)
        await transport.start()
        await consume(transport, len(inner.frames))
        await asyncio.to_thread(wait_for, lambda: transport._recorder._failed, "the disk to be full")
        full.clear()
        await asyncio.to_thread(wait_for, lambda: not transport._recorder._unwritten, "the lines to be written")
        await transport.aclose()
        transport._recorder.join()

    asyncio.run(run())
    events, rejected = decode_usage.decode((tmp_path / "agent" / LOG).read_bytes())
    assert len(events) == 11
    assert set(rejected) <= {"not_json"}


def test_errors_are_the_transports_own(wrapped: Make) -> None:
    """What it raises is raised; what telemetry meets is not."""
    class Failing(Replay):
        async def start(self) -> None:
            raise OSError("no such program")

        async def send(self, obj: Any) -> None:
            raise ConnectionError("closed")

        async def receive(self) -> Any:
            raise ValueError("not a frame")

    transport = wrapped(Failing())
    for wanted, call in ((OSError, transport.start), (ValueError, transport.receive), (None, transport.aclose)):
        if wanted is None:
            asyncio.run(call())
        else:
            with pytest.raises(wanted):
                asyncio.run(call())
    with pytest.raises(ConnectionError):
        asyncio.run(transport.send({}))


def test_a_transport_without_asyncio(tmp_path: Path, wrapped: Make) -> None:
    """The same, in threads; also one that tells neither pid nor exit code."""
    class Sync:
        def __init__(self) -> None:
            self.frames = recorded("c")
            self.sent: list[Any] = []

        def start(self) -> None:
            pass

        def send(self, obj: Any) -> None:
            self.sent.append(obj)

        def receive(self) -> Any:
            return self.frames.pop(0) if self.frames else None

        def close(self) -> None:
            pass

    inner = Sync()
    wanted = list(inner.frames)
    transport = wrapped(inner)
    transport.start()
    wait_for((tmp_path / "instances" / f"{os.getpid()}.json").exists, "the file")
    wait_for(lambda: inner.sent, "the question")
    transport.send({"type": "prompt", "message": "x"})
    assert list(transport) == wanted
    transport.close()
    transport._recorder.join()
    assert len(usage(tmp_path)) == 2
    assert list((tmp_path / "instances").iterdir()) == []


def test_a_refused_question_is_not_the_drivers(wrapped: Make) -> None:
    """An old pi answers an unknown command without its id."""
    refusal = {"type": "response", "command": "get_state", "success": False, "error": "Unknown command: get_state"}
    inner = Replay("c", [{"type": "agent_start"}, refusal, {"type": "agent_end"}], answers=False)

    async def run() -> list[Any]:
        transport = wrapped(inner)
        await transport.start()
        got = await consume(transport, 2)
        await transport.aclose()
        return got

    assert [one["type"] for one in asyncio.run(run())] == ["agent_start", "agent_end"]


def test_a_fork_of_the_driver_touches_nothing(tmp_path: Path, wrapped: Make) -> None:
    """A child of the driver has a copy of the transport: closing it there leaves the files to the parent."""
    path = tmp_path / "instances" / f"{PIDS['c']}.json"

    async def run() -> None:
        inner = Replay("c")
        transport = wrapped(inner)
        await transport.start()
        await asyncio.to_thread(wait_for, path.exists, "the file")
        recorder = transport._recorder
        recorder._owner = os.getpid() + 1  # what a child sees
        recorder.frame({"type": "agent_start"})
        recorder.close()
        recorder.join()
        assert recorder._queue.qsize() == 0
        recorder._owner = os.getpid()
        assert path.exists()
        await transport.aclose()
        recorder.join()

    asyncio.run(run())
    assert not path.exists()


def test_a_dropped_transport_leaves_no_heartbeat(tmp_path: Path, wrapped: Make) -> None:
    """Nobody closed it, nobody holds it."""
    path = tmp_path / "instances" / f"{PIDS['c']}.json"

    async def run() -> None:
        transport = wrapped(Replay("c"), ask=False)
        await transport.start()
        await asyncio.to_thread(wait_for, path.exists, "the file")

    asyncio.run(run())
    wait_for(lambda: not path.exists(), "the file to be removed")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
