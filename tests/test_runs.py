"""Sessions through the whole pipeline: every finished turn gives its spans once, under the same ids, whatever happens
to files and process; and the histograms count what happened."""

from __future__ import annotations

import json
import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter import runs
from coding_agent_exporter.expose import render
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.schema import StoreError
from coding_agent_exporter.store import Store
from spans_support import T0, SessionFile, at, iso
from support import CAPTURES, Clock, drain, exact, scrape, settings, total

if TYPE_CHECKING:
    from pathlib import Path

    from coding_agent_exporter.spanmodel import Span

HOUR = 3_600_000
"""Milliseconds."""


class World:
    """A directory of session files and a tree of usage logs, read by a pipeline that can be restarted and killed."""

    def __init__(self, home: Path, *flags: str, start: int = -1000) -> None:
        """`start`: milliseconds after `T0` of the first start, which finds nothing."""
        self.home = home
        self.clock = Clock(at(start))
        self._flags = flags
        (home / "s" / "--x--").mkdir(parents=True, exist_ok=True)
        self.pipeline = self.open()
        drain(self.pipeline)

    def open(self, **how: Any) -> Pipeline:
        flags = ("--sessions.dir", f"pi={self.home / 's'}", "--usage.root", f"m={self.home / 'm'}", *self._flags)
        return Pipeline(settings(self.home, *flags), clock=self.clock, **{"spans": True, **how})

    def restart(self, **how: Any) -> None:
        """As after `kill -9`: nothing is flushed."""
        self.pipeline.close()
        self.pipeline = self.open(**how)

    def path(self, name: str = "2026_0001") -> Path:
        return self.home / "s" / "--x--" / f"{name}.jsonl"

    def write(self, file: SessionFile, until: int | None = None, name: str = "2026_0001") -> None:
        """Make the file on disk as long as `file` is, or `until` lines."""
        path = self.path(name)
        before = path.stat().st_size if path.exists() else 0
        data = "".join(f"{line}\n" for line in file.lines[:until]).encode()
        with path.open("ab") as out:
            out.write(data[before:])

    def log(self, *events: dict[str, Any], source: str = "opencode") -> None:
        path = self.home / "m" / "agents" / "one" / "events" / source / "usage" / "events.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as out:
            out.writelines(json.dumps({"source": source, "type": "cost_snapshot", **event}) + "\n" for event in events)

    def step(self, now: int) -> None:
        """Read all, at milliseconds after `T0`."""
        self.clock.now = at(now)
        drain(self.pipeline)

    def spans(self) -> list[Span]:
        return [span for _, span in self.pipeline._store.spans(1_000_000)]

    def names(self) -> list[str]:
        return [span.name for span in self.spans()]


def prompt_with_tool(session: str = "0001", **header: Any) -> SessionFile:
    """A prompt, a call that asks for a tool, its result, the answer."""
    file = SessionFile(session, **header)
    file.user(0)
    file.call(10, 1000, "t1")
    file.result("t1", 2000)
    file.call(2010, 3000)
    return file


TREE = ["turn", "chat sonnet-like", "execute_tool bash", "turn", "chat sonnet-like", "invoke_agent pi"]


# -- once, under the same ids


def test_a_finished_prompt_is_in_the_outbox_after_the_step_that_read_it(tmp_path: Path) -> None:
    """No waiting: the entries say that the run is over."""
    world = World(tmp_path)
    world.write(prompt_with_tool())
    world.step(3100)
    assert world.names() == TREE
    assert world.pipeline.outbox.size() == 6
    world.step(2 * HOUR)
    assert world.names() == TREE


@pytest.mark.parametrize("lines", range(1, 6))
def test_a_restart_between_any_two_lines_changes_no_span(lines: int, tmp_path: Path) -> None:
    """What is open is stored with the cursor."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, parts = World(tmp_path / "a"), World(tmp_path / "b")
    whole.write(prompt_with_tool())
    whole.step(3100)
    parts.write(prompt_with_tool(), lines)
    parts.step(3050)
    parts.restart()
    parts.write(prompt_with_tool())
    parts.step(3100)
    assert parts.spans() == whole.spans()


def truth(home: Path) -> tuple[set[tuple[str, ...]], dict[Any, int]]:
    """Spans and turn counters of the recordings of pi and oh-my-pi, read in one go."""
    world = World(home, "--otlp.backfill", start=HOUR * 24 * 400)
    for agent in ("pi", "oh-my-pi"):
        shutil.copytree(CAPTURES / agent / "sessions", home / "s" / agent)
    world.step(HOUR * 24 * 400)
    world.step(HOUR * 24 * 400 + 400_000)
    world.step(HOUR * 24 * 400 + 2 * HOUR)
    found = identities(world)
    counted = {key: number for key, number in exact(world.pipeline).items() if "turn" in key[0] or "tool" in key[0]}
    assert len({key[1] for key in found}) == len(world.spans()), "ids are unique"
    world.pipeline.close()
    return found, counted


def identities(world: World) -> set[tuple[str, ...]]:
    return {(span.trace, span.span, span.parent, span.name, str(span.start), str(span.end), span.error)
            for span in world.spans()}


@pytest.mark.parametrize("seed", range(4))
def test_recordings_in_slices_with_kills_and_failing_commits_give_the_same_spans(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files grow, move to another folder, are copied and written anew; every span is there once, and every count."""
    chance = random.Random(seed)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    spans, counted = truth(tmp_path / "whole")
    monkeypatch.setattr(runs, "CACHE", chance.choice([1, 3, 16]))
    world = World(tmp_path / "parts", "--otlp.backfill", start=HOUR * 24 * 400)
    commit, failing = Store.commit, chance.random() * 0.3

    def unreliable(self: Store, batch: Any) -> None:
        if chance.random() < failing:
            raise StoreError("no space left on device")
        commit(self, batch)

    monkeypatch.setattr(Store, "commit", unreliable)
    left: dict[Path, bytes] = {}
    for agent in ("pi", "oh-my-pi"):
        folder = CAPTURES / agent / "sessions"
        for path in sorted(folder.rglob("*.jsonl"), key=lambda path: (len(path.parts), path)):
            left[world.home / "s" / agent / path.relative_to(folder)] = path.read_bytes()
    # A sub-agent's file begins after its parent asked for it; that order is the agent's, not chance's.
    for target in [target for target in left if len(target.relative_to(world.home).parts) < 5]:
        target.parent.mkdir(parents=True, exist_ok=True)
        if any(target.with_suffix("") == other.parent for other in left):
            target.write_bytes(left.pop(target))
    drain(world.pipeline)
    while left:
        target = chance.choice(list(left))
        size = chance.choice([40, 700, 5000, len(left[target])])
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as out:
            out.write(left[target][:size])
        left[target] = left[target][size:]
        if not left[target]:
            del left[target]
        what = chance.random()
        if what < 0.15:
            world.restart()
        elif what < 0.3 and target.parent.parent.name != "s":
            content = target.read_bytes()
            target.unlink()
            target.write_bytes(content)
        if chance.random() < 0.5:
            world.pipeline.step()
    for seconds in (0, 400, 800, 4000, 8000, 8400):
        for _ in range(20):  # some of them fail
            world.step(HOUR * 24 * 400 + seconds * 1000)
    assert identities(world) == spans
    assert len(world.spans()) == len(spans)
    assert {key: number for key, number in exact(world.pipeline).items() if key in counted} == counted
    assert world.pipeline.outbox.size() == len(spans)


def test_a_copy_in_another_root_gives_nothing_again(tmp_path: Path) -> None:
    """A session is known by its id, whatever lies between: a restart, another directory, a file that is newer."""
    world = World(tmp_path, "--sessions.dir", f"other={tmp_path / 'o'}")
    world.write(prompt_with_tool())
    world.step(3100)
    before = exact(world.pipeline)
    (tmp_path / "o" / "--x--").mkdir(parents=True)
    shutil.copy(world.path(), tmp_path / "o" / "--x--" / "2027_0001.jsonl")
    world.step(4000)
    world.restart()
    world.step(5000)
    assert world.names() == TREE
    assert exact(world.pipeline) == before


def test_a_file_that_is_cut_short_and_restored_gives_nothing_again(tmp_path: Path) -> None:
    """In the middle of a turn, too: the open turn waits for its result."""
    world = World(tmp_path)
    file = prompt_with_tool()
    world.write(file, 3)
    world.step(1100)
    data = world.path().read_bytes()
    world.path().write_bytes(data[: len(data) // 2])
    world.step(1200)
    world.path().write_bytes(b"")
    world.step(1300)
    world.write(file)
    world.step(3100)
    assert world.names() == TREE
    assert [span.error for span in world.spans()] == [""] * 6


def test_a_file_that_is_moved_in_the_middle_of_a_turn_goes_on_where_it_was(tmp_path: Path) -> None:
    """To another folder of its root, or renamed; with the exporter running or not."""
    world = World(tmp_path)
    file = prompt_with_tool()
    world.write(file, 3)
    world.step(1100)
    target = tmp_path / "s" / "--y--" / "2026_0001.jsonl"
    target.parent.mkdir()
    world.path().rename(target)
    world.step(1200)
    world.restart()
    target = target.rename(target.with_name("2027_renamed.jsonl"))
    target.write_bytes(file.data)
    world.step(3100)
    assert world.names() == TREE
    assert {span.attributes["gen_ai.conversation.id"] for span in world.spans()} == {"0001"}


def test_a_fork_gives_only_what_is_its_own(tmp_path: Path) -> None:
    """The entries that it copied are older than its header."""
    world = World(tmp_path)
    file = prompt_with_tool()
    world.write(file)
    world.step(3100)
    fork = prompt_with_tool("0002", created=5000, parentSession="/x/2026_0001.jsonl")
    fork.user(6000)
    fork.call(6010, 7000)
    world.write(fork, name="2026_0002")
    world.step(7100)
    assert world.names() == [*TREE, "turn", "chat sonnet-like", "invoke_agent pi"]


def test_a_sub_agents_run_is_a_child_of_the_tool_that_started_it(tmp_path: Path) -> None:
    """Also after a restart between the two, and when more sessions are open than are kept in memory."""
    world = World(tmp_path)
    parent = SessionFile("aaaa-1")
    parent.user(0)
    parent.call(10, 1000, "t1:task")
    world.write(parent, name="2026_aaaa-1")
    world.step(1001)
    for number in range(200):
        other = SessionFile(f"other-{number}")
        other.user(0)
        world.write(other, name=f"2026_other-{number}")
    world.step(1002)
    world.restart()
    child = SessionFile("bbbb-1", created=1100, parentSession="/s/--x--/2026_aaaa-1.jsonl")
    child.user(1100)
    child.call(1110, 2000)
    folder = world.path("2026_aaaa-1").with_suffix("")
    folder.mkdir()
    (folder / "Sub.jsonl").write_bytes(child.data)
    world.step(2100)
    parent.result("t1", 3000)
    parent.call(3010, 4000)
    world.write(parent, name="2026_aaaa-1")
    world.step(4100)
    spans = {(span.name, span.attributes["gen_ai.conversation.id"]): span for span in world.spans()}
    tool = spans["execute_tool task", "aaaa-1"]
    assert spans["invoke_agent pi", "bbbb-1"].parent == tool.span
    assert {span.trace for span in world.spans()} == {tool.trace}


def test_a_sub_agent_without_its_parents_file_has_a_trace_of_its_own_for_good(tmp_path: Path) -> None:
    """The parent turns up later: what was sent stays, what follows belongs to it, and both name the parent."""
    world = World(tmp_path)
    child = SessionFile("bbbb-1", created=1100, parentSession="/s/--x--/2026_aaaa-1.jsonl")
    child.user(1100)
    child.call(1110, 2000)
    path = world.path("2026_aaaa-1").with_suffix("") / "Sub.jsonl"
    path.parent.mkdir()
    path.write_bytes(child.data)
    world.step(2100)
    parent = SessionFile("aaaa-1")
    parent.user(0)
    parent.call(10, 1000, "t1:task")
    parent.result("t1", 3000)
    parent.call(3010, 4000)
    world.write(parent, name="2026_aaaa-1")
    child.user(5000)
    child.call(5010, 6000)
    path.write_bytes(child.data)
    world.step(6100)
    found = {span.span: span for span in world.spans()
             if span.name == "invoke_agent pi" and span.attributes["gen_ai.conversation.id"] == "bbbb-1"}
    assert len(found) == 2
    assert {span.parent for span in found.values()} == {""}
    assert {span.attributes["coding_agent.parent_conversation.id"] for span in found.values()} == {"aaaa-1"}
    assert len({span.trace for span in world.spans()}) == 3


def test_session_ids_may_be_anything(tmp_path: Path) -> None:
    """They come from files: line breaks, NUL, patterns, a quote."""
    world = World(tmp_path)
    hostile = ["a\0b", "a\nb\nc", "turns\nx", "*[", "'", "%s", " "]
    for number, session in enumerate(hostile):
        world.write(prompt_with_tool(session), 3, name=f"2026_{number}")
    world.step(1100)
    world.restart()
    for number, session in enumerate(hostile):
        world.write(prompt_with_tool(session), name=f"2026_{number}")
    world.step(3100)
    assert sorted(world.names()) == sorted(TREE * len(hostile))
    assert len({span.trace for span in world.spans()}) == len(hostile)


def test_a_very_long_session_id_is_one_session_in_every_chunk(tmp_path: Path) -> None:
    """What follows in a later read belongs to the same run."""
    world = World(tmp_path)
    file = prompt_with_tool("x" * 300)
    world.write(file, 3)
    world.step(1100)
    world.write(file)
    world.step(3100)
    assert world.names() == TREE


def test_entries_older_than_their_own_session_are_not_lost(tmp_path: Path) -> None:
    """A clock that was set back right after the session began. Its money is counted."""
    world = World(tmp_path, start=-10_000)
    file = SessionFile(created=5000)
    file.user(0)
    file.call(10, 1000)
    world.write(file)
    world.step(6000)
    scrape(world.pipeline)
    assert total(scrape(world.pipeline), "coding_agent_messages_total") == 1
    assert world.names() == ["turn", "chat sonnet-like", "invoke_agent pi"]


# -- time


def test_a_tool_without_a_result_is_sent_when_its_session_has_been_quiet_for_an_hour(tmp_path: Path) -> None:
    """Also when the exporter was restarted meanwhile."""
    world = World(tmp_path)
    world.write(prompt_with_tool(), 3)
    world.step(1100)
    world.restart()
    world.step(1100)
    world.step(HOUR // 2)
    assert world.names() == []
    world.step(HOUR + 400_000)
    world.step(HOUR + 410_000)
    assert world.names() == ["turn", "chat sonnet-like", "execute_tool bash", "invoke_agent pi"]
    assert [span.error for span in world.spans()] == ["interrupted", "", "interrupted", "interrupted"]


def test_many_quiet_sessions_are_all_finished(tmp_path: Path) -> None:
    """More than are looked at in one step, and more than are kept in memory."""
    world = World(tmp_path)
    for number in range(500):
        world.write(prompt_with_tool(f"s{number}"), 3, name=f"2026_s{number}")
    world.step(1100)
    for tick in range(8):
        world.step(HOUR + 400_000 + tick * 6000)
    assert len(world.spans()) == 2000
    assert len(world.pipeline._runs._open) <= runs.CACHE


def test_a_turn_that_was_cut_off_after_its_run_had_been_sent_is_not_lost(tmp_path: Path) -> None:
    """An answer that came after two hours (a person had to allow the tool), and then the agent was killed."""
    world = World(tmp_path)
    file = SessionFile()
    file.user(0)
    file.call(10, 1000, "t1")
    world.write(file)
    world.step(1100)
    world.step(HOUR + 400_000)
    assert world.names()[-1] == "invoke_agent pi"
    file.result("t1", 2 * HOUR)
    file.call(2 * HOUR + 10, 2 * HOUR + 1000, "t2")
    world.write(file)
    world.step(2 * HOUR + 1100)
    for tick in range(1, 30):
        world.step(2 * HOUR + tick * 400_000)
    assert world.names().count("chat sonnet-like") == 2


def test_silence_means_nothing_while_a_backlog_is_read(tmp_path: Path) -> None:
    """After two hours in which nothing ran there is much to read; the result of the tool is in the last of it."""
    world = World(tmp_path)
    file = prompt_with_tool("zzzz")
    world.write(file, 3, name="2026_zzzz")
    world.step(1100)
    much = b'{"type":"x","text":"%s"}\n' % (b"x" * 1000) * 9000
    world.path("2026_aaaa").write_bytes(b'{"type":"session","id":"aaaa"}\n' + much)
    world.write(file, name="2026_zzzz")
    world.step(2 * HOUR)
    assert world.names() == TREE


def test_what_ended_before_the_first_start_gives_no_spans(tmp_path: Path) -> None:
    """Nor after a restart; what ends later does, and all of it is in the metrics. The baseline's age is the grace."""
    world = World(tmp_path, "--counters.baseline-age=0", start=2500)
    world.write(prompt_with_tool(), 4)
    world.step(2600)
    world.restart()
    assert world.names() == []
    world.write(prompt_with_tool())
    world.step(3100)
    assert world.names() == ["turn", "chat sonnet-like", "invoke_agent pi"]
    scrape(world.pipeline)
    assert total(scrape(world.pipeline), "coding_agent_turns_total") == 2


def test_what_ended_while_the_sidecar_was_starting_gives_spans(tmp_path: Path) -> None:
    """As its money counts as new: agent and exporter of a pod start together."""
    world = World(tmp_path, start=2500)
    world.write(prompt_with_tool())
    world.step(3100)
    assert world.names() == TREE


def test_a_collector_that_is_configured_later_gets_what_ends_from_then_on(tmp_path: Path) -> None:
    """What was read without one is not read again."""
    world = World(tmp_path)
    world.restart(spans=False)
    file = prompt_with_tool()
    world.write(file)
    world.step(3100)
    world.restart()
    file.user(4000)
    file.call(4010, 5000)
    world.write(file)
    world.step(5100)
    assert world.names() == ["turn", "chat sonnet-like", "invoke_agent pi"]


# -- usage logs


def opencode(at_ms: int, message: str, usd: float, **more: Any) -> dict[str, Any]:
    tokens = {"input": 1, "output": 2, "cache_read": 0, "cache_creation": 0} if usd else {}
    return {"timestamp": iso(at_ms), "session_id": "ses_1", "message_id": message, "model": "p/m",
            "cost": {"total_cost_usd": usd}, "tokens": tokens, **more}


def test_messages_of_opencode_are_spans_once_whatever_restarts(tmp_path: Path) -> None:
    """Zeros, figures, the same figures again: one span from the first to the last change."""
    world = World(tmp_path)
    world.log(opencode(0, "m1", 0))
    world.step(10)
    world.restart()
    world.log(opencode(2000, "m1", 0.5))
    world.step(2010)
    world.restart()
    assert world.names() == []
    world.step(40_000)
    assert [(span.name, span.start, span.end) for span in world.spans()] == [
        ("chat m", T0 * 10**6, (T0 + 2000) * 10**6)]
    world.log(opencode(2000, "m1", 0.5))
    world.step(50_000)
    assert len(world.spans()) == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_recording_of_opencode_in_slices_gives_the_same_spans(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills and failing commits between any two bytes of the log change nothing; the fork's copies give none."""
    log = CAPTURES / "opencode" / "agents" / "agent-oc" / "events" / "opencode" / "usage" / "events.jsonl"
    chance, later = random.Random(seed), HOUR * 24 * 400
    found = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        world = World(tmp_path / name, "--otlp.backfill", start=later)
        path = world.home / "m" / "agents" / "agent-oc" / "events" / "opencode" / "usage" / "events.jsonl"
        path.parent.mkdir(parents=True)
        data = log.read_bytes()
        if name == "parts":
            commit = Store.commit

            def unreliable(self: Store, batch: Any, commit: Any = commit) -> None:
                if chance.random() < 0.2:
                    raise StoreError("no space left on device")
                commit(self, batch)

            monkeypatch.setattr(Store, "commit", unreliable)
        while data:
            size = len(data) if name == "whole" else chance.choice([50, 300, 3000])
            with path.open("ab") as out:
                out.write(data[:size])
            data = data[size:]
            world.pipeline.step()
            if chance.random() < 0.1:
                world.restart()
        for minutes in (0, 2, 4, 90, 92):
            for _ in range(20):
                world.step(later + minutes * 60_000)
        found.append(world)
    whole, parts = (sorted(identities(world)) for world in found)
    assert parts == whole
    assert len(parts) == len(found[1].spans()) == 46


def test_a_call_does_not_last_into_the_next_one_when_the_log_is_read_late(tmp_path: Path) -> None:
    """The exporter was down for an hour: a message of a session is over when the next one starts."""
    world = World(tmp_path, "--otlp.pi-spans=usage")
    session = "2026_01234567-89ab-cdef-0123-456789abcdef"
    world.log(*({**opencode(start, "", 0.25), "event_id": f"e{start}", "session_id": session}
                for start in (1000, HOUR)), source="pi-coding")
    log = next((tmp_path / "m").rglob("events.jsonl"))
    os.utime(log, (at(HOUR + 1000), at(HOUR + 1000)))
    world.step(2 * HOUR)
    first, second = sorted(world.spans(), key=lambda span: span.start)
    assert first.end <= second.start


@pytest.mark.parametrize("order", ["log first", "session first"])
def test_spans_from_usage_logs_do_not_depend_on_which_file_is_read_first(order: str, tmp_path: Path) -> None:
    """With `--otlp.pi-spans=usage` every message of the log is a span, whether its session file is there or not."""
    world = World(tmp_path, "--otlp.pi-spans=usage")
    line = {**opencode(10, "", 0.25), "event_id": "e1", "session_id": "2026_01234567-89ab-cdef-0123-456789abcdef"}
    file = SessionFile("01234567-89ab-cdef-0123-456789abcdef")
    file.user(0)
    file.call(10, 1000)
    if order == "log first":
        world.log(line, source="pi-coding")
        world.step(1100)
    world.write(file, name="2026_01234567-89ab-cdef-0123-456789abcdef")
    world.step(1200)
    if order == "session first":
        world.log(line, source="pi-coding")
    world.step(1300)
    assert world.names() == ["chat m"]


@pytest.mark.parametrize("order", ["log first", "session first"])
def test_a_usage_log_beside_session_files_gives_no_spans(order: str, tmp_path: Path) -> None:
    """By default pi's spans come from its session files: which of the two is read first decides nothing."""
    world = World(tmp_path)
    session = "01234567-89ab-cdef-0123-456789abcdef"
    line = {**opencode(10, "", 0.25), "event_id": "e1", "session_id": f"2026_{session}"}
    if order == "log first":
        world.log(line, source="pi-coding")
        world.step(900)
    world.write(prompt_with_tool(session), name=f"2026_{session}")
    world.step(3100)
    world.log(line, source="pi-coding")
    world.step(100_000)
    assert world.names() == TREE


# -- the outbox


def test_a_failed_commit_is_made_up_for_with_its_spans_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outbox counts them when they are in it."""
    world = World(tmp_path)
    told: list[int] = []
    world.restart(committed=lambda: told.append(1))
    with monkeypatch.context() as broken:
        def full(_: Store, __: Any) -> None:
            raise StoreError("no space left on device")

        broken.setattr(Store, "commit", full)
        world.write(prompt_with_tool())
        world.step(3100)
        world.step(3200)
        assert (world.pipeline.outbox.size(), world.names(), told) == (0, [], [])
        assert world.pipeline.pending_commit
    world.step(3300)
    assert (world.pipeline.outbox.size(), world.names(), told) == (6, TREE, [1])


def test_a_crash_with_a_failed_commit_reads_it_all_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the ids that were never sent."""
    world = World(tmp_path)
    world.write(prompt_with_tool(), 3)
    world.step(1100)
    with monkeypatch.context() as broken:
        def full(_: Store, __: Any) -> None:
            raise StoreError("no space left on device")

        broken.setattr(Store, "commit", full)
        world.write(prompt_with_tool())
        world.step(3100)
    world.restart()
    world.step(3200)
    assert world.names() == TREE


def test_what_was_committed_and_not_sent_is_there_after_a_crash(tmp_path: Path) -> None:
    """In order, and what had left does not come back."""
    world = World(tmp_path)
    world.write(prompt_with_tool())
    world.step(3100)
    rows = world.pipeline.outbox.take(2)
    world.pipeline.outbox.done([number for number, _ in rows])
    world.restart()
    world.step(3200)
    assert world.pipeline.outbox.size() == 4
    assert [span.name for _, span in world.pipeline.outbox.take(10)] == TREE[2:]


def test_spans_that_could_not_be_removed_are_still_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: they are sent again, under the same ids, and the number of those that wait is right."""
    world = World(tmp_path)
    world.write(prompt_with_tool())
    world.step(3100)
    rows = world.pipeline.outbox.take(6)
    with monkeypatch.context() as broken:
        def full(*_: Any) -> None:
            raise StoreError("no space left on device")

        broken.setattr(Store, "_change", full)
        with pytest.raises(StoreError):
            world.pipeline.outbox.done([number for number, _ in rows])
    assert world.pipeline.outbox.size() == 6
    assert world.pipeline.outbox.take(6) == rows


def test_a_full_disk_does_not_end_metrics_when_spans_are_due_to_expire(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing new is to be committed, and the old spans cannot be removed: metrics go on, later they are removed."""
    world = World(tmp_path, "--otlp.max-age=1h")
    world.write(prompt_with_tool())
    world.step(3100)
    world.step(HOUR - 60_000)
    with monkeypatch.context() as broken:
        def full(*_: Any) -> None:
            raise StoreError("no space left on device")

        broken.setattr(Store, "_change", full)
        world.step(HOUR + 60_000)
        scrape(world.pipeline)
        assert total(scrape(world.pipeline), "coding_agent_turns_total") == 2
    world.step(HOUR + 180_000)
    assert world.names() == []


def test_the_size_is_right_when_spans_are_dropped_while_they_are_sent(tmp_path: Path) -> None:
    """The oldest are dropped, and the oldest are what the worker is sending: a bound that drifts is none."""
    world = World(tmp_path, "--otlp.max-queue=6")
    world.write(prompt_with_tool())
    world.step(3100)
    rows = world.pipeline.outbox.take(6)
    world.write(prompt_with_tool("0002"), name="2026_0002")
    world.step(3200)
    world.pipeline.outbox.done([number for number, _ in rows])
    assert world.pipeline.outbox.size() == world.pipeline._store.count_spans() == 6


@pytest.mark.parametrize("when", ["before the first start", "after it"])
def test_a_backfill_larger_than_the_outbox_loses_nothing(when: str, tmp_path: Path) -> None:
    """It was asked for, and is read faster than it may be sent. A directory may be mounted after the start."""
    if when == "before the first start":
        for number in range(50):
            path = tmp_path / "s" / "--x--" / f"2026_s{number}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(prompt_with_tool(f"s{number}").data)
    world = World(tmp_path, "--otlp.backfill", "--otlp.max-queue=100", start=HOUR)
    if when == "after it":
        for number in range(50):
            world.write(prompt_with_tool(f"s{number}"), name=f"2026_s{number}")
    sent: set[str] = set()
    for tick in range(20):
        world.step(2 * HOUR + tick * 1000)
        rows = world.pipeline._store.spans(100)
        sent |= {span.span for _, span in rows}
        world.pipeline.outbox.done([number for number, _ in rows])
    assert len(sent) == 300
    assert world.pipeline.outbox.dropped["overflow"] == 0


# -- histograms


def test_histograms_are_cumulative_consistent_and_in_order_after_a_restart(tmp_path: Path) -> None:
    """Buckets from the lowest to +Inf, the count equal to the last, the sum exact."""
    world = World(tmp_path)
    world.write(prompt_with_tool())
    world.step(3100)
    scrape(world.pipeline)
    for _ in range(2):
        scrape(world.pipeline)
        text = render(world.pipeline.scrape()[0])[0].decode()
        lines = [line for line in text.splitlines() if line.startswith("coding_agent_turn_duration_seconds_")]
        buckets = [float(line.rpartition(" ")[2]) for line in lines if "_bucket{" in line]
        bounds = [float(line.partition('le="')[2].partition('"')[0]) for line in lines if "_bucket{" in line]
        assert bounds == sorted(bounds)
        assert bounds[-1] == float("inf")
        assert buckets == sorted(buckets)
        assert [line.rpartition(" ")[2] for line in lines if "_bucket{" not in line] == ["2.0", "2.99"]
        world.restart()
        world.step(3200)


def test_a_new_histogram_is_zero_in_all_its_parts_first(tmp_path: Path) -> None:
    """One sample at 0, then everything: a quantile over increase() sees the first turn."""
    world = World(tmp_path)
    scrape(world.pipeline)
    world.write(prompt_with_tool())
    world.clock.now = at(3100)
    first = {key: value for key, value in scrape(world.pipeline).items() if "_seconds_" in key[0]}
    assert first
    assert {value for key, value in first.items() if "turn" in key[0] or "tool" in key[0]} == {0}
    second = scrape(world.pipeline)
    for family in ("coding_agent_turn_duration_seconds", "coding_agent_tool_duration_seconds"):
        assert total(second, f"{family}_count") == total(second, f"{family}_bucket", le="+Inf") > 0


def test_tools_past_the_cap_share_one_series_also_after_a_restart(tmp_path: Path) -> None:
    """Models make names up."""
    world = World(tmp_path)
    for number in range(3):
        file = SessionFile(f"s{number}")
        file.user(0)
        tools = [f"t{number}-{tool}:tool{number}-{tool}" for tool in range(100)]
        file.call(10, 1000, *tools)
        for tool in tools:
            file.result(tool.partition(":")[0], 1100)
        file.call(1200, 2000)
        world.write(file, name=f"2026_s{number}")
        world.step(2100)
        world.restart()
    scrape(world.pipeline)
    samples = scrape(world.pipeline)
    names = {dict(labels)["tool"] for name, labels in samples if name == "coding_agent_tool_calls_total"}
    assert len(names) == 201
    assert total(samples, "coding_agent_tool_calls_total", tool="other") == 100


def test_exemplars_name_spans_that_are_sent(tmp_path: Path) -> None:
    """In the bucket whose range holds their value."""
    world = World(tmp_path)
    world.write(prompt_with_tool())
    world.step(3100)
    ids = {(span.trace, span.span) for span in world.spans()}
    marks = world.pipeline._runs.exemplars
    assert marks
    for (_, labels), mark in marks.items():
        assert mark.value <= float(labels[-1])
        assert (mark.trace, mark.span) in ids


@pytest.mark.parametrize("why", ["no collector", "before the first start"])
def test_there_is_no_exemplar_without_a_span(why: str, tmp_path: Path) -> None:
    """A link into nothing is worse than none."""
    world = World(tmp_path, start=HOUR if why == "before the first start" else -1000)
    world.restart(spans=why != "no collector")
    world.write(prompt_with_tool())
    world.step(HOUR + 3100)
    assert world.pipeline._runs.exemplars == {}


def test_a_tool_without_a_result_has_no_duration(tmp_path: Path) -> None:
    """It is counted, but how long it ran is in no file: 0 seconds would be a lie in every quantile."""
    world = World(tmp_path)
    world.write(prompt_with_tool(), 3)
    world.step(1100)
    world.step(HOUR + 400_000)
    scrape(world.pipeline)
    samples = scrape(world.pipeline)
    assert total(samples, "coding_agent_tool_calls_total", outcome="unknown") == 1
    assert total(samples, "coding_agent_tool_duration_seconds_count") == 0


def test_a_flood_of_model_names_is_capped_in_histograms_too(tmp_path: Path) -> None:
    """`--counters.max-series` label sets at most, for each histogram as for each counter."""
    world = World(tmp_path, "--counters.max-series=10")
    for number in range(50):
        file = SessionFile(f"s{number}")
        file.user(0)
        file.call(10, 1000, model=f"model-{number}")
        world.write(file, name=f"2026_s{number}")
    world.step(1100)
    labels: dict[str, set[tuple[str, ...]]] = {}
    for family, values in exact(world.pipeline):
        if family.endswith(("_sum", "turns_total")):
            labels.setdefault(family, set()).add(values)
    assert labels
    assert max(len(found) for found in labels.values()) <= 22
    assert sum(number for (family, _), number in exact(world.pipeline).items()
               if family == "coding_agent_turns_total") == 50


def test_a_header_in_the_middle_of_a_file_names_what_follows_however_it_is_read(tmp_path: Path) -> None:
    """The first line is damaged, and somebody else's header stands further down, and another one after it."""
    file = prompt_with_tool()
    header, *entries = file.lines
    other, third = (json.dumps({**json.loads(header), "id": name}) for name in ("other", "third"))
    found: list[list[tuple[str, str, str]]] = []
    for slices in ([5], [1, 2, 3, 4, 5]):
        world = World(tmp_path / str(len(found)))
        file.lines = [header[:-5], entries[0], other, entries[1], third, *entries[2:]]
        for until in (*slices, None):
            world.write(file, until)
            world.step(0)
        world.step(3 * HOUR)
        found.append(sorted((span.name, span.trace, span.span) for span in world.spans()))
        world.pipeline.close()
    assert found[0] == found[1]
    assert len(found[0]) > 2
