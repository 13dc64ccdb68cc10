"""Messages of usage logs: one span each, from its start to its end, as soon as it is over."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from coding_agent_exporter.decode.usage import decode
from coding_agent_exporter.messages import Messages
from coding_agent_exporter.model import PICO, Cost, Tokens, UsageEvent
from coding_agent_exporter.spans import ALLOWED, observations, spans
from coding_agent_exporter.turnmodel import FinishedMessage, trace_id
from spans_support import SPANS, T0
from support import CAPTURES

FINAL: dict[str, Any] = {"cost": Cost(0.5), "tokens": Tokens(10, 20, 30, 40)}
ZERO: dict[str, Any] = {"cost": Cost(0.0), "tokens": Tokens(0, 0, 0, 0)}


def event(at: int, model: str | None = "anthropic/claude-opus-4-8", **fields: Any) -> UsageEvent:
    """An event `at` milliseconds after `T0`."""
    return UsageEvent(datetime.fromtimestamp((T0 + at) / 1000, UTC), "session", model=model, **fields)


def now(at: int) -> float:
    return (T0 + at) / 1000


def test_a_line_of_pi_is_a_finished_call_that_ends_when_it_arrives() -> None:
    """Its timestamp is the call's start."""
    log = Messages("uuid", "pi-coding")
    (message,) = log.apply("k1", event(0, **FINAL), now(1500), first=True)
    (span,) = spans(message, source="pi-coding")
    assert (span.name, span.kind, span.parent) == ("chat claude-opus-4-8", "client", "")
    assert (span.start, span.end) == (T0 * 10**6, (T0 + 1500) * 10**6)
    assert span.trace == trace_id("uuid", "k1")
    assert span.attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.conversation.id": "uuid", "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "claude-opus-4-8", "gen_ai.usage.input_tokens": 80, "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 30, "gen_ai.usage.cache_creation.input_tokens": 40,
        "coding_agent.cost.usd": 0.5, "coding_agent.cost.mode": "api_key",
    }
    assert set(span.attributes) <= ALLOWED
    assert not log.waiting
    assert observations(message) == []


def test_a_line_that_seems_to_come_from_the_future_does_not_end_before_it_starts() -> None:
    """The clocks of the agent and of the exporter's host differ."""
    (message,) = Messages("uuid", "pi-coding").apply("k1", event(5000, **FINAL), now(0), first=True)
    assert (message.start, message.end) == (T0 + 5000, T0 + 5000)


def test_a_message_of_opencode_ends_when_its_figures_settle() -> None:
    """It starts with zeros; the second equal reading says that it is over, and the first when."""
    log = Messages("ses", "opencode")
    assert log.apply("m", event(0, **ZERO), now(0), first=True) == []
    assert log.apply("m", event(900, **FINAL), now(900), first=False) == []
    (message,) = log.apply("m", event(980, **FINAL), now(980), first=False)
    assert (message.start - T0, message.end - T0, message.cost) == (0, 900, PICO // 2)
    assert log.apply("m", event(990, **FINAL), now(990), first=False) == []
    assert log.counts == {"late": 1}


def test_a_later_message_ends_the_one_before() -> None:
    """Also one that was killed while its figures were zero: its last sign of life is its end."""
    log = Messages("ses", "opencode")
    log.apply("m1", event(0, **ZERO), now(0), first=True)
    (killed,) = log.apply("m2", event(60_000, **ZERO), now(60_000), first=True)
    assert (killed.key, killed.start - T0, killed.end - T0, killed.cost) == ("m1", 0, 0, 0)
    log.apply("m2", event(61_000, **FINAL), now(61_000), first=False)
    (done,) = log.apply("m3", event(61_100, **ZERO), now(61_100), first=True)
    assert (done.key, done.end - T0) == ("m2", 61_000)


def test_silence_ends_a_message_with_figures_but_not_a_call_that_takes_its_time() -> None:
    """A model may think for minutes before the first figures; only after an hour is it given up."""
    log = Messages("ses", "opencode", quiet_seconds=30, stuck_seconds=3600)
    log.apply("m", event(0, **ZERO), now(0), first=True)
    assert log.tick(now(600_000)) == []
    log.apply("m", event(600_500, **FINAL), now(600_500), first=False)
    assert log.tick(now(630_000)) == []
    (message,) = log.tick(now(630_500))
    assert (message.start - T0, message.end - T0) == (0, 600_500)
    log.apply("n", event(700_000, **ZERO), now(700_000), first=True)
    assert [one.key for one in log.tick(now(4_300_000))] == ["n"]


def test_the_cost_mode_is_the_writers_or_follows_from_rate_limits() -> None:
    """As the counters have it."""
    log = Messages("uuid", "pi-coding")
    said: list[dict[str, Any]] = [
        {}, {"cost_mode": "SUBSCRIPTION"}, {"rate_limits": {"five_hour": {}}},
        {"cost_mode": "API_KEY", "rate_limits": {"five_hour": {}}},
    ]
    modes = [
        log.apply(str(number), event(number, **fields), now(number), first=True)[0].mode
        for number, fields in enumerate(said)
    ]
    assert modes == ["api_key", "subscription", "subscription", "api_key"]


def test_what_a_later_event_leaves_out_stands() -> None:
    """A block that was malformed is dropped alone; the model and the figures before it are still true."""
    log = Messages("ses", "opencode")
    log.apply("m", event(0, **FINAL), now(0), first=True)
    log.apply("m", event(100, model=None), now(100), first=False)
    (message,) = log.tick(now(90_000))
    assert (message.provider, message.model, message.cost, message.tokens) == (
        "anthropic", "claude-opus-4-8", PICO // 2, (10, 20, 30, 40),
    )


def opencode(*, restart: bool) -> list[FinishedMessage]:
    """The recording through one `Messages` for each session, without the copies that the ledger would keep away."""
    logs: dict[str, Messages] = {}
    seen: set[str] = set()
    found = []
    events, _ = decode((CAPTURES / "opencode/agents/agent-oc/events/opencode/usage/events.jsonl").read_bytes())
    live: set[str] = set()
    for one in events:
        key = one.message_id or ""
        if one.session_id not in live and one.cost is not None and one.cost.total_cost_usd:
            continue
        live.add(one.session_id)
        log = logs.setdefault(one.session_id, Messages(one.session_id, "opencode"))
        if restart:
            stored = log.dump()
            log = logs[one.session_id] = Messages(one.session_id, "opencode")
            log.load(stored)
        found += log.apply(key, one, one.timestamp.timestamp(), first=key not in seen)
        seen.add(key)
    for log in logs.values():
        assert log.counts == {}
        found += log.tick(1_900_000_000)
    return found


def test_the_recording_of_opencode_against_its_model_server() -> None:
    """Every call that the server answered is one span that encloses it, and ends soon after it unless its tools take
    longer; all money is there once.
    """
    found = opencode(restart=False)
    assert len({trace_id(one.session, one.key) for one in found}) == len(found) == 46
    assert sum(one.cost or 0 for one in found) == round(0.185294525 * PICO)
    truth = [json.loads(line) for line in (SPANS / "opencode-truth.jsonl").read_text().splitlines()]
    answered = [call for call in truth if call["kind"] == "turn"]
    assert len(answered) > 30
    slow = []
    for call in answered:
        enclosing = [one for one in found if one.session == call["session"] and one.tokens
                     and one.tokens[1] == call["output"] and one.start <= call["start"] and call["end"] <= one.end]
        assert len(enclosing) == 1
        if enclosing[0].end - call["end"] > 1000:
            slow.append(call["output"])
    assert slow == [174]  # its tool was a sub-agent


def test_a_restart_between_any_two_events_changes_nothing() -> None:
    """What is open is stored."""
    assert opencode(restart=True) == opencode(restart=False)
