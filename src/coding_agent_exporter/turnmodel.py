"""Takes nothing, gives decoding, turns, messages and spans the records and results that they exchange, and their ids.

All times are epoch milliseconds. No type here has a field that could hold content.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from coding_agent_exporter.spanmodel import SpanLink

Tokens = tuple[int, int, int, int]
"""input, output, cache read, cache creation; they do not overlap."""


class Header(msgspec.Struct, frozen=True, gc=False):
    """First record of a session file. `created` is 0 where the file does not say."""

    session: str
    created: int
    parent: str = ""


class Prompt(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What can make an agent run: a user's message, or (`user` false) one that the agent or an extension put in."""

    entry: str
    parent: str
    recorded: int
    sent: int
    user: bool = True


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One model call. `tools`: id and name of each tool call it asks for, in order.

    `cost` is in pico-USD. `stop` is one of `STOPS`. `first_token` is in milliseconds since `started`.
    """

    entry: str
    parent: str
    recorded: int
    started: int
    ended: int
    provider: str
    model: str
    stop: str
    failed: bool = False
    response: str = ""
    cost: int | None = None
    tokens: Tokens | None = None
    tools: list[tuple[str, str]] = []
    first_token: float | None = None


class ToolStart(msgspec.Struct, frozen=True, gc=False):
    """A tool execution began (oh-my-pi only)."""

    entry: str
    parent: str
    recorded: int
    call: str
    started: int


class ToolResult(msgspec.Struct, frozen=True, gc=False):
    """A tool call's result."""

    entry: str
    parent: str
    recorded: int
    call: str
    ended: int
    failed: bool


class Compaction(msgspec.Struct, frozen=True, gc=False):
    """The context was compacted."""

    entry: str
    parent: str
    recorded: int


class Exit(msgspec.Struct, frozen=True, gc=False):
    """The agent's process left the session (oh-my-pi only)."""

    entry: str
    parent: str
    recorded: int


class Other(msgspec.Struct, frozen=True, gc=False):
    """Any other entry: only its place in the tree matters."""

    entry: str
    parent: str
    recorded: int


Entry = Prompt | Call | ToolStart | ToolResult | Compaction | Exit | Other
Record = Header | Entry

STOPS = frozenset({"stop", "length", "toolUse", "error", "aborted"})
"""Why a model call ended, as pi says it. What is not among them is "other": the field is not trusted to hold a code."""


class FinishedTool(msgspec.Struct, frozen=True):
    """One tool execution. `outcome` is `ok`, `error`, or `unknown`: no result was recorded."""

    call: str
    name: str
    start: int
    end: int
    outcome: str


class FinishedTurn(msgspec.Struct, frozen=True):
    """One model call with its tool executions. `trace` and `parent` (its run's span) are hex ids.

    `error`: empty, or `error`, `aborted` (the call), `interrupted` (tools without a result).
    """

    session: str
    trace: str
    parent: str
    index: int
    start: int
    end: int
    call: Call
    tools: list[FinishedTool]
    error: str = ""


class FinishedRun(msgspec.Struct, frozen=True):
    """Everything one prompt set off. `cost` and `tokens` are sums over its turns; None when no turn says.

    `provider` and `model` are empty where the turns used several. `origin` is the session this one was forked from,
    or started by. `compactions` are times.
    """

    session: str
    trace: str
    span: str
    parent: str
    start: int
    end: int
    turns: int
    provider: str
    model: str
    cost: int | None
    tokens: Tokens | None
    error: str = ""
    compactions: list[int] = []
    links: list[SpanLink] = []
    origin: str = ""


class FinishedMessage(msgspec.Struct, frozen=True):
    """One message of a usage log. `key` names it within its session."""

    session: str
    key: str
    start: int
    end: int
    provider: str
    model: str
    mode: str
    cost: int | None
    tokens: Tokens | None


Finished = FinishedTurn | FinishedRun | FinishedMessage


def trace_id(session: str, key: str) -> str:
    """The trace of a prompt, by its session's uuid and its entry id (of a message of a usage log: by its key)."""
    return _digest(16, session, key)


def run_span(session: str, prompt: str) -> str:
    """The span of the run that a prompt started."""
    return _digest(8, session, prompt, "run")


def turn_span(session: str, entry: str) -> str:
    """The span of the turn of a model call."""
    return _digest(8, session, entry, "turn")


def chat_span(session: str, entry: str) -> str:
    """The span of a model call."""
    return _digest(8, session, entry, "chat")


def tool_span(session: str, entry: str, index: int, call: str) -> str:
    """The span of a tool call. Some providers number calls anew in every reply: its place belongs to its identity."""
    return _digest(8, session, entry, f"tool {index}", call)


def _digest(size: int, *parts: str) -> str:
    # "surrogatepass": ids come from files; whatever they hold must give an id, not an error.
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return blake2b(text, digest_size=size, person=b"agent-spans").hexdigest()
