"""Turns out of input that is torn, repeated, old or hostile: none is lost, none comes twice."""

from __future__ import annotations

import json

import pytest

from coding_agent_exporter.turnmodel import trace_id
from coding_agent_exporter.turns import Turns
from spans_support import LONG_AFTER, T0, SessionFile, at, feed, finished, runs_of

ODD = '{"type":"message","id":"a","timestamp":"2026-11-21T00:00:00Z","message":{"role":"assistant",'


def test_calls_without_a_prompt_are_a_run_all_the_same() -> None:
    """The line of the prompt was torn, or the file begins in the middle."""
    file = SessionFile()
    entry = file.call(10, 100, "c1", after="deadbeef")
    file.result("c1", 200)
    file.call(210, 300)
    (run,) = runs_of(finished(file.data))
    assert (run.trace, run.start - T0, run.turns) == (trace_id("0001", entry), 10, 2)


def test_the_same_lines_again_give_nothing() -> None:
    """A file that was moved, restored, or is read again from its start, also in the middle of a turn."""
    file = SessionFile()
    file.entry("model_change", 0)
    file.user(1)
    file.call(10, 100, "call_0")
    file.result("call_0", 200)
    file.call(210, 300)
    file.entry("compaction", 350, summary="SECRET")
    file.user(1000)
    file.call(1010, 1100, "call_0")
    turns = Turns("")
    assert len(feed(turns, file.data, at(1100))) == 3
    assert feed(turns, file.data, at(1200)) == []
    file.result("call_0", 1500)
    file.call(1510, 1600)
    assert [one.end - T0 for one in feed(turns, file.data, at(1600))] == [1500, 1600, 1600]
    assert feed(turns, file.data, at(1700)) == []


def test_a_long_session_is_not_forgotten_and_stays_small() -> None:
    """Read again from its start after thousands of calls it gives nothing; what is stored does not grow with it."""
    file = SessionFile()
    for number in range(3000):
        file.user(number * 100)
        file.call(number * 100 + 10, number * 100 + 90)
    turns = Turns("")
    assert len(feed(turns, file.data)) == 6000
    assert feed(turns, file.data) == []
    assert len(turns.dump()) < 40_000


def test_one_absurd_time_does_not_make_later_turns_look_old() -> None:
    """A line from the year 9000 may not close the session to what is still to come."""
    file = SessionFile()
    file.user(0)
    file.call(10, 220_000_000_000_000)
    for number in range(3000):
        file.user(number * 100 + 100)
        file.call(number * 100 + 110, number * 100 + 190)
    assert len(runs_of(finished(file.data))) == 3001


@pytest.mark.parametrize("line", [
    "", "{", "[]", "null", "7", '"text"', "{}", '{"type":7}', '{"type":"message"}', '{"type":"message","message":7}',
    '{"type":"message","id":"a","timestamp":"no time","message":{"role":"user"}}',
    '{"type":"message","id":{"a":1},"parentId":[],"timestamp":7,"message":{"role":["user"],"content":{}}}',
    ODD + '"content":["toolCall",{"type":"toolCall","id":7,"name":null},5],"usage":[1],"stopReason":{},"ttft":"x"}}',
    ODD + '"content":"\\ud83d \\"toolCall\\"","model":"\\udc00","usage":{"input":-1,"cost":{"total":"x"}}}}',
    ODD + '"content":{"toolCall":1},"timestamp":1e300,"completedAt":-1,"usage":{"cost":{"total":1e6}}}}',
    '{"type":"custom","id":"a","timestamp":"2026-11-21T00:00:00Z","customType":"tool_execution_start","data":[]}',
    '{"type":"session","id":7}', '{"type":"session"}', '{"type":"compaction","timestamp":true}',
    '{"type":"message","message":{"role":"user","content":' + "[" * 3000 + "]" * 3000 + "}}",
    '{"type":"message","id":"a","timestamp":"9999-12-31T23:59:59Z","message":{"role":"assistant","ttft":1e308}}',
])
def test_no_line_is_too_odd(line: str) -> None:
    """Torn, mistyped and hostile lines are passed over, or taken as far as they go; the next turn is there."""
    file = SessionFile()
    file.lines.append(line)
    prompt = file.user(0)
    file.call(10, 100)
    turns = Turns("")
    found = [*feed(turns, file.data), *turns.tick(LONG_AFTER)]
    assert trace_id("0001", prompt) in {run.trace for run in runs_of(found)}
    again = Turns("")
    again.load(turns.dump())
    assert again.dump() == turns.dump()


def test_half_characters_do_not_hide_a_turn() -> None:
    """A text cut through an emoji is escaped as half a character: legal JSON that strict readers refuse."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1")
    file.result("c1", 200)
    file.call(210, 300)
    data = file.data.replace(b'"SECRET"', b'"\\ud83d"')
    assert finished(data) == finished(file.data)


def test_the_first_version_of_the_format_has_no_ids() -> None:
    """Its entries follow each other; time and kind tell them apart."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1")
    file.result("c1", 200)
    file.call(210, 300)
    bare = [json.loads(line) for line in file.lines]
    for document in bare[1:]:
        del document["id"], document["parentId"]
    data = "\n".join(json.dumps(document) for document in bare).encode()
    turns = Turns("")
    (run,) = runs_of(feed(turns, data))
    assert run.turns == 2
    assert feed(turns, data) == []
