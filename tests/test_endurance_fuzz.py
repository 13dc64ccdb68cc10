"""Damaged lines and instance files: no decoder crashes or hangs, and each line is accounted for."""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from dataclasses import fields
from math import isfinite
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.decode import session, turns, usage
from coding_agent_exporter.decode.heartbeat import parse
from coding_agent_exporter.decode.lines import is_json, lines_of, objects
from coding_agent_exporter.model import Heartbeat, Rejected
from fuzz_support import (
    Mutator,
    good_entry,
    good_event,
    heartbeat_corpus,
    lines_in,
    session_corpus,
    usage_corpus,
    watchdog,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 20261130
WORDS = (b'"usage"', b'"compaction"', b'"session"')
"""A line of a session file without one of these cannot matter."""


def usage_accounts(line: bytes) -> tuple[list[Any], Any]:
    """What became of a line: whatever is in it is accepted or rejected."""
    events, rejected = usage.decode(line)
    assert len(events) + lines_of(rejected) == len(objects(line))
    return list(events), rejected


def session_accounts(line: bytes) -> tuple[list[Any], Any]:
    records, rejected, lines = session.decode(line)
    assert 1 <= lines <= len(objects(line))
    assert len(records) + lines_of(rejected) <= lines
    if not records and not rejected:  # an entry of another kind, and no garbage
        assert all(is_json(piece) or not any(word in piece for word in WORDS) for piece in objects(line))
        assert line.lstrip().startswith(b"{")
    return list(records), (rejected, lines)


def turns_accounts(line: bytes) -> tuple[list[Any], Any]:
    records, rejected = turns.decode(line)
    titles = sum(b"title" in piece or b"\\u" in piece for piece in objects(line))
    assert len(objects(line)) - titles <= len(records) + rejected <= len(objects(line))
    return list(records), rejected


def all_of(parts: list[Any]) -> Any:
    """The sum of what single lines were rejected for."""
    if not parts:
        return None
    if isinstance(parts[0], tuple):
        return (sum((part[0] for part in parts), Counter()), sum(part[1] for part in parts))
    return sum(parts, Counter()) if isinstance(parts[0], Counter) else sum(parts)


DECODERS: dict[str, tuple[Callable[[bytes], Any], Callable[[bytes], Any], Callable[[], list[bytes]], bytes]] = {
    "usage": (usage.decode, usage_accounts, usage_corpus, good_event(1)),
    "session": (session.decode, session_accounts, session_corpus, good_entry(1)),
    "turns": (turns.decode, turns_accounts, session_corpus, good_entry(1)),
}


@pytest.mark.parametrize("dialect", DECODERS)
def test_each_line_is_accounted_for_whatever_it_is_beside(dialect: str, amount: Callable[[int, int], int]) -> None:
    """A chunk comes to the sum of its lines, a line is accepted or rejected, and a good one is what it is alone."""
    decode, accounts, corpus, good_line = DECODERS[dialect]
    mutator = Mutator(corpus(), SEED)
    wanted, done, taken = amount(6_000, 350_000), 0, 0
    (good, *_), _ = accounts(good_line)
    with watchdog():
        while done < wanted:
            chunk = [mutator.line() for _ in range(mutator.chance.choice((1, 1, 1, 2, 3, 40)))]
            done += len(chunk)
            places = {mutator.chance.randrange(len(chunk) + 1) for _ in range(3)}
            for place in places:
                chunk.insert(place, good_line)
            data = b"\n".join(chunk) + b"\n"
            apart = [accounts(line) for line in lines_in(data)]
            together = decode(data)
            records = [record for found, _ in apart for record in found]
            assert list(together[0]) == records, (SEED, data)
            rest = together[1:] if len(together) > 2 else together[1]
            assert rest == all_of([rejected for _, rejected in apart]), (SEED, data)
            assert records.count(good) == len(places), (SEED, data)
            taken += len(records)
    assert taken > done / 4  # the damage is not such that nothing comes through
    print(f"{dialect}: {done} damaged lines, {taken} records of them and the good ones beside them, seed {SEED}")


def test_decoding_takes_memory_in_proportion(amount: Callable[[int, int], int]) -> None:
    """What a chunk of damaged lines takes at its peak is bounded by its size."""
    worst = 0.0
    with watchdog():
        for dialect, (decode, _, corpus, _) in DECODERS.items():
            mutator = Mutator(corpus(), SEED + 1)
            for _ in range(amount(10, 300)):
                data = b"\n".join(mutator.line() for _ in range(200))
                tracemalloc.start()
                decode(data)
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                worst = max(worst, peak / len(data))
                assert peak < 40 * len(data), (dialect, SEED)
    print(f"peak memory of decoding: at most {worst:.1f} times the size of the chunk")


@pytest.mark.parametrize("dialect", DECODERS)
def test_work_grows_with_the_size_of_a_line_and_no_faster(dialect: str, amount: Callable[[int, int], int]) -> None:
    """Calls are counted, not seconds: twice the line may take twice the calls."""
    decode = DECODERS[dialect][0]
    size = amount(2_000, 40_000)
    head = b'{"type":"message","timestamp":"2026-12-01T00:00:00Z","session_id":"s","usage":1,"a":'
    for piece in (b"[", b"]", b'{"a":', b"}{", b"{}", b'"', b"\\", b'\\"', b"\\ud83d", b"{}x", b'"usage"', b"\n",
                  b"\x00", b"9", b"1e9,", b" ", b"[[],", b'{"usage":1}',
                  b'{"message":{"role":"assistant","usage":{}}}'):
        for before in (b"", head):
            once, twice = (calls(decode, before + piece * (size * factor)) for factor in (1, 2))
            assert twice <= 2.5 * once + 2000, piece


def calls(function: Callable[[bytes], Any], data: bytes) -> int:
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(note)
    try:
        function(data)
    finally:
        sys.setprofile(None)
    return count


def test_damaged_instance_files_are_readings_or_rejected(amount: Callable[[int, int], int]) -> None:
    """What comes through is typed, finite, bounded and can be encoded."""
    mutator = Mutator(heartbeat_corpus(), SEED)
    reasons: Counter[str] = Counter()
    with watchdog():
        for pid in range(1, amount(3_000, 200_000)):
            found = parse(mutator.document(pid))
            if isinstance(found, Rejected):
                reasons[found.reason] += 1
                continue
            reasons["taken"] += 1
            for field in fields(Heartbeat):
                value = getattr(found, field.name)
                if isinstance(value, str):
                    assert len(value) <= 200
                    value.encode()
                elif isinstance(value, float):
                    assert isfinite(value)
                    assert value >= 0
            assert 0 < found.pid < 2**31
    assert set(reasons) >= {"taken", "not_json", "no_process", "bad_time"}
    print(f"instance files: {dict(reasons)}, seed {SEED}")
