"""Names that somebody makes up: each kind has a bound, and what is beyond it is counted elsewhere, never lost."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from coding_agent_exporter import families
from coding_agent_exporter.decode.lines import identifier
from coding_agent_exporter.ledger.book import OTHER, OTHERS, REPORTED, Book
from coding_agent_exporter.model import MAX_ID
from coding_agent_exporter.pipeline import Pipeline
from support import Clock, drain, exact, scrape, settings, total

if TYPE_CHECKING:
    from pathlib import Path

    from coding_agent_exporter.ledger.book import Labels


def spent(book: Book) -> dict[Labels, int]:
    deltas, _ = book.flush()
    return {labels: delta.amount for (name, labels), delta in deltas.items() if name == families.COST.name}


def test_label_sets_past_the_cap_lose_a_name_at_a_time_and_no_amount() -> None:
    """First the model, then the agent, then the source: the number of sets is bounded whatever is made up."""
    book = Book(max_series=50, cutoff=0)
    count = 1000
    for number in range(count):
        for source in ("pi-coding", f"made-up-{number}"):
            for agent in ("", f"agent-{number}"):
                for mode in ("api_key", "subscription"):
                    book.row(book.number("root", source, f"p/model-{number}", mode, agent), 1)[REPORTED] += 1
    amounts = spent(book)
    assert sum(amounts.values()) == 8 * count
    assert len(book.keys) <= 50 + 2 * OTHERS + 4
    assert len(book.keys) == len(set(book.keys))
    assert book.overflowed == Counter(usage=8 * count - 50)
    # The genuine source keeps its name; what was made up shares one.
    assert sum(amount for labels, amount in amounts.items() if labels[1] == "pi-coding") == 4 * count
    assert sum(amount for labels, amount in amounts.items() if labels[1] == OTHER) > 3 * count
    assert {labels for labels in amounts if labels[1] == OTHER} == {
        ("root", OTHER, OTHER, OTHER, mode, *agent, "reported")
        for mode in ("api_key", "subscription") for agent in ((), (OTHER,))
    }


def test_a_known_name_keeps_its_series_past_the_cap_also_after_a_restart() -> None:
    book = Book(max_series=2, cutoff=0, keys=[("r", "s", "p", "m", "api_key"), ("r", "s", "p", "n", "api_key")])
    assert book.keys[book.number("r", "s", "p/n", "api_key")][3] == "n"
    other = book.number("r", "s", "p/new", "api_key")
    assert book.keys[other] == ("r", "s", OTHER, OTHER, "api_key")
    assert book.number("r", "s", "p/newer", "api_key") == book.number("r", "s", "p/new", "api_key") == other
    assert book.overflowed["usage"] == 3


def test_names_that_differ_only_behind_what_is_shown_are_one() -> None:
    """And no name is remembered whole: a log may hold a million of them, of a megabyte each."""
    book = Book(max_series=100, cutoff=0)
    for number in range(500):
        book.row(book.number("r", "s", "p/" + "n" * 1000 + str(number), "api_key"), 1)[REPORTED] += 1
    assert list(spent(book).values()) == [500]
    assert not any(len(model or "") > 500 for _, _, model, _, _ in book._models)


SOURCES = ("opencode", "codex", "claude", "made-up")
LONG = 100_000


def test_ids_that_differ_only_at_their_end_count_apart_and_are_not_kept_whole(tmp_path: Path) -> None:
    """Names of sessions, messages and modes, of 100,000 characters each."""
    for source in SOURCES:
        log = tmp_path / "mngr/agents/a/events" / source / "usage/events.jsonl"
        log.parent.mkdir(parents=True)
        log.write_bytes(b"".join(
            json.dumps({
                "type": "cost_snapshot", "timestamp": f"2027-01-01T00:00:{session:02d}Z", "model": "p/m",
                "session_id": "s" * LONG + str(session), "message_id": "m" * LONG + str(message),
                "event_id": "e" * LONG + str(message), "cost_mode": "A" * LONG,
                # Claude's is a running total, which stands still here from then on.
                "cost": {"total_cost_usd": 1},
            }).encode() + b"\n" for session in range(5) for message in range(4)
        ))
    compaction = {"type": "compaction", "timestamp": "2027-01-01T00:00:01Z"}
    session = tmp_path / "sessions/--p--/2027-01-01T00-00-00-000Z_0.jsonl"
    session.parent.mkdir(parents=True)
    session.write_bytes(b"".join(json.dumps(entry).encode() + b"\n" for entry in (
        {"type": "session", "id": "i" * LONG, "timestamp": "2027-01-01T00:00:00Z", "parentSession": "p" * LONG},
        *({**compaction, "id": "c" * LONG + str(number)} for number in (1, 2, 2)),
    )))
    chosen = settings(tmp_path, f"--usage.root=m={tmp_path / 'mngr'}", f"--sessions.dir=p={tmp_path / 'sessions'}")
    pipeline = Pipeline(chosen, clock=Clock())
    drain(pipeline)
    seen = {source: total(scrape(pipeline), "coding_agent_cost_usd_total", source=source) for source in SOURCES}
    assert seen == {"opencode": 20, "codex": 5, "claude": 1, "made-up": 1}
    assert exact(pipeline)[families.COMPACTIONS.name, ("p",)] == 2
    assert total(scrape(pipeline), "coding_agent_sessions_total", source="codex") == 5
    assert pipeline._store.size() < 100 * LONG / 10  # 60 names of them were in what was read
    pipeline.close()


def test_an_identifier_is_a_name_that_is_short_enough_or_ends_in_a_digest() -> None:
    assert identifier("n" * MAX_ID) == "n" * MAX_ID
    names = {identifier("n" * MAX_ID + tail) for tail in ("a", "b", "\ud83d", "\u2028")}
    assert len(names) == 4
    assert {len(name) for name in names} == {MAX_ID}


def test_windows_of_rate_limits_are_bounded_and_those_that_are_over_make_room(tmp_path: Path) -> None:
    clock = Clock()
    log = tmp_path / "mngr/agents/a/events/claude/usage/events.jsonl"
    log.parent.mkdir(parents=True)

    def report(second: int, windows: dict[str, float | None]) -> None:
        limits = {name: {"used_percentage": 5, "resets_at": over} for name, over in windows.items()}
        with log.open("ab") as file:
            file.write(json.dumps({
                "timestamp": f"2027-01-01T00:00:{second:02d}Z", "session_id": "s", "rate_limits": limits,
            }).encode() + b"\n")

    pipeline = Pipeline(settings(tmp_path, f"--usage.root=m={tmp_path / 'mngr'}"), clock=clock)
    used = families.RATE_LIMIT_USED.name
    report(1, {f"short{number}": clock.now + 60 for number in range(60)})
    drain(pipeline)
    report(2, {"five_hour": None, **{f"junk\n\"{number}": None for number in range(500)}})
    drain(pipeline)
    seen = scrape(pipeline)
    assert len([name for name, _ in seen if name == used]) == 100
    assert total(seen, families.SERIES_DROPPED.name, reason="rate_limit_windows") == 461
    assert total(seen, used, window="five_hour") == 5
    clock.now += 61
    report(3, {"seven_day": None})
    seen = scrape(pipeline)
    assert total(seen, used, window="seven_day") == 5
    pipeline.close()
