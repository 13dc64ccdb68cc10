"""Lines of logs: which bytes are one, whatever they are read together with."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from coding_agent_exporter.decode import session, turns, usage
from coding_agent_exporter.decode.lines import objects, whole
from coding_agent_exporter.model import SessionHeader
from coding_agent_exporter.turnmodel import Call, Header


def event(name: str) -> dict[str, Any]:
    return {
        "type": "cost_snapshot", "timestamp": "2026-01-01T00:00:00Z", "session_id": "s", "event_id": name,
        "cost": {"total_cost_usd": 1},
    }


def entry(name: str) -> dict[str, Any]:
    message = {"role": "assistant", "usage": {"input": 1, "cost": {"total": 1}}, "timestamp": 1_767_225_600_000}
    return {"type": "message", "id": name, "timestamp": "2026-01-01T00:00:01Z", "message": message}


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def taken(dialect: str, data: bytes) -> tuple[list[str | None], int]:
    """The names of what was accepted, and how much was not."""
    if dialect == "usage":
        events, rejected = usage.decode(data)
        return [event.event_id for event in events], rejected.total()
    if dialect == "session":
        records, rejected, _ = session.decode(data)
        return [record.entry for record in records if not isinstance(record, SessionHeader)], rejected.total()
    found, wrong = turns.decode(data)
    return [record.entry for record in found if not isinstance(record, Header)], wrong


DIALECTS = {"usage": event, "session": entry, "turns": entry}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("beside", [b"", b"junk\n", b"\n"], ids=["alone", "beside junk", "beside an empty line"])
def test_an_object_broken_over_two_lines_is_two_bad_lines(dialect: str, beside: bytes) -> None:
    """Also one whose halves look like lines, and where another line makes up for the number of newlines."""
    make = DIALECTS[dialect]
    good = dump(make("good")) + b"\n"
    broken = dump(make("broken")).replace(b', "timestamp"', b',\n"timestamp"', 1)
    in_text = dump({"more": {"text": "}@{"}, **make("in text")}).replace(b"@", b"\n")
    for halves in (broken, in_text):
        names, rejected = taken(dialect, good + halves + b"\n" + good + beside)
        assert names == ["good", "good"]
        at_least = 1 if dialect == "session" else 2  # half of an entry may look like one that does not matter
        assert rejected - (beside == b"junk\n") >= at_least
    both = broken.replace(b"\n", b"\n", 1) + dump(make("glued")) + b"\n"
    names, _ = taken(dialect, both + beside)
    assert "broken" not in names


@pytest.mark.parametrize("dialect", DIALECTS)
def test_objects_in_one_line_come_to_what_they_are_in_lines_of_their_own(dialect: str) -> None:
    """As they would have been read one by one, had the exporter looked in between."""
    make = DIALECTS[dialect]
    a, b = dump(make("a")), dump(make("b"))
    odd = dump({**make("odd"), "model": 7})
    half = dump({**make("half \ud83d"), "text": "}{ \\"})
    for pieces in ([a, b], [a, odd, b], [odd, a], [a, b" ", b], [half, half], [a, b'{"usage":'], [a, b"]"], [a, b"7"],
                   [a, b'{"usage": "'], [a, b'{"usage": [}', b], [b, b"}"]):
        apart = b"\n".join(pieces[:2]) + b"".join(pieces[2:]) if pieces[1].endswith(b"[}") else b"\n".join(pieces)
        assert taken(dialect, b"".join(pieces) + b"\n") == taken(dialect, apart + b"\n"), pieces


@pytest.mark.parametrize("padding", [0, 1 << 17, 3 << 17, 1 << 20])
def test_a_long_line_comes_to_the_same_as_a_short_one(padding: int) -> None:
    """However much of a reply or of a tool's arguments is in it."""
    text = "}{ \\" * (padding // 4)
    arguments = {"text": text, "a": [{}]}
    tools = [{"type": "toolCall", "id": f"t{n}", "name": "write", "arguments": arguments} for n in (1, 2)]
    content = [{"type": "text", "text": text}, *tools, {"type": "text", "text": '"toolCall"', "id": "no"}]
    reply = entry("reply")
    reply["message"].update(content=content, model="m", provider="p", errorMessage="x")
    header = {"type": "session", "id": "s", "timestamp": "2026-01-01T00:00:00Z", "parentSession": "p", "more": text}
    lines = b"".join(dump(line) + b"\n" for line in (
        {**event("long"), "more": text}, {**event("odd"), "more": text, "model": 7, "cost": {"total_cost_usd": -1}},
        {"type": "other", "more": text}, header, reply, {**reply, "message": None, "more": text},
        {**reply, "type": "custom", "customType": "tool_execution_start", "data": {"toolCallId": "t1"}, "more": text},
    )) + dump([text]) + b"\n"
    short = lines.replace(dump(text)[1:-1], b"")
    assert len(short) < 5000
    assert usage.decode(lines) == usage.decode(short)
    assert session.decode(lines) == session.decode(short)
    assert turns.decode(lines) == turns.decode(short)
    (call,) = (record for record in turns.decode(lines)[0] if isinstance(record, Call))
    assert call.tools == [("t1", "write"), ("t2", "write")]


@pytest.mark.parametrize("part", ["{},", '{"":0},', '{"type":"toolCall"},'])
def test_what_is_made_of_a_long_line_is_not_much_larger_than_the_line(part: str) -> None:
    """A line of four megabytes must not take a hundred: a small container would be killed, at every restart again."""
    inner = "[" + part * ((300 << 10) // len(part)) + "{}]"
    usages = [json.dumps({**event("e"), name: "@"}).replace('"@"', inner) for name in
              ("rate_limits", "model", "cost", "tokens", "timestamp", "session_id", "type", "event_id")]
    entries = [json.dumps({**entry("e"), name: "@"}).replace('"@"', inner) for name in
               ("id", "parentId", "timestamp", "type", "message")]
    message = entry("e")["message"]
    entries += [json.dumps({**entry("e"), "message": {**message, name: "@"}}).replace('"@"', inner) for name in
                ("content", "usage", "role", "timestamp", "toolCallId", "errorMessage")]
    tracemalloc.start()
    try:
        for decode, lines in ((usage.decode, usages), (session.decode, entries), (turns.decode, entries)):
            for line in lines:
                data = line.encode()
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                decode(data)
                peak = tracemalloc.get_traced_memory()[1] - before
                assert peak < 8 * len(data), (decode.__module__, line[:300])
    finally:
        tracemalloc.stop()


def test_a_line_that_is_no_row_of_objects_stays_one() -> None:
    for line in (b"junk", b"{}", b" {} ", b'{"a":"}{"}', b"[{}]{}", b'{"a":', b'{"a}{', b"}{}", b"{[}{}", b'"{}"{}'):
        assert objects(line) == [line]
    assert objects(b'{"a":"\\"}{"} {}x{}') == [b'{"a":"\\"}{"}', b" {}", b"x{}"]


def test_whole_objects_are_taken_from_an_unterminated_line() -> None:
    """Their writers died before the newline. What comes behind waits for its own end."""
    assert whole(b'{"a":1}') == 7
    assert whole(b'{"a":1}{"b":') == 7
    assert whole(b'{"a":1}{}') == 9
    for line in (b"", b"{", b'{"a":{}', b"[{}]", b'"}', b'{"a":"}{"', b"7}"):
        assert whole(line) == 0


def test_the_end_of_an_object_is_looked_for_once() -> None:
    """A line of quotes, braces and backslashes takes time in proportion to its length: the work would be 10**12."""
    for pattern in (b'"\\', b'{"', b"{}x", b'}"{', b"\\", b"} "):
        line = b"{}{" + pattern * 1_000_000
        assert b"".join(objects(line)) == line
        whole(line)
