"""The accounting rules one by one: identity, copies, corrections, the three strategies, and what may be forgotten."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from coding_agent_exporter.decode import session as session_files
from coding_agent_exporter.decode import usage as usage_logs
from coding_agent_exporter.ledger import Archived, Book, Changes, Ledger, Saved, SessionMeta
from coding_agent_exporter.ledger import accounts as accounts_module
from coding_agent_exporter.model import PICO, SourceFile

if TYPE_CHECKING:
    pass

NOW = 1_795_300_000.0
SESSION = "2026-11-21T01-39-47-559Z_01a1fbc2-74e7-70f3-8236-1cf90229f35d"
UUID = "01a1fbc2-74e7-70f3-8236-1cf90229f35d"


class Memory:
    """A state file in memory."""

    def __init__(self) -> None:
        self.saved: dict[str, Saved] = {}
        self.figures: set[int] = set()
        self.archive: dict[tuple[str, int | str], Archived] = {}

    def commit(self, changes: Changes) -> None:
        for account, before in changes.expired.items():
            for one in [one for one in self.archive.values() if one.account == account and one.second <= before]:
                del self.archive[one.account, one.name]
        self.archive |= {(one.account, one.name): one for one in changes.archive}
        self.saved.update(changes.accounts)
        self.figures |= changes.figures

    def archived(self, account: str, name: int | str) -> bytes | None:
        found = self.archive.get((account, name))
        return None if found is None else found.blob

    def account(self, key: str) -> bytes | None:
        return self.saved[key].blob if key in self.saved else None

    def has_figures(self, digest: int) -> bool:
        return digest in self.figures

    def quiet(self, kind: str, before: int, limit: int) -> list[str]:
        found = [key for key, saved in self.saved.items() if not saved.settled and saved.touched < before]
        return [key for key in found if key.startswith(f"{kind}\n")][:limit]


class Bench:
    """A ledger with a memory, fed with lines. Prices: 1 USD a token for models called `priced`."""

    def __init__(self, *, agent_label: bool = False, max_series: int = 100) -> None:
        self.memory = Memory()
        self.totals: dict[tuple[str, tuple[str, ...]], int] = {}
        self._labels: list[tuple[str, ...]] = []
        self._options = (agent_label, max_series)
        self.restart()

    def restart(self) -> None:
        agent_label, max_series = self._options
        self.book = Book(max_series=max_series, cutoff=0, keys=self._labels)
        self.ledger = Ledger(self.memory, self._estimate, self.book, agent_label=agent_label)

    @staticmethod
    def _estimate(_: str, model: str, tokens: tuple[int, int, int, int], __: datetime) -> int | None:
        return sum(tokens) * PICO if model == "priced" else None

    def usage(self, source: str, *events: dict[str, Any], agent: str = "a1", replay: bool = False) -> bool:
        file = SourceFile("usage", "r", Path("x"), f"{agent}/{source}", source, agent)
        decoded, rejected = usage_logs.decode(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
        assert not rejected
        return self.ledger.apply_usage(file, decoded, replay=replay)

    def session(self, *entries: dict[str, Any], name: str = "s") -> None:
        file = SourceFile("sessions", "files", Path(name), name)
        records, rejected, _ = session_files.decode(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
        assert not rejected
        self.ledger.apply_session(file, "pi-coding", SessionMeta(), records, fallback=name)

    def commit(self, now: float = NOW, *, complete: bool = True) -> None:
        changes = self.ledger.flush(complete=complete, now=now)
        for key, delta in changes.deltas.items():
            self.totals[key] = self.totals.get(key, 0) + delta.amount
        self.memory.commit(changes)
        self._labels += [labels for _, labels in changes.labels]
        self.ledger.trim()

    def usd(self, **labels: str) -> float:
        self.commit()
        names = ("root", "source", "provider", "model", "cost_mode", "provenance")
        wanted = labels.items()
        return sum(
            amount / PICO for (family, values), amount in self.totals.items()
            if family == "coding_agent_cost_usd_total" and wanted <= dict(zip(names, values, strict=True)).items()
        )

    def count(self, family: str) -> int:
        self.commit()
        return sum(amount for (name, _), amount in self.totals.items() if name == f"coding_agent_{family}_total")

    def rejected(self, reason: str) -> int:
        return sum(count for (_, _, why), count in self.ledger.rejected.items() if why == reason)


def at(seconds: float) -> str:
    return datetime.fromtimestamp(NOW - 86_400 * 30 + seconds, UTC).isoformat().replace("+00:00", "Z")


def event(seconds: float, usd: float | None = None, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "cost_snapshot", "timestamp": at(seconds), "session_id": "s1", "model": "p/m"}
    if usd is not None:
        made["cost"] = {"total_cost_usd": usd}
    return {**made, **more}


def tokens(count: int) -> dict[str, int]:
    return {"input": count, "output": 0, "cache_read": 0, "cache_creation": 0}


def entry(name: str, seconds: float, usd: float, **more: Any) -> dict[str, Any]:
    ms = round((NOW - 86_400 * 30 + seconds) * 1000)
    usage = {"input": 1, "output": 1, "cacheRead": 0, "cacheWrite": 0, "cost": {"total": usd}}
    message = {"role": "assistant", "provider": "p", "model": "m", "usage": usage, "timestamp": ms, **more}
    return {"type": "message", "id": name, "parentId": None, "timestamp": at(seconds + 1), "message": message}


def header(session: str, seconds: float, parent: str = "") -> dict[str, Any]:
    made = {"type": "session", "version": 3, "id": session, "timestamp": at(seconds)}
    return {**made, "parentSession": f"/home/dev/x_{parent}.jsonl"} if parent else made


# -- messages


def test_a_message_counts_with_its_freshest_event() -> None:
    """Streaming fires it again and again; a later line wins within the same second, an older one never."""
    bench = Bench()
    bench.usage("opencode", event(1, 0, message_id="m"), event(3.9, 0.5, message_id="m"))
    bench.usage("opencode", event(3.1, 0.7, message_id="m"), event(2.9, 9, message_id="m"))
    assert bench.usd() == pytest.approx(0.7)
    assert bench.count("messages") == 1


def test_a_correction_downwards_is_kept_exactly() -> None:
    """What is shown never falls; what is counted follows the log."""
    bench = Bench()
    bench.usage("opencode", event(1, 0, message_id="m"), event(2, 5, message_id="m"))
    assert bench.usd() == 5
    bench.usage("opencode", event(3, 2, message_id="m"))
    assert bench.usd() == 2


def test_an_event_without_any_identity_is_rejected() -> None:
    """It could not be told from its own replay."""
    bench = Bench()
    bench.usage("opencode", event(1, 1))
    assert bench.usd() == 0
    assert bench.rejected("no_identity") == 1


def test_the_same_event_id_in_two_agents_logs_is_two_messages() -> None:
    """Ids of events are unique only within one log."""
    bench = Bench()
    for agent in ("a1", "a2"):
        bench.usage("opencode", event(1, 1, event_id="evt-7"), agent=agent)
    assert bench.usd() == 2


def test_pi_numbers_its_events_anew_after_a_reset() -> None:
    """The same number at another time is another message; at the same time it is a replay."""
    bench = Bench()
    bench.usage("pi-coding", event(1, 1, event_id="evt-pi-usage-0"), event(9, 2, event_id="evt-pi-usage-0"))
    bench.usage("pi-coding", event(1, 1, event_id="evt-pi-usage-0"), replay=True)
    assert bench.usd() == 3


def test_a_message_without_cost_is_estimated_or_unpriced_never_free() -> None:
    """Estimates carry their provenance."""
    bench = Bench()
    bench.usage(
        "opencode",
        event(1, message_id="a", tokens=tokens(3), model="p/priced"),
        event(2, message_id="b", tokens=tokens(5), model="p/nobody-knows"),
    )
    assert bench.usd(provenance="estimated") == 3
    assert bench.usd() == 3
    assert bench.count("unpriced_tokens") == 5
    assert bench.count("tokens") == 8


def test_the_hint_of_the_writer_beats_rate_limits() -> None:
    """Subscription money is imputed and stands apart."""
    bench = Bench()
    limits = {"five_hour": {"used_percentage": 1.0}}
    bench.usage("opencode", event(1, 1, message_id="a", cost_mode="API_KEY", rate_limits=limits))
    bench.usage("opencode", event(1, 2, message_id="b", session_id="s2", rate_limits=limits))
    bench.usage("opencode", event(1, 4, message_id="c", session_id="s3"))
    assert (bench.usd(cost_mode="api_key"), bench.usd(cost_mode="subscription")) == (5, 2)


# -- forks


def test_a_fork_of_a_settled_session_is_still_known() -> None:
    """The messages were forgotten long ago; their figures were not."""
    bench = Bench()
    for n in range(3):
        final = event(n + 0.5, n + 1, message_id=f"m{n}", tokens=tokens(n + 1))
        bench.usage("opencode", event(n, 0, message_id=f"m{n}"), final)
    bench.commit(NOW)
    bench.commit(NOW + 7 * 3600)
    assert bench.memory.saved["session\nopencode\ns1"].settled
    bench.restart()
    copies = [event(9000 + n, n + 1, message_id=f"c{n}", session_id="fork", tokens=tokens(n + 1)) for n in range(3)]
    bench.usage("opencode", *copies)
    live = {"message_id": "new", "session_id": "fork"}
    bench.usage("opencode", event(9100, 0, **live), event(9101, 10, **live))
    assert bench.usd() == 16
    assert bench.rejected("copied") == 3


def test_a_live_message_that_happens_to_cost_the_same_is_no_copy() -> None:
    """Copies stand at the start of a session and come at once; this one grew from zero."""
    bench = Bench()
    bench.usage("opencode", event(1, 0, message_id="a"), event(2, 1, message_id="a", tokens=tokens(7)))
    same = {"message_id": "b", "session_id": "s2", "tokens": tokens(7)}
    bench.usage("opencode", event(3, 0, message_id="b", session_id="s2", tokens=tokens(0)), event(4, 1, **same))
    bench.usage("opencode", event(5, 1, message_id="c", session_id="s2", tokens=tokens(7)))
    assert bench.usd() == 3


def test_a_fork_of_a_session_file_counts_once_in_either_order_of_discovery() -> None:
    """A copy is older than the header of its file; it belongs to the parent."""
    parent = [header("P", 0), entry("e1", 1, 1), entry("e2", 2, 2)]
    fork = [header("F", 10, "P"), entry("e1", 1, 1), entry("e2", 2, 2), entry("f1", 11, 4)]
    grandchild = [header("G", 20, "F"), entry("e1", 1, 1), entry("f1", 11, 4), entry("g1", 21, 8)]
    forward = Bench()
    for name, entries in (("P", parent), ("F", fork), ("G", grandchild)):
        forward.session(*entries, name=name)
    assert forward.usd() == 15
    orphans = Bench()  # The parent's file is found last.
    for name, entries in (("F", fork), ("P", parent)):
        orphans.session(*entries, name=name)
    assert orphans.usd() == 7


def test_two_forks_of_a_session_that_is_gone_count_what_they_copied_once() -> None:
    """Spent once, in a file that nobody has any more."""
    bench = Bench()
    for fork in ("F", "G"):
        bench.session(header(fork, 10, "P"), entry("e1", 1, 1), name=fork)
    assert bench.usd() == 1


# -- forgetting


def test_a_settled_session_goes_on_where_it_was() -> None:
    """A replay of what was settled adds nothing, what is new counts, also in the second of the latest message."""
    bench = Bench()
    old = [event(n, 1, event_id=f"e{n}") for n in range(5)]
    bench.usage("pi-coding", *old)
    bench.commit(NOW)
    before = len(bench.memory.saved["session\npi\ns1"].blob)
    bench.commit(NOW + 7 * 3600)
    assert len(bench.memory.saved["session\npi\ns1"].blob) < before
    bench.restart()
    bench.usage("pi-coding", *old, event(4.5, 1, event_id="e5"), event(100, 1, event_id="e6"), replay=True)
    assert bench.usd() == 7
    assert bench.rejected("replayed") == 4


def test_what_is_touched_is_not_settled_however_old_its_events_are() -> None:
    """An old log that is being copied in slowly is as live as any other."""
    bench = Bench()
    for n in range(10):
        bench.usage("pi-coding", event(n, 1, event_id=f"e{n}"))
        bench.commit(NOW + 3600 * n)
    assert bench.usd() == 10


def test_a_very_long_session_forgets_its_past_but_counts_it_once() -> None:
    """Memory and state of a session are bounded while it lives."""
    bench = Bench()
    hours = [event(n * 60, 0.001, event_id=f"e{n}") for n in range(4000)]
    bench.usage("pi-coding", *hours)
    bench.commit()
    bench.usage("pi-coding", *hours, event(300_000, 1, event_id="last"))
    assert bench.usd() == pytest.approx(5.0)
    account = accounts_module._decoder.decode(bench.memory.saved["session\npi\ns1"].blob)
    assert account.size() < 2000


def test_accounts_leave_memory_and_come_back() -> None:
    """The cache is small, the state file is not."""
    bench = Bench()
    bench.ledger._cache_messages = 50
    for n in range(300):
        bench.usage("pi-coding", event(n, 1, event_id=f"e{n}", session_id=f"s{n % 100}"))
        bench.commit(complete=False)
    assert bench.usd() == 300
    assert len(bench.ledger._cache) < 100


# -- two inputs


def test_a_session_files_entry_and_a_logs_event_are_one_message() -> None:
    """Known by session and start of the call; whichever came first keeps its labels."""
    for order in (0, 1):
        bench = Bench()
        logged = event(1.25, 2, event_id="evt-pi-usage-0", session_id=SESSION, tokens={"input": 1, "output": 1})
        for step in (order, 1 - order):
            if step:
                bench.usage("pi-coding", logged)
            else:
                bench.session(header(UUID, 0), entry("e1", 1.25, 2), name=SESSION)
        assert bench.usd() == 2
        assert bench.count("messages") == 1
        assert bench.count("sessions") == 1


# -- running totals


def test_a_process_counter_runs_across_sessions() -> None:
    """`/clear` changes the session id, not the total."""
    bench = Bench()
    bench.usage("claude", event(1, 1), event(2, 3, session_id="s2"), event(3, 3), event(4, 4, session_id="s3"))
    assert bench.usd() == 4
    assert bench.count("sessions") == 3


def test_a_lower_reading_is_a_new_process_unless_it_was_seen_before() -> None:
    """Then the harness restored a total that was counted when it was spent."""
    bench = Bench()
    bench.usage("claude", event(1, 5), event(2, 7), event(3, 2), event(4, 4), event(5, 2), event(6, 3))
    assert bench.usd() == 5 + 2 + 2 + 2 + 0 + 1


def test_rate_limits_make_the_whole_process_a_subscription() -> None:
    """Also what it had spent before they were seen, and nothing of the process before or after."""
    bench = Bench()
    limits = {"five_hour": {"used_percentage": 45, "resets_at": 1795230000, "window_seconds": 18000}}
    bench.usage("claude", event(1, 9), event(2, 1), event(3, 2))
    assert bench.usd(cost_mode="api_key") == 11
    bench.usage("claude", event(4, None, rate_limits=limits), event(5, 3))
    assert (bench.usd(cost_mode="api_key"), bench.usd(cost_mode="subscription")) == (9, 3)
    bench.usage("claude", event(6, 0.5))
    assert (bench.usd(cost_mode="api_key"), bench.usd(cost_mode="subscription")) == (9.5, 3)
    assert bench.ledger.limits.known["r", "claude", "five_hour"].used_percent == 45


def test_a_replayed_log_of_readings_adds_nothing() -> None:
    """From its start, in part, and with the event that follows in the very second in which it had ended."""
    bench = Bench()
    log = [event(n // 2, (n % 5) + 1, event_id=f"e{n}") for n in range(9)]
    assert bench.usage("claude", *log, replay=True) is False
    spent = bench.usd()
    bench.restart()
    assert bench.usage("claude", *log[:5], replay=True) is True
    assert bench.usage("claude", *log[5:], replay=True) is True
    assert bench.usd() == spent
    assert bench.rejected("replayed") == 9
    assert bench.usage("claude", event(4, 10, event_id="new"), replay=True) is False
    assert bench.usd() == spent + 6


def test_a_codex_session_is_its_freshest_reading_and_a_rise_belongs_to_its_model() -> None:
    """100 tokens under one model, 50 more under another; an older reading changes nothing."""
    bench = Bench()
    bench.usage("codex", event(1, tokens=tokens(100), model="p/priced"), event(3, tokens=tokens(150), model="p/free"))
    bench.usage("codex", event(2, tokens=tokens(120), model="p/free"))
    assert bench.usd(provenance="estimated") == 100
    assert bench.count("tokens") == 150
    assert bench.count("unpriced_tokens") == 50


def test_a_codex_session_that_turns_out_to_be_a_subscription_moves_as_a_whole() -> None:
    """Sums per mode stay those of the freshest reading."""
    bench = Bench()
    bench.usage("codex", event(1, tokens=tokens(10), model="p/priced"))
    bench.usage("codex", event(2, tokens=tokens(15), model="p/priced", cost_mode="SUBSCRIPTION"))
    assert (bench.usd(cost_mode="api_key"), bench.usd(cost_mode="subscription")) == (0, 15)


# -- labels


def test_models_past_the_cap_are_counted_as_other() -> None:
    """No dollar is dropped for a label."""
    bench = Bench(max_series=5)
    bench.usage("opencode", *(event(n, 1, message_id=f"m{n}", model=f"p/m{n}") for n in range(100)))
    assert bench.usd() == 100
    assert bench.usd(model="other") == 95
    assert len(bench.book.keys) == 6
    bench.restart()
    bench.usage("opencode", event(200, 1, message_id="again", model="p/m99"))
    assert bench.usd(model="other") == 96


@pytest.mark.parametrize(
    ("model", "provider", "name"),
    [
        ("anthropic/claude-opus-4-8", "anthropic", "claude-opus-4-8"),
        ("openrouter/anthropic/x", "openrouter", "anthropic/x"),
        ("gpt-5", "unknown", "gpt-5"), (None, "unknown", "unknown"), ("p/", "p", "unknown"),
        ("p/" + "x" * 5000, "p", "x" * 200),
    ],
)
def test_a_model_is_split_at_its_first_slash(model: str | None, provider: str, name: str) -> None:
    """Bounded, and never empty."""
    bench = Bench()
    bench.usage("opencode", event(1, 1, message_id="m", model=model))
    assert bench.usd(provider=provider, model=name) == 1


def test_the_agents_label_is_there_when_it_is_asked_for() -> None:
    """One series for each agent."""
    bench = Bench(agent_label=True)
    bench.usage("claude", event(1, 1), agent="a1")
    bench.usage("claude", event(1, 2), agent="a2")
    bench.commit()
    assert {labels[5] for (name, labels) in bench.totals if name == "coding_agent_cost_usd_total"} == {"a1", "a2"}


def test_what_was_spent_before_the_cutoff_is_baseline() -> None:
    """By the time of the event, also when both fall into one batch."""
    bench = Bench()
    bench.book.cutoff = NOW - 86_400 * 30 + 10
    bench.usage("opencode", event(1, 3, message_id="a"), event(20, 4, message_id="b"))
    changes = bench.ledger.flush(complete=False, now=NOW)
    (delta,) = [delta for (name, _), delta in changes.deltas.items() if name == "coding_agent_cost_usd_total"]
    assert (delta.amount, delta.baseline) == (7 * PICO, 3 * PICO)


# -- the stored format


@pytest.mark.parametrize(
    ("frozen", "size", "written"),
    [
        (bytes.fromhex("9901c3c3000a00a74150495f4b4559a17281a16d9801000102030405ff"), 2,
         bytes.fromhex("9b01c3c3000a00a74150495f4b4559a17281a16d9801000102030405ff9000")),
        (bytes.fromhex("9b01c3c200ce6b49d20000a74150495f4b4559a172809197d7ff3b9aca006b49d20000ce0016e3600203040507"), 2,
         bytes.fromhex("9b01c3c200ce6b49d20000a74150495f4b4559a172809197d7ff3b9aca006b49d20000ce0016e3600203040507")),
        (bytes.fromhex("9802c305a00094010203048100970000000102030491a165"), 2,
         bytes.fromhex("9802c305a00094010203048100970000000102030491a165")),
        (bytes.fromhex("9a0305a0c20a81000581050990a12f09"), 1,
         bytes.fromhex("9a0305a0c20a81000581050990a12f09")),
    ],
)
def test_accounts_that_were_stored_by_a_release_are_still_read(frozen: bytes, size: int, written: bytes) -> None:
    """And written back as they were, but for fields that have come behind: the literals are the format."""
    account = accounts_module._decoder.decode(frozen)
    assert account.size() == size
    assert accounts_module._encode(account) == written
