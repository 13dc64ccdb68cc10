"""Spans: golden trees of the recordings, attributes, what may leave, and that slicing the input changes nothing."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import msgspec
import pytest

from coding_agent_exporter.decode.turns import decode
from coding_agent_exporter.spanmodel import Span
from coding_agent_exporter.spans import ALLOWED, observations, spans
from coding_agent_exporter.turnmodel import Finished
from coding_agent_exporter.turns import Turns
from spans_support import LONG_AFTER, SPANS, T0, SessionFile, feed, finished, recorded, recordings, tree

AGENTS = ("pi", "oh-my-pi", "cases")

STRUCTURE = frozenset({
    "type", "role", "id", "parentId", "timestamp", "parentSession", "provider", "model", "modelId", "stopReason",
    "responseId", "toolCallId", "customType", "startedAt", "name of a tool call",
})
"""Fields whose text is a name, an id or a time. All other text in a session file is content, or may be."""


def made(file: SessionFile, *, source: str = "pi-coding", mode: str = "api_key") -> list[Span]:
    return [span for one in finished(file.data) for span in spans(one, source=source, mode=mode)]


@pytest.mark.parametrize("agent", AGENTS)
def test_the_spans_of_a_recording_are_the_golden_ones(agent: str) -> None:
    """Names, parents, times, attributes, events, links and ids; `UPDATE_GOLDEN=1` writes them anew."""
    text = json.dumps(tree(recorded(agent)), indent=1) + "\n"
    golden = SPANS / f"{agent}.json"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.write_text(text)
    assert json.loads(text) == json.loads(golden.read_text())


@pytest.mark.parametrize("agent", AGENTS)
def test_spans_are_well_formed(agent: str) -> None:
    """Ids are of the right length and unique, parents are there, children begin within them, nothing ends early."""
    found = recorded(agent)
    by_id = {span.span: span for span in found}
    assert len(by_id) == len(found) > 10
    for span in found:
        assert (len(span.trace), len(span.span)) == (32, 16)
        int(span.trace, 16), int(span.span, 16)
        assert span.end >= span.start
        assert set(span.attributes) <= ALLOWED
        if span.parent:
            parent = by_id[span.parent]
            assert parent.trace == span.trace
            assert parent.start <= span.start


@pytest.mark.parametrize("agent", AGENTS)
def test_money_on_spans_is_the_money_in_the_files(agent: str) -> None:
    """Each message once: what the chat spans cost is what the entries say; turns and runs carry the same sum."""
    entries = {}
    for path in recordings(agent):
        for line in path.read_text().splitlines():
            document = json.loads(line)
            message = document.get("message", {})
            if message.get("role") == "assistant":
                entries[document["id"], message["timestamp"]] = message["usage"]["cost"]["total"]
    found = recorded(agent)
    for name in ("chat ", "turn", "invoke_agent "):
        costs = [span.attributes.get("coding_agent.cost.usd", 0.0) for span in found if span.name.startswith(name)]
        assert sum(cost for cost in costs if isinstance(cost, float)) == pytest.approx(sum(entries.values()), abs=1e-9)


def test_attributes_follow_the_conventions() -> None:
    """Names, kinds, and input tokens that include the cached ones."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1:read", responseId="resp-1")
    file.result("c1", 200, failed=True)
    file.call(210, 300, stop="aborted", usage=None, responseId=None)
    usage = {"gen_ai.usage.input_tokens": 17, "gen_ai.usage.output_tokens": 20,
             "gen_ai.usage.cache_read.input_tokens": 3, "gen_ai.usage.cache_creation.input_tokens": 4,
             "coding_agent.cost.usd": 0.25, "coding_agent.cost.mode": "subscription"}
    same = {"gen_ai.conversation.id": "0001", "gen_ai.provider.name": "loopback", "gen_ai.request.model": "sonnet-like"}
    turn, chat, tool, _, aborted, run = made(file, mode="subscription")
    assert (turn.name, turn.kind, turn.error) == ("turn", "internal", "")
    assert turn.attributes == {**same, **usage, "coding_agent.turn.index": 0}
    assert (chat.name, chat.kind, chat.parent) == ("chat sonnet-like", "client", turn.span)
    assert chat.attributes == {
        **same, **usage, "gen_ai.operation.name": "chat", "gen_ai.response.finish_reasons": ["toolUse"],
        "gen_ai.response.id": "resp-1",
    }
    assert (tool.name, tool.kind, tool.parent, tool.error) == ("execute_tool read", "internal", turn.span, "tool_error")
    assert tool.attributes == {
        "gen_ai.operation.name": "execute_tool", "gen_ai.conversation.id": "0001", "gen_ai.tool.name": "read",
        "gen_ai.tool.call.id": "c1", "error.type": "tool_error",
    }
    assert (aborted.error, aborted.attributes["error.type"]) == ("aborted", "aborted")
    assert "gen_ai.usage.input_tokens" not in aborted.attributes
    assert (run.name, run.kind, run.error, run.parent) == ("invoke_agent pi", "internal", "aborted", "")
    assert run.attributes == {**same, **usage, "gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "pi",
                              "error.type": "aborted"}
    assert made(file, source="omp")[-1].name == "invoke_agent omp"


def test_texts_are_cut_and_numbers_fit() -> None:
    """A model, a tool, an id of any length; sums and times beyond what the wire formats hold."""
    file = SessionFile()
    file.user(0)
    for number in range(40):
        file.call(10, 100 + number, f"{number}{'i' * 500}:{'t' * 500}", model="m" * 500, responseId="r" * 500,
                  usage={"input": 2**53, "cacheRead": 2**53, "cost": {"total": 1e6}})
        file.result(f"{number}{'i' * 500}", 100 + number)
    file.call(10, 200_000_000_000_000)
    found = made(file)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=list[Span]) == found
    for span in found:
        assert 0 < span.start <= span.end < 2**63
        for value in (span.name.removeprefix("execute_tool "), *span.attributes.values()):
            assert not isinstance(value, str) or len(value) <= 205
            assert not isinstance(value, int) or value < 2**63


def test_observations_carry_what_metrics_need() -> None:
    """Turn, call, first token and tools, in seconds, each with its span as exemplar."""
    file = SessionFile()
    file.user(0)
    file.call(10, 110, "c1:read", "c2:bash", ttft=25, completedAt=T0 + 100)
    file.result("c1", 300)
    file.result("c2", 350, failed=True)
    turn, run = finished(file.data)
    found = observations(turn)
    assert [(one.kind, one.labels, round(one.seconds, 6)) for one in found] == [
        ("turn", ("loopback", "sonnet-like", "toolUse"), 0.35),
        ("call", ("loopback", "sonnet-like", ""), 0.09),
        ("first_token", ("loopback", "sonnet-like"), 0.025),
        ("tool", ("read", "ok"), 0.2),
        ("tool", ("bash", "error"), 0.25),
    ]
    by_name = {span.name: span for span in spans(turn, source="omp")}
    exemplars = ["turn", "chat sonnet-like", "chat sonnet-like", "execute_tool read", "execute_tool bash"]
    assert [(one.trace, one.span) for one in found] == [(by_name[name].trace, by_name[name].span) for name in exemplars]
    assert observations(run) == []


@pytest.mark.parametrize("seed", range(12))
def test_slicing_and_restarting_change_nothing(seed: int) -> None:
    """However the lines arrive, with the state stored and loaded between them and lines read again: the same spans."""
    chance = random.Random(seed)
    for agent in AGENTS:
        for path in recordings(agent):
            lines = path.read_bytes().splitlines(keepends=True)
            whole = finished(path.read_bytes())
            turns, parts = Turns(""), list[Finished]()
            done = 0
            while done < len(lines):
                step = chance.randint(1, 6)
                start = 0 if chance.random() < 0.1 else done  # now and then the file is read again from its start
                parts += feed(turns, b"".join(lines[start:done + step]))
                done += step
                if chance.random() < 0.5:
                    stored = turns.dump()
                    turns = Turns("")
                    turns.load(stored)
            parts += turns.tick(LONG_AFTER)
            assert parts == whole


@pytest.mark.parametrize("agent", AGENTS)
def test_no_content_leaves(agent: str) -> None:
    """A secret in every text field that can hold content: none is in a span, an observation or the stored state."""
    planted = 0

    def plant(value: Any, field: str = "") -> Any:
        nonlocal planted
        if isinstance(value, dict):
            tool_call = value.get("type") == "toolCall"
            return {key: plant(inner, "name of a tool call" if tool_call and key == "name" else key)
                    for key, inner in value.items()}
        if isinstance(value, list):
            return [plant(inner, field) for inner in value]
        if isinstance(value, str) and field not in STRUCTURE:
            planted += 1
            return f"hunter2 {value} hunter2"
        return value

    leaving = b""
    for path in recordings(agent):
        lines = [json.dumps(plant(json.loads(line))) for line in path.read_text().splitlines()]
        turns = Turns("")
        found = feed(turns, "\n".join(lines).encode())
        leaving += turns.dump()
        for one in [*found, *turns.tick(LONG_AFTER)]:
            leaving += msgspec.msgpack.encode(spans(one, source="omp"))
            leaving += repr(observations(one)).encode()
    assert planted > 50
    assert len(leaving) > 5000
    assert b"hunter2" not in leaving


def test_a_reason_to_stop_is_a_code_or_nothing() -> None:
    """A field that should hold one of five words holds text: it does not leave."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, stop="because SECRET")
    (chat,) = [span for span in made(file) if span.kind == "client"]
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["other"]
    assert b"SECRET" not in msgspec.msgpack.encode(made(file))


@pytest.mark.parametrize("path", ["SECRET plan.jsonl", "/home/dev/SECRET: a/b.txt", "2026_SECRET!.jsonl", ""])
def test_a_path_that_names_no_session_does_not_leave(path: str) -> None:
    """Only what looks like a session's id is taken from the path of the session that this one came from."""
    file = SessionFile(parentSession=path)
    file.user(0)
    file.call(10, 100)
    run = made(file)[-1]
    assert "SECRET" not in str(run.attributes.get("coding_agent.parent_conversation.id", ""))


def test_lines_that_are_no_entries_are_counted() -> None:
    """Once each; a title record, which has no time, is none of them."""
    data = b'{"type":"title","v":1,"pad":"   "}\n\n{"type"\n[1]\n{"type":"message"}\n'
    assert decode(data) == ([], 3)
