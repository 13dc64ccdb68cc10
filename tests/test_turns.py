"""Turns and runs out of session files: when they begin and end, whose they are, and that none comes twice."""

from __future__ import annotations

import pytest

from coding_agent_exporter.decode.turns import decode
from coding_agent_exporter.spanmodel import SpanLink
from coding_agent_exporter.turnmodel import FinishedRun, FinishedTurn, run_span, tool_span, trace_id, turn_span
from coding_agent_exporter.turns import Turns
from spans_support import LONG_AFTER, T0, SessionFile, at, feed, finished, iso, runs_of, turns_of


def test_a_prompt_is_a_run_and_each_model_call_a_turn_of_it() -> None:
    """The run spans from the prompt's sending to its last turn; turns are numbered; sums are over the turns."""
    file = SessionFile()
    prompt = file.user(100, sent=40)
    file.call(110, 200, "c1")
    file.result("c1", 500)
    file.call(520, 700)
    found = finished(file.data)
    first, second = turns_of(found)
    (run,) = runs_of(found)
    assert (first.index, first.start - T0, first.end - T0) == (0, 100, 500)
    assert (second.index, second.start - T0, second.end - T0) == (1, 520, 700)
    (tool,) = first.tools
    assert (tool.call, tool.start - T0, tool.end - T0, tool.outcome) == ("c1", 200, 500, "ok")
    assert (run.start - T0, run.end - T0, run.turns, run.error) == (40, 700, 2, "")
    assert (run.cost, run.tokens) == (500_000_000_000, (20, 40, 6, 8))
    assert run.trace == first.trace == second.trace == trace_id("0001", prompt)
    assert first.parent == run.span == run_span("0001", prompt)


def test_what_is_finished_leaves_at_once() -> None:
    """A turn leaves with the line that ends it, its run with the last one's; neither waits for another line."""
    file = SessionFile()
    file.user(0)
    file.call(10, 20, "c1", "c2")
    file.result("c1", 30)
    turns = Turns("")
    assert feed(turns, file.data, at(30)) == []
    assert turns.waiting
    file.result("c2", 40)
    assert [type(one) for one in feed(turns, file.data.split(b"\n")[-2], at(40))] == [FinishedTurn]
    file.call(50, 60)
    assert [type(one) for one in feed(turns, file.data.split(b"\n")[-2], at(60))] == [FinishedTurn, FinishedRun]
    assert not turns.waiting


def test_the_end_of_a_call_is_what_the_agent_recorded_as_such() -> None:
    """oh-my-pi writes an entry a little after the call's end, and records that end; one that cannot be is not used."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, completedAt=T0 + 60, ttft=12.5)
    file.user(200)
    file.call(210, 300, completedAt=T0 + 5)
    first, second = turns_of(finished(file.data))
    assert (first.call.ended - T0, first.end - T0, first.call.first_token) == (60, 60, 12.5)
    assert second.call.ended - T0 == 300


def test_parallel_tools_start_together_when_the_call_has_ended() -> None:
    """pi writes all results of a reply when the last tool is done: nothing tells when the others ended."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1", "c2", "c3")
    file.result("c1", 900)
    file.result("c2", 901, failed=True)
    file.result("c3", 903)
    (turn,) = turns_of(finished(file.data))
    assert [(tool.start - T0, tool.end - T0, tool.outcome) for tool in turn.tools] == [
        (100, 900, "ok"), (100, 901, "error"), (100, 903, "ok"),
    ]


def test_tools_whose_results_lie_apart_ran_one_after_another() -> None:
    """Each starts when the one before it ended."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1", "c2")
    file.result("c1", 900)
    file.result("c2", 1500)
    (turn,) = turns_of(finished(file.data))
    assert [(tool.start - T0, tool.end - T0) for tool in turn.tools] == [(100, 900), (900, 1500)]


def test_a_recorded_start_of_a_tool_is_its_start() -> None:
    """oh-my-pi records when each tool started."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1", "c2")
    for tool, start in (("c1", 110), ("c2", 400)):
        file.entry("custom", start, customType="tool_execution_start",
                   data={"toolCallId": tool, "startedAt": iso(start), "args": {"command": "SECRET"}})
    file.result("c1", 900)
    file.result("c2", 1500)
    (turn,) = turns_of(finished(file.data))
    assert [(tool.start - T0, tool.end - T0) for tool in turn.tools] == [(110, 900), (400, 1500)]


def test_tool_calls_of_one_reply_with_the_same_id_are_two() -> None:
    """Some providers number calls carelessly; results go to them in order, and their spans differ."""
    file = SessionFile()
    file.user(0)
    entry = file.call(10, 100, "call_0", "call_0")
    file.result("call_0", 200)
    file.result("call_0", 210, failed=True)
    (turn,) = turns_of(finished(file.data))
    assert [tool.outcome for tool in turn.tools] == ["ok", "error"]
    assert tool_span("0001", entry, 0, "call_0") != tool_span("0001", entry, 1, "call_0")


@pytest.mark.parametrize(("stop", "error"), [("aborted", "aborted"), ("error", "error")])
def test_a_call_that_did_not_end_well_is_an_error_of_its_turn_and_run(stop: str, error: str) -> None:
    """What it asked for is not executed: no tool is waited for."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1", stop=stop, errorMessage="SECRET")
    found = finished(file.data)
    assert [one.error for one in found] == [error, error]
    assert turns_of(found)[0].tools == []


def test_an_aborted_run_is_over_at_once_and_a_failed_one_waits_for_another_try() -> None:
    """After an error the agent tries again on its own, without a line that says so."""
    aborted, failed = SessionFile(), SessionFile()
    for file, stop in ((aborted, "aborted"), (failed, "error")):
        file.user(0)
        file.call(10, 100, stop=stop)
    assert len(feed(Turns(""), aborted.data, at(100))) == 2
    turns = Turns("", retry_seconds=300)
    assert len(feed(turns, failed.data, at(100))) == 1
    assert turns.tick(at(299_000)) == []
    failed.call(299_500, 299_900)
    again = feed(turns, failed.data.split(b"\n")[-2], at(299_900))
    assert [(one.error, one.trace) for one in again] == [("", trace_id("0001", "00000001"))] * 2
    assert runs_of(again)[0].turns == 2


def test_a_failed_run_that_is_not_tried_again_leaves_as_an_error() -> None:
    """When nothing follows for `retry_seconds`."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, stop="error")
    turns = Turns("", retry_seconds=300)
    feed(turns, file.data, at(100))
    (run,) = turns.tick(at(300_200))
    assert (run.error, run.end - T0) == ("error", 100)


def test_a_message_that_steers_ends_the_run_before_it() -> None:
    """It waited in a queue while a tool ran: its run begins where that of the message before it ended."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1")
    file.result("c1", 400)
    steering = file.user(401, sent=150)
    file.call(402, 500)
    first, second = runs_of(finished(file.data))
    assert (first.end - T0, first.turns, first.error) == (400, 1, "")
    assert (second.start - T0, second.end - T0, second.trace) == (400, 500, trace_id("0001", steering))


def test_messages_let_out_of_a_queue_together_are_one_prompt() -> None:
    """Two of the user's messages with nothing between them, but a killed run and its successor are two."""
    file = SessionFile()
    file.user(0)
    file.user(3)
    file.call(10, 100)
    file.user(5000)
    file.user(60_000)
    file.call(60_010, 60_100)
    runs = runs_of(finished(file.data))
    assert [(run.start - T0, run.turns, run.error) for run in runs] == [
        (0, 1, ""), (5000, 0, "interrupted"), (60_000, 1, ""),
    ]


def test_a_run_cut_off_in_a_tool_leaves_with_the_next_prompt_and_says_so() -> None:
    """The process was killed: the tool has no result, its outcome is unknown, and its late result counts as such."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1", "c2")
    file.result("c1", 200)
    killed = file.last
    file.user(90_000)
    turns = Turns("")
    found = feed(turns, file.data, at(90_000))
    assert [(tool.outcome, tool.end - T0) for tool in turns_of(found)[0].tools] == [("ok", 200), ("unknown", 200)]
    assert [one.error for one in found] == ["interrupted", "interrupted"]
    file.result("c2", 90_500, after=killed)
    assert feed(turns, file.data.split(b"\n")[-2], at(90_500)) == []
    assert turns.counts == {"late": 1}


def test_a_process_that_leaves_ends_its_run() -> None:
    """oh-my-pi records its exit; what was running then was cut off at that moment. The other process goes on."""
    file = SessionFile()
    other = file.user(0)
    file.user(5, after="00000000")
    file.call(10, 100, "c1")
    file.entry("custom", 700, customType="session_exit", data={"reason": "sigterm", "kind": "signal"})
    turns = Turns("")
    found = feed(turns, file.data, at(700))
    assert [(type(one), one.end - T0, one.error) for one in found] == [
        (FinishedTurn, 700, "interrupted"), (FinishedRun, 700, "interrupted"),
    ]
    file.call(20, 800, after=other)
    assert len(feed(turns, file.data.split(b"\n")[-2], at(800))) == 2


def test_silence_ends_a_run_and_what_comes_after_all_keeps_its_place() -> None:
    """A turn after its run has left still has the run's trace and parent; only the run's own span stands."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1")
    file.result("c1", 200)
    turns = Turns("", quiet_seconds=3600)
    feed(turns, file.data, at(200))
    assert turns.tick(at(3_600_000)) == []
    (run,) = runs_of(turns.tick(at(3_600_300)))
    file.call(3_700_000, 3_700_100)
    (turn,) = feed(turns, file.data.split(b"\n")[-2], at(3_700_100))
    assert isinstance(turn, FinishedTurn)
    assert (turn.trace, turn.parent, turn.index) == (run.trace, run.span, 1)
    assert turns.counts == {"reopened": 1}


def test_two_processes_in_one_file_keep_their_runs_apart() -> None:
    """Entries belong to the run they hang on, however they are interleaved."""
    file = SessionFile()
    root = file.entry("model_change", 0)
    one = file.user(10, after=root)
    two = file.user(11, after=root)
    one_call = file.call(20, 100, "c1", after=one)
    two_call = file.call(21, 110, "c2", after=two)
    one_result = file.result("c1", 200, after=one_call)
    two_result = file.result("c2", 210, after=two_call)
    file.call(220, 300, after=two_result)
    file.call(230, 310, after=one_result)
    found = finished(file.data)
    answered: dict[str, list[str]] = {run.trace: [] for run in runs_of(found)}
    for turn in turns_of(found):
        answered[turn.trace].append(turn.call.parent)
    assert answered == {trace_id("0001", one): [one, one_result], trace_id("0001", two): [two, two_result]}


def test_a_branch_is_a_run_of_its_own() -> None:
    """The user goes back and asks again from an older entry."""
    file = SessionFile()
    root = file.entry("model_change", 0)
    file.user(10)
    file.call(20, 100)
    branch = file.user(1000, after=root)
    file.call(1010, 1100)
    assert [run.trace for run in runs_of(finished(file.data))][1] == trace_id("0001", branch)


def test_a_fork_gives_only_what_happened_in_it() -> None:
    """Entries older than the file are copies; what the fork adds carries its own session and names its origin."""
    parent = SessionFile("0001")
    parent.user(0)
    parent.call(10, 100)
    fork = SessionFile("0002", created=5000, parentSession="/home/dev/sessions/2026-01-01T00-00-00-000Z_0001.jsonl")
    fork.lines += parent.lines[1:]
    fork.last, fork._count = parent.last, parent._count
    own = fork.user(5100)
    fork.call(5110, 5200)
    turns = Turns("")
    found = feed(turns, fork.data)
    assert turns.counts == {"copied": 2}
    assert [one.trace for one in found] == [trace_id("0002", own)] * 2
    assert runs_of(found)[0].origin == "0001"


def test_what_an_agent_sets_off_itself_is_a_run_linked_to_the_one_before() -> None:
    """A finished background job, or a reminder, makes the agent go on after its run was over."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100)
    job = file.entry("custom_message", 1000, customType="async-result", content="SECRET")
    file.call(1010, 1100)
    reminder = file.user(2000, role="developer")
    file.call(2010, 2100)
    first, second, third = runs_of(finished(file.data))
    assert [run.trace for run in (second, third)] == [trace_id("0001", job), trace_id("0001", reminder)]
    assert second.links == [SpanLink(first.trace, first.span)]
    assert third.links == [SpanLink(second.trace, second.span)]


def test_a_message_put_in_during_a_run_does_not_break_it() -> None:
    """Only after the end of a run can it start another."""
    file = SessionFile()
    file.user(0)
    file.entry("custom_message", 5, customType="note", content="SECRET")
    file.call(10, 100, "c1")
    file.result("c1", 200)
    file.user(210, role="developer")
    file.call(220, 300)
    (run,) = runs_of(finished(file.data))
    assert run.turns == 2


def test_a_compaction_belongs_to_the_run_it_interrupts_or_else_to_the_next() -> None:
    """After a run has ended its span has left; what compacts then makes room for the next."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, stop="error")
    file.entry("compaction", 150, summary="SECRET")
    file.call(200, 300)
    file.entry("compaction", 400, summary="SECRET")
    file.user(1000)
    file.call(1010, 1100)
    assert [[t - T0 for t in run.compactions] for run in runs_of(finished(file.data))] == [[150], [400]]


def test_a_compaction_after_a_run_was_given_up_is_not_lost() -> None:
    """The run's span has left: the next one has the event."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1")
    file.result("c1", 200)
    turns = Turns("")
    feed(turns, file.data, at(200))
    assert [run.compactions for run in runs_of(turns.tick(LONG_AFTER))] == [[]]
    before = len(file.data)
    file.entry("compaction", 5_000_000, summary="SECRET")
    file.user(5_001_000)
    file.call(5_001_010, 5_001_100)
    assert [run.compactions for run in runs_of(feed(turns, file.data[before:]))] == [[T0 + 5_000_000]]


def test_a_run_that_switches_models_names_neither() -> None:
    """A sum over two models belongs to neither; the provider stands when it is the same."""
    file = SessionFile()
    file.user(0)
    file.call(10, 100, "c1")
    file.result("c1", 200)
    file.entry("model_change", 205, provider="loopback", modelId="haiku-like")
    file.call(210, 300, model="haiku-like")
    (run,) = runs_of(finished(file.data))
    assert (run.provider, run.model) == ("loopback", "")


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_sub_agent_is_a_child_of_the_call_that_started_it(tasks: int) -> None:
    """Its runs are part of its parent's trace, below the `task` call; with several of them, below their turn."""
    parent = SessionFile("0001")
    prompt = parent.user(0)
    call = parent.call(10, 100, *[f"t{number}:task" for number in range(tasks)])
    for number in range(tasks):
        parent.result(f"t{number}", 105)  # it runs in the background
    parent.call(110, 200)
    above = Turns("")
    feed(above, parent.data)
    child = SessionFile("0002", created=150, parentSession="/x/2026_0001.jsonl")
    child.user(160)
    child.call(170, 250)
    below = Turns("")
    found = below.apply(decode(child.data)[0], LONG_AFTER, above.spawner)
    expected = tool_span("0001", call, 0, "t0") if tasks == 1 else turn_span("0001", call)
    assert [(run.trace, run.parent) for run in runs_of(found)] == [(trace_id("0001", prompt), expected)]
    assert above.spawner(T0 + 50) is None


def test_a_sub_agent_whose_parent_is_not_known_has_a_trace_of_its_own() -> None:
    """It is linked by its parent's conversation id."""
    child = SessionFile("0002", created=150, parentSession="/x/2026_0001.jsonl")
    own = child.user(160)
    child.call(170, 250)
    found = Turns("").apply(decode(child.data)[0], LONG_AFTER, Turns("0001").spawner)
    assert [(run.trace, run.parent, run.origin) for run in runs_of(found)] == [(trace_id("0002", own), "", "0001")]
