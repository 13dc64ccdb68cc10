"""What `usage` adds up is what the daemon counts, whatever it is broken down by; and each part is where it belongs."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coding_agent_exporter.ledger.book import (
    CACHE_CREATION,
    CACHE_READ,
    ESTIMATED,
    INPUT,
    MESSAGES,
    OUTPUT,
    REPORTED,
    SESSIONS,
    UNPRICED,
)
from coding_agent_exporter.model import PICO
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.usage import read
from coding_agent_exporter.usageperiod import Calendar, Period
from coding_agent_exporter.usagetally import DIMENSIONS, Dimension, Sum, Tally
from support import CAPTURES, Clock, drain, exact
from support import settings as daemon_settings
from usage_support import RECORDINGS, dollars, event, log, settings, table, tokens

if TYPE_CHECKING:
    from pathlib import Path

SLOT = {
    ("coding_agent_cost_usd_total", "reported"): REPORTED, ("coding_agent_cost_usd_total", "estimated"): ESTIMATED,
    ("coding_agent_tokens_total", "input"): INPUT, ("coding_agent_tokens_total", "output"): OUTPUT,
    ("coding_agent_tokens_total", "cache_read"): CACHE_READ,
    ("coding_agent_tokens_total", "cache_creation"): CACHE_CREATION,
    "coding_agent_messages_total": MESSAGES, "coding_agent_unpriced_tokens_total": UNPRICED,
    "coding_agent_sessions_total": SESSIONS,
}

Totals = dict[tuple[str, str, str, int], int]


def counted_by_the_daemon(home: Path, *flags: str) -> Totals:
    """Its usage counters in the smallest unit, by source, model, cost mode and slot; without what is 0."""
    pipeline = Pipeline(daemon_settings(home, *flags), clock=Clock())
    drain(pipeline)
    totals: Totals = {}
    for (name, labels), amount in exact(pipeline).items():
        slot = SLOT.get(name, SLOT.get((name, labels[-1])))
        if slot is not None and amount:
            model = labels[3] if labels[2] == "unknown" else f"{labels[2]}/{labels[3]}"
            key = (labels[1], model, labels[4], slot)
            totals[key] = totals.get(key, 0) + amount
    pipeline.close()
    return totals


def counted_by_usage(home: Path, by: tuple[Dimension, ...], *flags: str, period: Period | None = None) -> Totals:
    """The same out of a tally that is by at least source and model."""
    totals: Totals = {}
    for key, row in tallied(home, by, *flags, period=period).items():
        named = dict(zip(by, key, strict=True))
        for mode, slots in row.modes.items():
            for slot, amount in enumerate(slots):
                place = (named["source"], named["model"], mode, slot)
                totals[place] = totals.get(place, 0) + amount
    return {key: amount for key, amount in totals.items() if amount}


def tallied(
    home: Path, by: tuple[Dimension, ...], *flags: str, period: Period | None = None
) -> dict[tuple[Any, ...], Sum]:
    tally = Tally(by, period or Period(), Calendar(utc=True))
    read(settings(home, *flags), tally, clock=Clock())
    return tally.rows


FINEST: tuple[Dimension, ...] = ("source", "model", "day", "agent", "session")


@pytest.mark.parametrize("number", range(1, 13))
def test_nasty_logs_come_to_what_the_daemon_counts(number: int, adversarial: Path, tmp_path: Path) -> None:
    """Every counter to the pico-USD and the token, however finely it was broken down on the way."""
    root = f"--usage.root=m={adversarial / str(number)}"
    expected = counted_by_the_daemon(tmp_path, root)
    assert expected
    assert counted_by_usage(tmp_path, ("source", "model"), root) == expected
    assert counted_by_usage(tmp_path, FINEST, root) == expected


@pytest.mark.parametrize("flags", [
    RECORDINGS, *([flag] for flag in RECORDINGS), [RECORDINGS[0], RECORDINGS[3]],
], ids=["all", "pi logs", "opencode", "claude", "pi sessions", "omp", "pi both"])
def test_recordings_come_to_what_the_daemon_counts(flags: list[str], tmp_path: Path) -> None:
    """The same of what real agents wrote: forks, restored totals, logs and session files of one session."""
    expected = counted_by_the_daemon(tmp_path, *flags)
    assert expected
    assert counted_by_usage(tmp_path, ("source", "model"), *flags) == expected
    assert counted_by_usage(tmp_path, FINEST, *flags) == expected


def test_the_program_prints_every_digit_of_the_daemons_counters(adversarial: Path, tmp_path: Path) -> None:
    """By source, out of the CSV file: cost by mode and its estimated part, all kinds of tokens, messages."""
    flags = [*RECORDINGS, *(f"--usage.root=a{number}={adversarial / str(number)}" for number in range(1, 13))]
    expected = counted_by_the_daemon(tmp_path, *flags)

    def total(source: str, *slots: int, mode: str = "") -> int:
        return sum(amount for (of, _, mode_of, slot), amount in expected.items()
                   if of == source and slot in slots and mode in {"", mode_of})

    rows = table(tmp_path, "--by=source", *flags)
    assert {row["source"] for row in rows} == {source for source, *_ in expected}
    for row in rows:
        source = row["source"]
        for mode, column in (("api_key", "api"), ("subscription", "subscription")):
            assert Decimal(row[f"{column}_cost_usd"] or 0) * PICO == total(source, REPORTED, ESTIMATED, mode=mode)
            assert Decimal(row[f"{column}_estimated_usd"] or 0) * PICO == total(source, ESTIMATED, mode=mode)
        for column, slot in (("input_tokens", INPUT), ("output_tokens", OUTPUT), ("cache_read_tokens", CACHE_READ),
                             ("cache_creation_tokens", CACHE_CREATION), ("messages", MESSAGES),
                             ("unpriced_tokens", UNPRICED)):
            assert int(row[column]) == total(source, slot)


def test_the_daemons_state_is_left_alone(tmp_path: Path) -> None:
    """`usage` reads no state file and makes none, and leaves nothing in the directory for temporary files."""
    (tmp_path / "tmp").mkdir()
    state = tmp_path / "state.db"
    state.write_bytes(b"not a state file")
    rows = table(tmp_path, *RECORDINGS, f"--state.path={state}", env={"TMPDIR": str(tmp_path / "tmp")})
    assert rows
    assert state.read_bytes() == b"not a state file"
    assert {path.name for path in tmp_path.iterdir()} == {"tmp", "state.db"}
    assert list((tmp_path / "tmp").iterdir()) == []


# -- sessions


@pytest.mark.parametrize("flags", [[flag] for flag in RECORDINGS], ids=["pi", "opencode", "claude", "sessions", "omp"])
def test_sessions_are_counted_once(flags: list[str], tmp_path: Path) -> None:
    """As many rows by session as the daemon counted sessions."""
    counted = sum(amount for (*_, slot), amount in counted_by_the_daemon(tmp_path, *flags).items() if slot == SESSIONS)
    rows = tallied(tmp_path, ("session",), *flags)
    assert len(rows) == counted
    assert all(len(row.sessions) == 1 for row in rows.values())


def test_a_session_in_a_log_and_in_a_file_is_one_row(tmp_path: Path) -> None:
    """The recording of pi has five sessions in its session files, some of them in logs too: by the file's name."""
    rows = table(tmp_path, "--by=session", RECORDINGS[0], RECORDINGS[3])
    stems = {path.stem for path in (CAPTURES / "pi" / "sessions").rglob("*.jsonl")}
    assert {row["session"] for row in rows} == stems
    assert sum(int(row["messages"]) for row in rows) == 21


def test_what_a_fork_copied_is_its_parents(tmp_path: Path) -> None:
    """Also where only the fork's file tells of it; the parent has the name of its own file, once that is read."""
    parent, fork = "01a1fbc2-0000-7000-8000-00000000000a", "01a1fbc2-0000-7000-8000-00000000000b"

    def message(second: int, usd: float) -> dict[str, Any]:
        return {"type": "message", "id": f"e{second}", "timestamp": f"2026-05-02T10:00:{second:02d}Z", "message": {
            "role": "assistant", "provider": "a", "model": "x", "timestamp": 1_777_716_000_000 + second * 1000,
            "usage": {"input": 1, "output": 1, "cost": {"total": usd}}}}

    def header(session: str, at: str, **more: str) -> dict[str, Any]:
        return {"type": "session", "id": session, "timestamp": at, **more}

    files = {
        f"2026-05-02T10-01-00-000Z_{fork}": [
            header(fork, "2026-05-02T10:01:00Z", parentSession=f"/gone/main_{parent}.jsonl"),
            message(1, 4.0), {**message(90, 1.0), "timestamp": "2026-05-02T10:01:30Z"}],
        f"main_{parent}": [header(parent, "2026-05-02T09:00:00Z"), message(1, 4.0), message(2, 2.0)],
    }
    directory = tmp_path / "sessions" / "project"
    directory.mkdir(parents=True)
    found = []
    for name, lines in files.items():  # discovery, too, takes what says no date last
        (directory / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        rows = table(tmp_path, f"--sessions.dir=s={tmp_path / 'sessions'}", "--by=session")
        found.append({row["session"]: row["api_cost_usd"] for row in rows})
    (forks, _), (mains, _) = files.items()
    assert found == [{forks: "1", parent: "4"}, {forks: "1", mains: "6"}]


def test_sessions_of_one_name_in_two_agents_are_two(tmp_path: Path) -> None:
    """Where totals are of a process, as the daemon counts them."""
    for agent in ("one", "two"):
        root = log(tmp_path, "claude", event("2026-05-01T10:00:00Z", "s", 1.0), agent=agent)
    rows = table(tmp_path, f"--usage.root=m={root}", "--by=session")
    assert [(row["session"], row["api_cost_usd"]) for row in rows] == [("s", "1"), ("s", "1")]


# -- days, windows


def test_a_message_belongs_to_the_day_of_its_own_time(tmp_path: Path) -> None:
    """Not to the day on which it was read; what is corrected is taken back where it was."""
    root = log(
        tmp_path, "pi-coding",
        event("2026-03-08T23:00:00Z", "s1", 1.0, message_id="m1", model="a/x"),
        event("2026-03-09T01:00:00Z", "s1", 2.0, message_id="m2", model="a/x"),
        event("2026-03-10T01:00:00Z", "s1", 0.25, message_id="m1", model="a/y"),
    )
    rows = table(tmp_path, f"--usage.root=m={root}", "--by=day,model", "--utc")
    assert [(row["day"], row["model"], row["messages"], row["api_cost_usd"]) for row in rows] == [
        ("2026-03-08", "a/x", "0", "0"), ("2026-03-09", "a/x", "1", "2"), ("2026-03-10", "a/y", "1", "0.25")]


def test_days_are_those_of_the_time_zone(tmp_path: Path) -> None:
    """Half past eleven in the evening in New York is tomorrow in UTC; so too on the day when clocks change."""
    root = log(
        tmp_path, "pi-coding",
        event("2026-03-08T04:30:00Z", usd=1.0, message_id="m1"),  # 23:30 on the 7th
        event("2026-03-08T05:30:00Z", usd=2.0, message_id="m2"),  # 00:30 on the 8th, which has 23 hours
        event("2026-03-09T03:59:59Z", usd=4.0, message_id="m3"),
        event("2026-03-09T04:00:00Z", usd=8.0, message_id="m4"),
    )
    there = {"TZ": "America/New_York"}

    def days(*argv: str) -> dict[str, str]:
        rows = table(tmp_path, f"--usage.root=m={root}", "--by=day", *argv, env=there)
        return {row["day"]: row["api_cost_usd"] for row in rows}

    assert days() == {"2026-03-07": "1", "2026-03-08": "6", "2026-03-09": "8"}
    assert days("--utc") == {"2026-03-08": "3", "2026-03-09": "12"}
    assert days("--since=2026-03-08", "--until=2026-03-08") == {"2026-03-08": "6"}
    assert days("--since=2026-03-08T05:30:00+00:00", "--until=2026-03-08T23:59:59") == {"2026-03-08": "2"}


def test_windows_that_meet_lose_nothing_and_count_nothing_twice(adversarial: Path, tmp_path: Path) -> None:
    """Before an instant and from it on: together all there is."""
    root = f"--usage.root=m={adversarial / '10'}"
    everything = counted_by_the_daemon(tmp_path, root)
    days = sorted(key[0] for key in tallied(tmp_path, ("day",), root))
    assert len(days) >= 2
    cut = Calendar(utc=True).instant(days[len(days) // 2], 0, end=False)
    early = counted_by_usage(tmp_path, ("source", "model"), root, period=Period(until=cut))
    late = counted_by_usage(tmp_path, ("source", "model"), root, period=Period(since=cut))
    assert early != everything != late
    both = {key: early.get(key, 0) + late.get(key, 0) for key in early | late}
    assert {key: amount for key, amount in both.items() if amount} == everything


# -- cost modes that turn out late


LIMITED: dict[str, Any] = {"rate_limits": {"five_hour": {"used_percentage": 1}}}


def test_what_turns_out_to_be_a_subscription_moves_where_it_was_spent(tmp_path: Path) -> None:
    """Claude Code tells of limits with the third reading: days and sessions before keep their amounts, as imputed.

    The process before it, in the same session, was paid for.
    """
    root = log(
        tmp_path, "claude",
        event("2026-05-01T10:00:00Z", "a", 5.0),
        event("2026-05-01T11:00:00Z", "a", 1.0),  # less: the next process
        event("2026-05-02T10:00:00Z", "b", 3.0),
        event("2026-05-02T10:30:00Z", "a", 3.5),
        event("2026-05-03T10:00:00Z", "b", 4.5, **LIMITED),
    )
    rows = table(tmp_path, f"--usage.root=m={root}", "--by=day,session", "--utc")
    assert {(row["day"], row["session"]): (row["api_cost_usd"], row["subscription_cost_usd"]) for row in rows} == {
        ("2026-05-01", "a"): ("5", "1"), ("2026-05-02", "b"): ("", "2"), ("2026-05-02", "a"): ("", "0.5"),
        ("2026-05-03", "b"): ("", "1")}


def test_what_moves_in_from_outside_of_the_window_stays_outside(tmp_path: Path) -> None:
    """A process that began yesterday and turns out to be a subscription today was no money of today."""
    root = log(
        tmp_path, "claude",
        event("2026-05-01T10:00:00Z", "a", 7.0), event("2026-05-02T10:00:00Z", "a", 7.5, **LIMITED))
    rows = table(tmp_path, f"--usage.root=m={root}", "--since=2026-05-02", "--utc")
    assert (dollars(rows, "api"), dollars(rows, "subscription")) == (Decimal(0), Decimal("0.5"))


def test_a_session_of_codex_moves_as_a_whole(tmp_path: Path) -> None:
    """Tokens, and what was estimated from them, go to the days on which they were used."""
    model: dict[str, Any] = {"model": "openai/gpt-5"}
    root = log(
        tmp_path, "codex",
        event("2026-05-01T10:00:00Z", tokens=tokens(1000, 100), **model),
        event("2026-05-02T10:00:00Z", tokens=tokens(3000, 200), **model),
        event("2026-05-03T10:00:00Z", tokens=tokens(3500, 200), **model, **LIMITED),
    )
    rows = table(tmp_path, f"--usage.root=m={root}", "--by=day", "--utc")
    assert [(row["input_tokens"], row["output_tokens"], row["api_cost_usd"]) for row in rows] == [
        ("1000", "100", ""), ("2000", "100", ""), ("500", "0", "")]
    assert all(Decimal(row["subscription_cost_usd"]) > 0 for row in rows)
    assert all(row["subscription_estimated_usd"] == row["subscription_cost_usd"] for row in rows)


@hypothesis.settings(deadline=None, max_examples=50)
@given(st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.integers(0, 5), st.sampled_from([None, "limits", "key"])),
    min_size=1, max_size=25))
def test_a_process_whose_mode_changes_keeps_its_totals(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str, int, str | None]]
) -> None:
    """Any order of rises, new processes, sessions, days and hints: the daemon's totals, and no amount below 0."""
    home = tmp_path_factory.mktemp("claude")
    hour, reading, lines = 0, 0, []
    for days, session, rise, hint in steps:
        hour += 24 * days + 1
        reading = reading + rise if rise else 1
        told: dict[str, Any] = {"limits": LIMITED, "key": {"cost_mode": "API_KEY"}}.get(hint or "", {})
        at = f"2026-05-{1 + hour // 24:02d}T{hour % 24:02d}:00:00Z" if hour < 31 * 24 else "2026-06-01T00:00:00Z"
        lines.append(event(at, session, float(reading), **told))
    root = f"--usage.root=m={log(home, 'claude', *lines)}"
    assert counted_by_usage(home, FINEST, root) == counted_by_the_daemon(home, root)
    for row in tallied(home, ("day", "session"), root).values():
        assert all(amount >= 0 for slots in row.modes.values() for amount in slots)


def test_a_mode_that_changes_after_very_many_sessions_loses_nothing(tmp_path: Path) -> None:
    """More changes of place than are remembered: the oldest stay where they are, and the sum is right."""
    lines = [event("2026-05-01T10:00:00Z", f"s{number}", float(number + 1)) for number in range(5000)]
    root = log(tmp_path, "claude", *lines, event("2026-05-01T11:00:00Z", "s0", 5001.0, **LIMITED))
    rows = table(tmp_path, f"--usage.root=m={root}")
    assert (dollars(rows, "api"), dollars(rows, "subscription")) == (Decimal(0), Decimal(5001))


# -- estimates, unpriced tokens, agents


def test_estimates_and_unpriced_tokens_are_told_apart(tmp_path: Path) -> None:
    """A reported cost, one that is estimated, and tokens that nobody has a price for."""
    root = log(
        tmp_path, "pi-coding",
        event("2026-05-01T10:00:00Z", usd=1.5, message_id="m1", model="anthropic/claude-sonnet-4-5", tokens=tokens(9)),
        event("2026-05-01T10:01:00Z", message_id="m2", model="anthropic/claude-sonnet-4-5", tokens=tokens(1000, 10)),
        event("2026-05-01T10:02:00Z", message_id="m3", model="nobody/knows", tokens=tokens(1, 2, 3, 4)),
    )
    priced, unpriced = table(tmp_path, f"--usage.root=m={root}", "--by=model")
    assert Decimal(priced["api_cost_usd"]) == Decimal("1.5") + Decimal(priced["api_estimated_usd"])
    assert Decimal(priced["api_estimated_usd"]) > 0
    assert (unpriced["model"], unpriced["unpriced_tokens"], unpriced["api_cost_usd"]) == ("nobody/knows", "10", "")


def test_agents_are_told_apart_where_there_are_any(tmp_path: Path) -> None:
    """By the directory that the log lies in; session files are of no agent."""
    for number in (1, 2):
        root = log(tmp_path, "opencode", event("2026-05-01T10:00:00Z", f"s{number}", float(number), message_id="m"),
                   agent=f"agent-{number}")
    flags = [f"--usage.root=m={root}", RECORDINGS[3]]
    rows = table(tmp_path, *flags, "--by=agent,source")
    assert [(row["agent"], row["source"]) for row in rows] == [
        ("agent-2", "opencode"), ("agent-1", "opencode"), ("", "pi-coding")]


def test_every_order_of_dimensions_comes_to_the_same(tmp_path: Path) -> None:
    """`--by` changes the rows, never what they add up to."""
    sums = set()
    for by in (*((dimension,) for dimension in DIMENSIONS), DIMENSIONS, DIMENSIONS[::-1]):
        rows = table(tmp_path, *RECORDINGS, f"--by={','.join(by)}")
        sums.add((dollars(rows, "api"), dollars(rows, "subscription"), sum(int(row["messages"]) for row in rows)))
    assert sums == {(Decimal("1.063254875"), Decimal("0.0223122"), 109)}
