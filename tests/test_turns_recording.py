"""Turns out of session files against pi's own RPC frames, each with the time at which it was received.

`rpc/*.jsonl` are the frames of the recorded processes, without their content: `recv` and `timestamp` in epoch
milliseconds, `timestamp` the model call's start or the prompt's sending.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from coding_agent_exporter.spanmodel import Span
from coding_agent_exporter.turnmodel import trace_id
from spans_support import SPANS, recorded, recordings

NS = 1_000_000
TOLERANCE = 100
"""Milliseconds. The frames pass through a pipe on a busy machine; the files say when things happened."""

PARALLEL = {"call_6513270e", "call_c5c7fd0"}
"""Tools that were done before the slowest of their reply: pi writes their results, and the time, after that one."""


@dataclass
class Turn:
    """What the frames say of one turn; times in epoch milliseconds."""

    start: int
    prompt: int = 0
    call: int = 0
    stop: str = ""
    end: int = 0
    tools: dict[str, list[int]] = field(default_factory=dict)


def truth(agent: str) -> list[Turn]:
    names = ["cases"] if agent == "cases" else ["a", "b", "b2", "c", "d"]
    found: list[Turn] = []
    for name in names:
        turns: list[Turn] = []
        prompt = 0
        for line in (SPANS / "rpc" / f"{name}.jsonl").read_text().splitlines():
            frame: dict[str, Any] = json.loads(line)
            if frame["type"] == "turn_start":
                turns.append(Turn(frame["recv"]))
            elif frame["type"] == "message_end" and frame["role"] == "user":
                prompt = frame["timestamp"]
            elif frame["type"] == "tool_execution_start":
                turns[-1].tools[frame["tool"]] = [frame["recv"]]
            elif frame["type"] == "tool_execution_end":
                turns[-1].tools[frame["tool"]] += [frame["recv"], frame["error"]]
            elif frame["type"] == "turn_end":
                turns[-1].end, turns[-1].call, turns[-1].stop = frame["recv"], frame["timestamp"], frame["stop"]
            if turns:
                turns[-1].prompt = prompt
        found += turns
    return found


def prompts(agent: str) -> dict[int, tuple[str, str]]:
    """Time of sending -> (session, entry) of every prompt, each in the first file that holds it."""
    found: dict[int, tuple[str, str]] = {}
    for path in recordings(agent):
        session = ""
        for line in path.read_text().splitlines():
            document = json.loads(line)
            session = session or document["id"]
            if document.get("message", {}).get("role") == "user":
                found.setdefault(document["message"]["timestamp"], (session, document["id"]))
    return found


def near(ns: int, ms: int) -> bool:
    return abs(ns / NS - ms) <= TOLERANCE


@pytest.mark.parametrize("agent", ["pi", "cases"])
def test_every_turn_and_tool_call_is_there_once_at_its_time_below_its_parent(agent: str) -> None:
    """Within 100 ms of the frames; what has no end in the frames (the process was killed) has no turn."""
    found = recorded(agent)
    by_id = {span.span: span for span in found}
    chats = {span.start // NS: span for span in found if span.kind == "client"}
    tools: dict[str, Span] = {}
    for span in found:
        if span.name.startswith("execute_tool"):
            assert tools.setdefault(str(span.attributes["gen_ai.tool.call.id"]), span) is span
    sent = prompts(agent)
    expected = [turn for turn in truth(agent) if turn.end]
    assert len(expected) >= 12
    late = set()
    for turn in expected:
        chat = chats.pop(turn.call)
        own = by_id[chat.parent]
        assert own.name == "turn"
        assert near(own.start, turn.start)
        assert near(own.end, turn.end)
        assert chat.attributes["gen_ai.response.finish_reasons"] == [turn.stop]
        run = by_id[own.parent]
        assert run.name == "invoke_agent pi"
        assert own.trace == trace_id(*sent[turn.prompt])
        for name, (start, end, failed) in turn.tools.items():
            tool = tools.pop(name)
            assert tool.parent == own.span
            assert near(tool.start, start)
            assert bool(tool.error) == failed
            if not near(tool.end, end):
                late.add(name)
                assert tool.end // NS >= end
    assert (chats, tools) == ({}, {})
    assert late == (PARALLEL if agent == "cases" else set())


@pytest.mark.parametrize("agent", ["pi", "cases"])
def test_every_prompt_is_one_run(agent: str) -> None:
    """Also the one whose process was killed before it answered; its run says so."""
    runs = {span.trace: span for span in recorded(agent) if span.name.startswith("invoke_agent")}
    sent = prompts(agent)
    assert sorted(runs) == sorted(trace_id(*prompt) for prompt in sent.values())
    for turn in truth(agent):
        run = runs[trace_id(*sent[turn.prompt])]
        assert (run.error == "interrupted") == (not turn.end)
        assert run.start / NS <= turn.start + TOLERANCE


def test_a_sub_agent_hangs_below_the_tool_call_that_started_it() -> None:
    """In the recording of oh-my-pi: one trace over both files, from the prompt down to the sub-agent's tool."""
    found = recorded("oh-my-pi")
    by_id = {span.span: span for span in found}
    (tool,) = [span for span in found if span.attributes.get("gen_ai.tool.call.id") == "call_210"]
    names = [tool.name]
    while tool.parent:
        tool = by_id[tool.parent]
        names.append(tool.name)
    assert names == ["execute_tool bash", "turn", "invoke_agent omp", "execute_tool task", "turn", "invoke_agent omp"]
