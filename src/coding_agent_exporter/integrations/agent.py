"""Takes what telemetry needs of pi's RPC frames, in order, gives the agent's state and the usage of its messages.

Pure: no clock, no files. The state is what pi-telemetry would write from inside of pi; the usage what mngr's writer
would log. Both are made from what the frames say, and only that.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coding_agent_exporter.integrations.frames import DIALOGS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coding_agent_exporter.integrations.frames import Frame

_MAX_COUNT = 2**53
_MAX_MODELS = 4096
# The year 10000: later times cannot be written as ISO 8601.
_MAX_MS = 253_402_300_800_000
# Tuples: what is looked up comes from a frame, and need not be hashable.
_FORKS = ("fork", "clone")
_UNFINISHED = ("aborted", "error")
SWITCHES = ("new_session", "switch_session", *_FORKS)
"""Commands after which the session is another one."""


@dataclass(frozen=True, slots=True)
class Usage:
    """One assistant message. `started` is the start of the model call, epoch ms; `cost` USD, None if not said."""

    started: int
    provider: str
    model: str
    cost: float | None
    input: int
    output: int
    cache_read: int
    cache_creation: int
    response: str = field(default="", compare=False)

    @property
    def total(self) -> int:
        return self.input + self.output + self.cache_read + self.cache_creation


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a frame meant. `event` names it as pi-telemetry does; empty: nothing to write.

    `usage` is new, or differs from what was known of the message.
    """

    event: str = ""
    usage: Usage | None = None


_NOTHING = Outcome()


@dataclass(slots=True)
class Agent:
    """The state of one agent process."""

    session_id: str = ""
    """What pi calls its session; empty: not known."""
    session_file: str = ""
    session_name: str = ""
    confirmed: bool = False
    """Nothing since then can have led to another session without saying so."""
    provider: str = ""
    model: str = ""
    model_name: str = ""
    thinking: str = ""
    tokens: int | None = None
    """In the context; None: not known."""
    pending: int = 0
    last_event: str = ""
    _windows: dict[tuple[str, str], int] = field(default_factory=dict)
    _running: bool = False
    _compacting: int = 0
    _told: bool = False
    _dialogs: set[str] = field(default_factory=set)
    _known: deque[Usage] = field(default_factory=lambda: deque(maxlen=8))

    @property
    def working(self) -> bool:
        """Whether the agent does something, and needs nobody for that."""
        return (self._running or self._compacting > 0 or self.pending > 0) and not self._dialogs

    @property
    def window(self) -> int | None:
        """Tokens that the model's context can hold, where the frames have said so."""
        return self._windows.get((self.provider, self.model))

    def apply(self, frame: Frame, *, sent: bool = False) -> Outcome:
        """Take the next frame; `sent` ones went to pi."""
        outcome = self._sent(frame) if sent else self._received(frame)
        if outcome.event:
            self.last_event = outcome.event
        return outcome

    def _sent(self, frame: Frame) -> Outcome:
        identity = frame.get("id")
        if isinstance(identity, str) and identity in self._dialogs:
            self._dialogs.discard(identity)
            return Outcome("extension_ui_response")
        if frame.get("type") == "set_thinking_level":
            self.thinking = _text(frame.get("level")) or self.thinking
        return _NOTHING

    def _received(self, frame: Frame) -> Outcome:
        kind = frame["type"]
        match kind:
            case "response":
                return self._response(frame) if frame.get("success") is True else _NOTHING
            case "agent_start":
                self._running, self.confirmed = True, False
            case "turn_start":
                self._running = True
            case "message_end" | "turn_end":
                return self._message(kind, frame)
            case "agent_end":
                self._running = False
                self._dialogs.clear()
            case "auto_retry_start":
                self._running = True
            case "auto_retry_end":
                if frame.get("success") is True:
                    return _NOTHING
                self._running = False
            case "compaction_start" | "auto_compaction_start":
                self._compacting += 1
                return Outcome("session_before_compact")
            case "compaction_end" | "auto_compaction_end":
                self._compacting = max(0, self._compacting - 1)
                self._running |= frame.get("willRetry") is True
                self._told = kind == "compaction_end"
                return self._compacted() if frame.get("result") is not None else Outcome("compaction_end")
            case "queue_update":
                self.pending = frame.get("queued", 0)
            case "session_info_changed":
                self.session_name = _text(frame.get("name"))
            case "thinking_level_changed":
                self.thinking = _text(frame.get("level"))
            case "extension_ui_request":
                identity = frame.get("id")
                # With a time limit pi answers itself, and says nothing about it.
                if frame.get("method") not in DIALOGS or not isinstance(identity, str) or frame.get("timeout"):
                    return _NOTHING
                self._dialogs.add(identity)
            case _:
                return _NOTHING
        return Outcome(kind)

    def _message(self, kind: str, frame: Frame) -> Outcome:
        event = kind if kind == "turn_end" else ""
        message = frame.get("message") or {}
        found = message.get("usage")
        if message.get("role") != "assistant" or found is None:
            return Outcome(event)
        self.provider, self.model = _text(message.get("provider")), _text(message.get("model"))
        costs = found.get("cost")
        cost = costs.get("total") if isinstance(costs, dict) else None
        usage = Usage(
            started=_count(message.get("timestamp"), _MAX_MS), provider=self.provider, model=self.model,
            cost=float(cost) if cost is not None and _is_number(cost) and cost >= 0 else None,
            input=_count(found.get("input")), output=_count(found.get("output")),
            cache_read=_count(found.get("cacheRead")), cache_creation=_count(found.get("cacheWrite")),
            response=_text(message.get("responseId")),
        )
        # What was cut off says nothing about the context: pi leaves it out too.
        size = _count(found.get("totalTokens")) or usage.total
        if size and message.get("stopReason") not in _UNFINISHED:
            self.tokens = size
        if usage in self._known:
            return Outcome(event)
        self._known.append(usage)
        return Outcome(kind, usage)

    def _response(self, frame: Frame) -> Outcome:
        data: Mapping[str, Any] = frame.get("data") or {}
        command = frame.get("command")
        match command:
            case "get_state" | "get_session_stats":
                return self._state(data)
            case "set_model":
                self._select(data)
            case "cycle_model":
                self._select(data.get("model") or {})
                self.thinking = _text(data.get("thinkingLevel")) or self.thinking
            case "cycle_thinking_level":
                self.thinking = _text(data.get("level")) or self.thinking
                return Outcome("thinking_level_select")
            case "get_available_models":
                for model in data.get("models") or ():
                    self._learn(model)
                return _NOTHING
            case "compact":
                # Early versions of pi tell of a compaction that was asked for in the answer only.
                told, self._told = self._told, False
                return _NOTHING if told else self._compacted()
            case _ if command in SWITCHES and data.get("cancelled") is not True:
                self._leave()
                self.tokens = 0 if command == "new_session" else None
                return Outcome("session_fork" if command in _FORKS else "session_switch")
            case _:
                return _NOTHING
        return Outcome("model_select")

    def _leave(self) -> None:
        self.session_id = self.session_file = self.session_name = ""
        self._running, self._compacting, self.pending, self.confirmed = False, 0, 0, False
        self._dialogs.clear()

    def _compacted(self) -> Outcome:
        self.tokens = None
        return Outcome("session_compact")

    def _state(self, data: Mapping[str, Any]) -> Outcome:
        before = (self.session_id, self.session_file, self.session_name, self.model, self.window, self.thinking,
                  self.tokens, self.pending)
        session = _text(data.get("sessionId"))
        if session:
            self.session_id, self.session_file, self.confirmed = session, _text(data.get("sessionFile"), 4096), True
        if "sessionName" in data or "messageCount" in data:
            self.session_name = _text(data.get("sessionName"))
        if "pendingMessageCount" in data:
            self.pending = _count(data["pendingMessageCount"])
        if data.get("messageCount") == 0:
            self.tokens = 0
        self.thinking = _text(data.get("thinkingLevel")) or self.thinking
        self._select(data.get("model") or {})
        context = data.get("contextUsage") or {}
        if context:
            self._learn({"provider": self.provider, "id": self.model, **context})
            self.tokens = _count(context["tokens"]) if _is_number(context.get("tokens")) else None
        changed = before != (self.session_id, self.session_file, self.session_name, self.model, self.window,
                             self.thinking, self.tokens, self.pending)
        # Not the name of the last event: a second reading of that, with other figures, would be a second event.
        return Outcome("get_state") if changed else _NOTHING

    def _select(self, model: Mapping[str, Any]) -> None:
        self._learn(model)
        if model.get("id"):
            self.provider, self.model = _text(model.get("provider")), _text(model.get("id"))
            self.model_name = _text(model.get("name"))

    def _learn(self, model: Mapping[str, Any]) -> None:
        window = _count(model.get("contextWindow"))
        if window and len(self._windows) < _MAX_MODELS:
            self._windows[_text(model.get("provider")), _text(model.get("id"))] = window


def _text(value: object, limit: int = 200) -> str:
    return value[:limit] if isinstance(value, str) else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any, limit: int = _MAX_COUNT) -> int:
    """A whole number that is not negative; 0 where it is none."""
    return int(value) if _is_number(value) and 0 <= value < limit else 0
