"""Takes finished turns, runs and messages, gives spans to the outbox and observations to the metrics.

The one place that knows the names of attributes. What is not listed here does not leave: no field of a session that
holds text written by a person, a model or a tool is among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from coding_agent_exporter.model import PICO
from coding_agent_exporter.spanmodel import Span, SpanEvent, Value
from coding_agent_exporter.turnmodel import (
    Finished,
    FinishedMessage,
    FinishedRun,
    FinishedTurn,
    chat_span,
    tool_span,
    trace_id,
    turn_span,
)

if TYPE_CHECKING:
    from coding_agent_exporter.spanmodel import SpanLink
    from coding_agent_exporter.turnmodel import Tokens

# GenAI semantic conventions; the names in the Python package are deprecated since these moved.
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
MODEL = "gen_ai.request.model"
CONVERSATION = "gen_ai.conversation.id"
AGENT = "gen_ai.agent.name"
RESPONSE = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TOOL = "gen_ai.tool.name"
TOOL_CALL = "gen_ai.tool.call.id"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHE_READ = "gen_ai.usage.cache_read.input_tokens"
CACHE_CREATION = "gen_ai.usage.cache_creation.input_tokens"
ERROR = "error.type"
# Ours.
COST = "coding_agent.cost.usd"
COST_MODE = "coding_agent.cost.mode"
TURN_INDEX = "coding_agent.turn.index"
PARENT_CONVERSATION = "coding_agent.parent_conversation.id"
COMPACTION = "coding_agent.compaction"

ALLOWED = frozenset({
    OPERATION, PROVIDER, MODEL, CONVERSATION, AGENT, RESPONSE, FINISH_REASONS, TOOL, TOOL_CALL, INPUT_TOKENS,
    OUTPUT_TOKENS, CACHE_READ, CACHE_CREATION, ERROR, COST, COST_MODE, TURN_INDEX, PARENT_CONVERSATION,
})
"""Every attribute a span can have."""

MAX_TEXT = 200
MAX_INT = 2**63 - 1
NS = 1_000_000
"""Nanoseconds in a millisecond."""

_AGENTS = {"pi-coding": "pi"}


@dataclass(frozen=True, slots=True)
class Observation:
    """Something that a histogram or counter takes, with the span that shows it.

    | kind | labels | seconds |
    |---|---|---|
    | `turn` | provider, model, stop_reason | of the whole turn |
    | `tool` | tool, outcome (`ok`, `error`, `unknown`) | of the execution |
    | `call` | provider, model, error (empty: none) | of the model call |
    | `first_token` | provider, model | from the call's start to its first token |
    """

    kind: Literal["turn", "tool", "call", "first_token"]
    labels: tuple[str, ...]
    seconds: float
    trace: str
    span: str


def spans(finished: Finished, *, source: str, mode: str = "api_key") -> list[Span]:
    """The spans of what has finished: a turn's with its call and tools; a run's or a message's alone.

    `source` as in the metrics (`pi-coding`, `omp`, ...). `mode`, api_key or subscription, is what is known of the
    session's; session files do not tell.
    """
    if isinstance(finished, FinishedTurn):
        return _turn(finished, mode)
    if isinstance(finished, FinishedRun):
        return [_run(finished, source, mode)]
    return [_message(finished)]


def observations(finished: Finished) -> list[Observation]:
    """What metrics take from it. Only turns have any: a message's duration is not known well enough."""
    if not isinstance(finished, FinishedTurn):
        return []
    call, trace = finished.call, finished.trace
    chat = chat_span(finished.session, call.entry)
    provider, model = _cut(call.provider) or "unknown", _cut(call.model) or "unknown"
    failure = _call_error(finished)
    found = [
        Observation("turn", (provider, model, call.stop), _seconds(finished.start, finished.end), trace,
                    turn_span(finished.session, call.entry)),
        Observation("call", (provider, model, failure), _seconds(call.started, call.ended), trace, chat),
    ]
    if call.first_token is not None:
        found.append(Observation("first_token", (provider, model), call.first_token / 1000, trace, chat))
    for index, tool in enumerate(finished.tools):
        span = tool_span(finished.session, call.entry, index, tool.call)
        labels = (_cut(tool.name) or "unknown", tool.outcome)
        found.append(Observation("tool", labels, _seconds(tool.start, tool.end), trace, span))
    return found


def _turn(turn: FinishedTurn, mode: str) -> list[Span]:
    call, session = turn.call, turn.session
    own = turn_span(session, call.entry)
    model = _model(call.provider, call.model)
    common: dict[str, Value] = {CONVERSATION: _cut(session)}
    usage = _usage(call.tokens, call.cost, mode)
    failure = _call_error(turn)
    chat: dict[str, Value] = {OPERATION: "chat", **common, **model, **usage, FINISH_REASONS: [call.stop]}
    if call.response:
        chat[RESPONSE] = _cut(call.response)
    made = [
        _span(turn.trace, own, turn.parent, "turn", turn.start, turn.end,
              {**common, **model, **usage, TURN_INDEX: turn.index}, turn.error),
        _span(turn.trace, chat_span(session, call.entry), own, _name("chat", call.model), call.started, call.ended,
              chat, failure, kind="client"),
    ]
    for index, tool in enumerate(turn.tools):
        attributes: dict[str, Value] = {OPERATION: "execute_tool", **common}
        if tool.name:
            attributes[TOOL] = _cut(tool.name)
        if tool.call:
            attributes[TOOL_CALL] = _cut(tool.call)
        error = {"ok": "", "error": "tool_error"}.get(tool.outcome, "interrupted")
        made.append(_span(turn.trace, tool_span(session, call.entry, index, tool.call), own,
                          _name("execute_tool", tool.name), tool.start, tool.end, attributes, error))
    return made


def _run(run: FinishedRun, source: str, mode: str) -> Span:
    agent = _cut(_AGENTS.get(source, source))
    attributes: dict[str, Value] = {
        OPERATION: "invoke_agent", AGENT: agent, CONVERSATION: _cut(run.session), **_model(run.provider, run.model),
        **_usage(run.tokens, run.cost, mode),
    }
    if run.origin:
        attributes[PARENT_CONVERSATION] = _cut(run.origin)
    events = [SpanEvent(COMPACTION, _ns(at)) for at in run.compactions]
    return _span(run.trace, run.span, run.parent, _name("invoke_agent", agent), run.start, run.end, attributes,
                 run.error, events=events, links=run.links)


def _message(message: FinishedMessage) -> Span:
    attributes: dict[str, Value] = {
        OPERATION: "chat", CONVERSATION: _cut(message.session), **_model(message.provider, message.model),
        **_usage(message.tokens, message.cost, message.mode),
    }
    return _span(trace_id(message.session, message.key), chat_span(message.session, message.key), "",
                 _name("chat", message.model), message.start, message.end, attributes, "", kind="client")


def _span(
    trace: str, span: str, parent: str, name: str, start: int, end: int, attributes: dict[str, Value], error: str,
    *, kind: Literal["internal", "client"] = "internal", events: list[SpanEvent] | None = None,
    links: list[SpanLink] | None = None,
) -> Span:
    if error:
        attributes[ERROR] = error
    return Span(trace=trace, span=span, parent=parent, name=name, kind=kind, start=_ns(start),
                end=_ns(end), attributes=attributes, error=error, events=events or [], links=links or [])


def _ns(at: int) -> int:
    """Epoch nanoseconds; a time that 63 bits cannot hold (it came from a file) is the last one they can."""
    return min(at * NS, MAX_INT)


def _call_error(turn: FinishedTurn) -> str:
    return turn.error if turn.error != "interrupted" else ""


def _usage(tokens: Tokens | None, cost: int | None, mode: str) -> dict[str, Value]:
    """Input tokens as the conventions count them: with what was read from, and written to, the cache."""
    found: dict[str, Value] = {}
    if tokens is not None:
        read_in, out, read, created = tokens
        found = {INPUT_TOKENS: read_in + read + created, OUTPUT_TOKENS: out, CACHE_READ: read, CACHE_CREATION: created}
    if cost is not None:
        found[COST] = cost / PICO
        found[COST_MODE] = mode
    return found


def _model(provider: str, model: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    if provider:
        found[PROVIDER] = _cut(provider)
    if model:
        found[MODEL] = _cut(model)
    return found


def _name(operation: str, target: str) -> str:
    return f"{operation} {_cut(target)}" if target else operation


def _seconds(start: int, end: int) -> float:
    return max(0, end - start) / 1000


def _cut(text: str) -> str:
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()
