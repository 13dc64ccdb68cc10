"""What RPC frames say of an agent: its state as pi-telemetry would see it, and the usage of its messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coding_agent_exporter.integrations import frames
from coding_agent_exporter.integrations.agent import Agent
from coding_agent_exporter.integrations.files import Places
from coding_agent_exporter.integrations.sessions import SessionFiles
from rpc_support import MODELS, PIDS, SESSIONS, recorded, recorded_lines, reply
from support import DATA


@pytest.mark.parametrize("name", list(PIDS))
def test_usage_is_what_pidriver_adds_up(name: str) -> None:
    """pidriver adds the usage of each `turn_end`; an aborted turn counts with what it had cost."""
    agent = Agent()
    wanted, got = [0, 0, 0, 0, 0.0], [0, 0, 0, 0, 0.0]
    for frame in recorded(name):
        if frame["type"] == "turn_end":
            used = frame["message"]["usage"]
            parts = (used["input"], used["output"], used["cacheRead"], used["cacheWrite"], used["cost"]["total"])
            wanted = [total + part for total, part in zip(wanted, parts, strict=True)]
        kept = frames.of_object(frame)
        usage = agent.apply(kept).usage if kept else None
        if usage is not None:
            parts = (usage.input, usage.output, usage.cache_read, usage.cache_creation, usage.cost or 0)
            got = [total + part for total, part in zip(got, parts, strict=True)]
    assert got == pytest.approx(wanted, abs=1e-12)
    assert got[0] > 0


@pytest.mark.parametrize("name", list(PIDS))
def test_the_state_is_the_one_that_pi_telemetry_saw(name: str) -> None:
    """At the end of each run: the session, the model and its window, and what the context holds, to one percent."""
    wanted: list[tuple[Any, ...]] = []
    for line in (DATA / "heartbeats" / "pi.jsonl").read_text().splitlines():
        document = json.loads(line).get("doc")
        if document and document["process"]["pid"] == PIDS[name] and document["lastEvent"] == "agent_end":
            found = (document["session"]["id"], document["model"]["id"], document["context"]["contextWindow"],
                     document["context"]["tokens"])
            if not wanted or wanted[-1] != found:
                wanted.append(found)
    agent, place, got = Agent(), 0, []
    for frame in [state(name, 0), *recorded(name)]:
        kept = frames.of_object(frame)
        outcome = agent.apply(kept) if kept else None
        if outcome and outcome.event == "session_switch":
            place += 1
            asked = frames.of_object(state(name, place))
            assert asked is not None
            agent.apply(asked)
        if outcome and outcome.event == "agent_end":
            assert not agent.working
            got.append((agent.session_id, agent.model, agent.window, agent.tokens))
    assert wanted
    for one in wanted:
        assert any(other[:3] == one[:3] and other[3] == pytest.approx(one[3], rel=0.01) for other in got), one


def state(name: str, place: int) -> dict[str, Any]:
    """pi's answer to get_state."""
    model, window = MODELS[name]
    return {"type": "response", "command": "get_state", "success": True, "data": {
        "sessionId": SESSIONS[name][place], "model": {"provider": "loopback", "id": model, "contextWindow": window}}}


def apply(agent: Agent, *given: dict[str, Any]) -> list[tuple[str, bool, int | None]]:
    """Event, whether it works, and tokens after each frame; a frame with `sent` goes to pi."""
    seen = []
    for frame in given:
        sent = frame.pop("sent", False)
        kept = frames.of_object(frame, sent=sent)
        event = agent.apply(kept, sent=sent).event if kept else ""
        seen.append((event, agent.working, agent.tokens))
    return seen


def test_a_run_with_a_compaction() -> None:
    """Busy from the start of the run to its end, and while it compacts; then the context is unknown until a reply."""
    assert apply(
        Agent(), {"type": "agent_start"}, reply(970), {"type": "agent_end"}, {"type": "compaction_start"},
        {"type": "compaction_end", "result": {"summary": "x"}}, {"type": "agent_start"}, reply(10, "aborted"),
        {"type": "agent_end"}, {"type": "compaction_start"},
        {"type": "compaction_end", "result": None, "aborted": True},
    ) == [
        ("agent_start", True, None), ("message_end", True, 970), ("agent_end", False, 970),
        ("session_before_compact", True, 970), ("session_compact", False, None), ("agent_start", True, None),
        ("message_end", True, None), ("agent_end", False, None), ("session_before_compact", True, None),
        ("compaction_end", False, None),
    ]


def test_an_agent_that_asks_waits_for_input() -> None:
    """From a dialog until its answer; notices, and dialogs that pi answers itself after a time, are none."""
    ask = {"type": "extension_ui_request", "id": "7", "method": "confirm"}
    assert [working for _, working, _ in apply(
        Agent(), {"type": "agent_start"}, {**ask, "method": "notify"}, {**ask, "timeout": 500}, ask,
        {"type": "turn_start"}, {"type": "extension_ui_response", "id": "6", "sent": True},
        {"type": "extension_ui_response", "id": "7", "confirmed": True, "sent": True},
    )] == [True, True, True, False, False, False, True]


def test_messages_that_wait_and_retries_are_work() -> None:
    """After the end of a run with something queued, and after an error that is tried again."""
    assert [working for _, working, _ in apply(
        Agent(), {"type": "queue_update", "steering": ["CONTENT"], "followUp": []}, {"type": "agent_end"},
        {"type": "queue_update", "steering": [], "followUp": []}, {"type": "auto_retry_start"},
        {"type": "auto_retry_end", "success": False},
    )] == [True, True, False, True, False]


@pytest.mark.parametrize(("command", "event", "tokens"), [
    ("new_session", "session_switch", 0), ("switch_session", "session_switch", None), ("fork", "session_fork", None)])
def test_another_session(command: str, event: str, tokens: int | None) -> None:
    """Its id, name and context are not those of the one before; a switch that was cancelled is none."""
    agent = Agent()
    apply(agent, state("c", 0), {"type": "session_info_changed", "name": "old"}, {"type": "agent_start"},
          {"type": "compaction_start"}, reply(5))
    cancelled = {"type": "response", "command": command, "success": True, "data": {"cancelled": True}}
    refused = {"type": "response", "command": command, "success": False, "error": "CONTENT"}
    assert apply(agent, cancelled, refused) == [("", True, 5)] * 2
    assert apply(agent, {**cancelled, "data": {"cancelled": False}}) == [(event, False, tokens)]
    assert (agent.session_id, agent.session_file, agent.session_name) == ("", "", "")


def test_a_message_is_logged_once_and_again_when_its_figures_change() -> None:
    """`turn_end` repeats what `message_end` said; should it say more, that counts."""
    agent = Agent()

    def used(frame: dict[str, Any]) -> Any:
        kept = frames.of_object(frame)
        return agent.apply(kept).usage if kept else None

    assert used(reply(5)).input == 5
    assert used({**reply(5), "type": "turn_end"}) is None
    assert used({**reply(6), "type": "turn_end"}).input == 6
    assert used({**reply(6), "message": {**reply(6)["message"], "role": "user"}}) is None


def test_lines_and_objects_say_the_same() -> None:
    """A frame gives the same whether it comes as an object or as a line, in whatever pieces."""
    for name in PIDS:
        lines, found = frames.Lines(), []
        raw = recorded_lines(name)
        for place in range(0, len(raw), 1000):
            found += [frames.of_line(line) for line in lines.feed(raw[place:place + 1000])]
        assert [one for one in found if one] == [one for frame in recorded(name) if (one := frames.of_object(frame))]


def test_a_line_that_is_too_long_costs_only_itself() -> None:
    """What follows is read again from the next line on."""
    lines = frames.Lines(limit=10)
    got = [line for piece in (b"one\nlonger than ", b"ten bytes", b" and more\ntwo\nthr", b"ee\n")
           for line in lines.feed(piece)]
    assert got == [b"one", b"two", b"three"]


def test_a_session_file_is_told_by_the_very_message(tmp_path: Path) -> None:
    """Of two sessions with a message of equal figures the one whose call began then; none, where none did."""
    place = tmp_path / ".pi/agent/sessions/--srv-project--"
    place.mkdir(parents=True)
    for name, at in (("one", 1_700_000_000_000), ("two", 1_700_000_000_001)):
        message = {"role": "assistant", "usage": {"input": 5, "output": 0}, "timestamp": at}
        (place / f"{name}.jsonl").write_text(json.dumps({"message": message}, separators=(",", ":")) + "\n")
    files = SessionFiles(["pi"], {"HOME": str(tmp_path)}, "/srv/project")
    for name, at in (("one", 1_700_000_000_000), ("two", 1_700_000_000_001), ("", 1_700_000_000_002)):
        kept = frames.of_object(reply(5, timestamp=at))
        assert kept is not None
        usage = Agent().apply(kept).usage
        assert usage is not None
        assert Path(files.find(usage)).stem == name
        assert files.find(usage, known=str(place / "one.jsonl")) == files.find(usage)


def test_places(tmp_path: Path) -> None:
    """What is given, else the variables of pi-telemetry and mngr, else where an exporter of the same user looks."""
    env = {"HOME": str(tmp_path)}
    assert (default := Places.of(env)).telemetry == tmp_path / ".pi/agent/telemetry/instances"
    assert (default.agent, default.heartbeat_ms) == (tmp_path / ".mngr/agents/pi-rpc", 1500)
    assert Places.of({**env, "MNGR_HOST_DIR": "/m"}).agent.as_posix() == "/m/agents/pi-rpc"
    env |= {"MNGR_HOST_DIR": "/m", "MNGR_AGENT_STATE_DIR": "/state", "PI_TELEMETRY_DIR": " /t ",
            "PI_TELEMETRY_HEARTBEAT_MS": "10", "PI_TELEMETRY_NEAR_PERCENT": "x", "PI_TELEMETRY_CLOSE_PERCENT": "50"}
    found = Places.of(env)
    assert (found.telemetry.as_posix(), found.agent.as_posix()) == ("/t", "/state")
    assert (found.heartbeat_ms, found.near_percent, found.close_percent) == (250, 95, 50)
    given = Places.of(env, telemetry_dir="/x", agent_dir="/y", heartbeat_ms=700)
    assert (given.telemetry.as_posix(), given.agent.as_posix(), given.heartbeat_ms) == ("/x", "/y", 700)
