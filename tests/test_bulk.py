"""Runs of usual events come to what the rules come to one event at a time, whatever stands between them."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.ledger import Book, Changes, Ledger, SessionMeta
from coding_agent_exporter.ledger import accounts as accounts_module
from coding_agent_exporter.ledger.incremental import NOT_COUNTED, Session, SessionRules
from coding_agent_exporter.ledger.readings import Codex, Process, ProcessRules
from coding_agent_exporter.model import (
    Cost,
    SessionCompaction,
    SessionHeader,
    SessionMessage,
    SessionRecord,
    SourceFile,
    Tokens,
    UsageEvent,
)
from test_ledger import Memory

if TYPE_CHECKING:
    from collections.abc import Callable

START = datetime(2026, 11, 21, tzinfo=UTC)
UUIDS = [f"0000000{number}-74e7-70f3-8236-1cf90229f35d" for number in range(3)]
MODELS = ["p/a", "p/a", "p/a", "p/b", "free", None]


class OneByOne(Book):
    """A book that wants each event for itself."""

    bulk = False


class Ledgers:
    """Two ledgers that are given the same: one counts in runs, the other one by one."""

    def __init__(self, cutoff: float, kinds: tuple[type[Book], type[Book]] = (Book, OneByOne)) -> None:
        self.pair = [
            (Ledger(memory, _estimate, kind(max_series=1000, cutoff=cutoff), cache_messages=40), memory)
            for kind, memory in zip(kinds, (Memory(), Memory()), strict=True)
        ]
        for ledger, _ in self.pair:
            ledger.now = ledger.written = (START + timedelta(days=30)).timestamp()
        self.many = [2000, 2000]
        """How many messages each of them keeps of a session."""

    def each(self, do: Callable[[Ledger], object]) -> None:
        one, other = (do(ledger) for ledger, _ in self.pair)
        assert one == other

    def commit(self, now: float, *, complete: bool = True) -> None:
        said = []
        for (ledger, memory), many in zip(self.pair, self.many, strict=True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(accounts_module, "MANY_MESSAGES", many)
                changes = ledger.flush(complete=complete, now=now)
            memory.commit(changes)
            ledger.trim()
            said.append((_deltas(changes), changes.figures, changes.rate_limits, ledger.rejected))
        assert said[0] == said[1]

    def remembered(self) -> list[dict[str, Any]]:
        return [
            {key: _plain(saved.blob, ledger.book) for key, saved in memory.saved.items()}
            for ledger, memory in self.pair
        ]


def _estimate(_: str, model: str, tokens: tuple[int, int, int, int], __: datetime) -> int | None:
    return sum(tokens) if model == "a" else None


def _deltas(changes: Changes) -> dict[object, tuple[int, int]]:
    return {key: (delta.amount, delta.baseline) for key, delta in changes.deltas.items()}


def _plain(blob: bytes, book: Book) -> tuple[object, ...]:
    """An account with its label sets by name: the order in which they got their numbers is nobody's business."""
    account = accounts_module._decoder.decode(blob)
    name = {NOT_COUNTED: None, **dict(enumerate(book.keys))}
    if isinstance(account, Session):
        account.merge()
        messages = {key: (name[record.number], record.second, record.figures, record.estimated)
                    for key, record in account.messages.items()}
        return (account.counted, account.live, account.floor, account.last, account.copies, account.mode, messages)
    if isinstance(account, Process):
        parts = {name[number]: part for number, part in account.parts.items()}
        return (account.reading, account.mode, account.limited, account.last, parts, list(account.readings.items()),
                account.recent, account.writer, account.session)
    assert isinstance(account, Codex)
    return (account.last, account.cost, account.tokens)


class World:
    """Events of one kind of log as its writers write them, and now and then as they should not."""

    def __init__(self, chance: random.Random, source: str) -> None:
        self.chance = chance
        self.source = source
        self.now = START
        self.total = 0.0
        self.serial = 0
        self.model: str | None = "p/a"
        self.mode: str | None = "API_KEY"
        self.written: list[UsageEvent] = []
        self.finished: list[UsageEvent] = []

    def events(self) -> list[UsageEvent]:
        chance = self.chance
        made = [one for _ in range(chance.randrange(1, 60)) for one in self._next()]
        if chance.random() < 0.2:
            chance.shuffle(made)
        if self.written and chance.random() < 0.2:
            made += chance.sample(self.written, min(len(self.written), chance.randrange(1, 30)))
        self.written += made
        return made

    def _next(self) -> list[UsageEvent]:
        chance = self.chance
        # Mostly seconds apart, sometimes in the same second, millisecond or microsecond.
        self.now += timedelta(microseconds=chance.choice([
            0, 400, 499, 500, 1_999, 2_000, 300_000, 999_600, 1_000_000, 7_654_321]))
        if chance.random() < 0.02:
            self.now += timedelta(hours=chance.choice([-3, 5, 30]))
        if chance.random() < 0.1:
            self.model = chance.choice(MODELS)
        if chance.random() < 0.05:
            self.mode = chance.choice(["API_KEY", "SUBSCRIPTION", None, ""])
        self.serial += 1
        return {"pi-coding": self._pi, "opencode": self._opencode, "claude": self._claude}[self.source]()

    def _pi(self) -> list[UsageEvent]:
        chance = self.chance
        session = f"{chance.choice(['x', 'y'])}_{chance.choice(UUIDS)}" if chance.random() < 0.95 else "nameless"
        return [self._event(session, event_id=chance.choice([f"e{self.serial}", "e1", None, ""]))]

    def _opencode(self) -> list[UsageEvent]:
        chance = self.chance
        session = chance.choice(["one", "two", "three"])
        if self.finished and chance.random() < 0.3:
            # A fork copies what its parent has finished, while that goes on.
            copied = chance.choice(self.finished)
            return [self._event(chance.choice(["fork", "other fork"]), message_id=f"f{self.serial}",
                                cost=copied.cost, tokens=copied.tokens, model=copied.model)]
        message = f"m{self.serial}" if chance.random() < 0.8 else f"m{chance.randrange(1, self.serial + 1)}"
        last = self._event(session, message_id=message)
        zeros = self._event(session, message_id=message, cost=Cost(0.0), tokens=Tokens(0, 0, 0, 0))
        self.finished.append(last)
        later = UsageEvent(**{**{name: getattr(last, name) for name in UsageEvent.__struct_fields__},
                              "timestamp": last.timestamp + timedelta(seconds=chance.choice([0, 1, 9]))})
        return chance.choice([[zeros, last, later], [zeros, last, later], [last], [zeros], [last, zeros]])

    def _claude(self) -> list[UsageEvent]:
        chance = self.chance
        if chance.random() < 0.6:
            self.total += chance.randrange(100) / 1000
        if chance.random() < 0.05:
            self.total = chance.choice([0.0, self.total / 2, self.total + 5])
        limits = {"five_hour": {"used_percentage": 1}} if chance.random() < 0.05 else None
        return [self._event(
            chance.choice(["c1", "c1", "c1", "c2"]), event_id=f"e{self.serial}" if chance.random() < 0.7 else None,
            cost=None if chance.random() < 0.03 else Cost(self.total), tokens=None, rate_limits=limits)]

    def _event(self, session: str, **more: Any) -> UsageEvent:
        chance = self.chance
        usd = chance.choice([0.001, 0.25, 0.0491820, 1e-9, None]) if chance.random() < 0.3 else chance.random()
        cost = None if chance.random() < 0.03 else Cost(usd)
        counts = [chance.choice([0, 3, 70_000, None]) if chance.random() < 0.1 else chance.randrange(9000)
                  for _ in range(4)]
        tokens = None if chance.random() < 0.03 else Tokens(*counts)
        return UsageEvent(**{
            "timestamp": self.now, "session_id": session, "cost": cost, "tokens": tokens, "model": self.model,
            "cost_mode": self.mode, **more})

    def records(self) -> list[SessionRecord]:
        """What a session file holds: messages that the log has too, and others; perhaps those of its parent."""
        chance, own = self.chance, self.chance.choice(UUIDS)
        made: list[SessionRecord] = [SessionHeader(
            session=own, created=int((self.now - timedelta(minutes=chance.choice([0, 1]))).timestamp() * 1000),
            parent=chance.choice(["", "", UUIDS[0], "gone"]))]
        for event in chance.sample(self.written, min(len(self.written), 12)):
            started = round(event.timestamp.timestamp() * 1000) + chance.choice([0, 0, 0, 1])
            made.append(SessionMessage(
                entry=f"{chance.randrange(99)}", started=started, recorded=started + 500, provider="p", model="a",
                cost=chance.choice([None, 5, 700]), tokens=chance.choice([None, (1, 2, 3, 4)])))
            if chance.random() < 0.1:
                made.append(SessionCompaction(entry=f"c{chance.randrange(5)}", recorded=started))
        return made


@pytest.mark.parametrize("source", ["pi-coding", "opencode", "claude"])
@pytest.mark.parametrize("seed", range(40))
def test_in_runs_as_one_by_one(source: str, seed: int) -> None:
    """The same deltas at every commit, the same rejects, the same memory, in every order of odd and usual events."""
    chance = random.Random(f"{source}/{seed}")
    cutoff = (START + timedelta(seconds=chance.choice([-1, 100, 250.5]))).timestamp()
    world, ledgers = World(chance, source), Ledgers(cutoff)
    files = [SourceFile("usage", "r", Path(name), f"a/{source}", source, "a") for name in ("live", "live", "rotated")]
    for _ in range(chance.randrange(3, 12)):
        file, events, replay = chance.choice(files), world.events(), chance.random() < 0.1
        ledgers.each(lambda ledger: ledger.apply_usage(file, list(events), replay=replay))  # noqa: B023  called at once
        if source == "pi-coding" and chance.random() < 0.3:
            records = world.records()
            session = SourceFile("sessions", "r", Path("s"), "s")
            ledgers.each(lambda ledger: ledger.apply_session(
                session, "pi-coding", SessionMeta(), records, fallback="s"))  # noqa: B023  called at once
        if chance.random() < 0.7:
            ledgers.commit((START + timedelta(hours=chance.choice([0, 7, 40]))).timestamp())
    ledgers.commit((START + timedelta(hours=50)).timestamp())
    in_runs, one_by_one = ledgers.remembered()
    assert in_runs == one_by_one


@pytest.mark.parametrize("in_runs", [True, False])
@pytest.mark.parametrize("source", ["pi-coding", "opencode"])
@pytest.mark.parametrize("seed", range(20))
def test_what_a_session_puts_away_it_knows_all_the_same(source: str, seed: int, *, in_runs: bool) -> None:
    """With six messages at hand as with two thousand, unless the older ones may be forgotten."""
    chance = random.Random(f"away/{source}/{seed}")
    world = World(chance, source)
    ledgers = Ledgers(START.timestamp(), (Book, Book) if in_runs else (OneByOne, OneByOne))
    ledgers.many = [2000, 6]
    file = SourceFile("usage", "r", Path("live"), f"a/{source}", source, "a")
    for _ in range(8):
        events = world.events()
        ledgers.each(lambda ledger: ledger.apply_usage(file, list(events), replay=False))  # noqa: B023  called at once
        if source == "pi-coding" and chance.random() < 0.3:
            records = world.records()
            session = SourceFile("sessions", "r", Path("s"), "s")
            ledgers.each(lambda ledger: ledger.apply_session(
                session, "pi-coding", SessionMeta(), records, fallback="s"))  # noqa: B023  called at once
        ledgers.commit(START.timestamp(), complete=False)
    memory = ledgers.pair[1][1]
    assert memory.archive
    assert all(accounts_module._decoder.decode(saved.blob).size() <= 7 + 20_000 * key.startswith("orphans")
               for key, saved in memory.saved.items())


def test_a_fork_that_is_copied_while_its_parent_goes_on_is_known_by_what_came_before() -> None:
    """Although the fork was seen first of what is counted together, and its parent's events wait for one another."""
    ledgers = Ledgers(0)
    file = SourceFile("usage", "r", Path("x"), "a/opencode", "opencode", "a")

    def event(session: str, message: str, second: int, usd: float) -> UsageEvent:
        count = round(usd * 100)
        return UsageEvent(
            timestamp=START + timedelta(seconds=second), session_id=session, message_id=message, cost=Cost(usd),
            tokens=Tokens(count, count, 0, 0), model="p/a", cost_mode="API_KEY")

    for events in (
        [event("parent", "a1", 1, 0), event("parent", "a1", 2, 0.5)],
        [event("fork", "f1", 5, 0.5), event("parent", "a2", 6, 0), event("parent", "a2", 7, 1),
         event("fork", "f2", 8, 1)],
    ):
        ledgers.each(lambda ledger: ledger.apply_usage(file, list(events), replay=False))  # noqa: B023  called at once
        ledgers.commit(START.timestamp())
    assert ledgers.pair[0][0].rejected["r", "usage", "copied"] == 2


def test_the_end_of_a_second_is_the_first_millisecond_of_the_next() -> None:
    """What began then is one message by its identity, told of twice."""
    ledgers = Ledgers(0)
    file = SourceFile("usage", "r", Path("x"), "a/pi-coding", "pi-coding", "a")
    told = [
        UsageEvent(
            timestamp=START + timedelta(microseconds=at), session_id=f"x_{UUIDS[0]}", event_id="e", cost=Cost(0.5),
            tokens=Tokens(1, 2, 3, 4), model="p/a", cost_mode="API_KEY")
        for at in (999_600, 1_000_000)
    ]
    ledgers.each(lambda ledger: ledger.apply_usage(file, told, replay=False))
    ledgers.commit(START.timestamp())
    assert [len(memory) for memory in ledgers.remembered()] == [1, 1]
    assert ledgers.remembered()[0] == ledgers.remembered()[1]


def test_most_events_of_a_usual_log_are_counted_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way around the rules is taken: without it, this would only be slow."""
    alone = 0
    for rules, name in ((SessionRules, "apply_event"), (ProcessRules, "_read")):
        real = getattr(rules, name)

        def counting(*given: Any, real: Any = real) -> Any:
            nonlocal alone
            alone += 1
            return real(*given)

        monkeypatch.setattr(rules, name, counting)
    ledger = Ledger(Memory(), _estimate, Book(max_series=100, cutoff=0))
    for source in ("pi-coding", "opencode", "claude"):
        file = SourceFile("usage", "r", Path("x"), f"a/{source}", source, "a")
        events = [
            UsageEvent(
                timestamp=START + timedelta(seconds=second), session_id=f"x_{UUIDS[0]}", event_id=f"e{second}",
                message_id=f"m{second // 3}", cost=Cost(second / 1000), tokens=Tokens(1, 2, 3, second // 3),
                model="p/m", cost_mode="API_KEY")
            for second in range(300)
        ]
        ledger.apply_usage(file, events, replay=False)
    assert alone <= 6
