"""Takes frames of pi's RPC protocol (JSON objects, one a line), gives what telemetry needs of them, without content.

The fields below are an allowlist: prompts, replies, tool arguments and results are skipped by the decoder, or stay
behind in the caller's own object. What comes out holds ids, names, numbers and flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict, cast

import msgspec

MAX_LINE = 16 << 20
"""Bytes of the longest line that is looked into: what is longer holds content, or is no frame."""

DIALOGS = ("select", "confirm", "input", "editor")
"""Methods of `extension_ui_request` that wait for an answer."""

_PASSED_OVER = frozenset({
    "message_start", "message_update", "tool_execution_start", "tool_execution_update", "tool_execution_end",
    "extension_error",
})
"""Nearly all frames. They say nothing that the frames around them do not."""

_HEAD = 128
_PASSED_OVER_HEADS = tuple(b'{"type":"%s"' % name.encode() for name in sorted(_PASSED_OVER))
_AGENT_END = b'{"type":"agent_end"'


class _Usage(TypedDict, total=False):
    input: Any
    output: Any
    cacheRead: Any
    cacheWrite: Any
    totalTokens: Any
    cost: Any


class _Message(TypedDict, total=False):
    role: Any
    provider: Any
    model: Any
    usage: _Usage | None
    stopReason: Any
    timestamp: Any
    responseId: Any


class _Model(TypedDict, total=False):
    provider: Any
    id: Any
    name: Any
    contextWindow: Any


class _Context(TypedDict, total=False):
    tokens: Any
    contextWindow: Any


class _Data(TypedDict, total=False):
    cancelled: Any
    provider: Any
    id: Any
    name: Any
    contextWindow: Any
    level: Any
    model: _Model | None
    models: list[_Model] | None
    thinkingLevel: Any
    sessionId: Any
    sessionFile: Any
    sessionName: Any
    messageCount: Any
    pendingMessageCount: Any
    contextUsage: _Context | None


class _Result(TypedDict, total=False):
    tokensBefore: Any


class Frame(TypedDict, total=False):
    """What is kept of a frame. Every member may be missing; those of type Any may be of any type."""

    type: Any
    id: Any
    command: Any
    success: Any
    method: Any
    timeout: Any
    level: Any
    name: Any
    aborted: Any
    willRetry: Any
    message: _Message | None
    data: _Data | None
    result: _Result | None
    steering: list[msgspec.Raw] | None
    followUp: list[msgspec.Raw] | None
    queued: int
    """How many messages wait, in place of `steering` and `followUp`."""


class _Bare(TypedDict, total=False):
    type: Any
    id: Any
    command: Any
    success: Any


_frame = msgspec.json.Decoder(Frame)
_bare = msgspec.json.Decoder(_Bare)


def of_line(line: bytes, *, sent: bool = False) -> Frame | None:
    """What a line holds; `sent` says that it goes to pi. None: nothing of interest, or no frame at all."""
    if sent:
        # Prompts can be large, and only these two matter.
        if b'"extension_ui_response"' not in line and b'"set_thinking_level"' not in line:
            return None
    else:
        head = line[:_HEAD]
        if head.startswith(_PASSED_OVER_HEADS):
            return None
        if head.startswith(_AGENT_END):
            return {"type": "agent_end"}
    try:
        return _interesting(_frame.decode(line))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        # A member of another shape costs the members, not the event.
        return _interesting(cast("Frame", _bare.decode(line)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def of_object(frame: object, *, sent: bool = False) -> Frame | None:
    """As `of_line`, for a frame that is decoded already, or a line as text."""
    if isinstance(frame, str):
        frame = frame.encode("utf-8", "replace")
    if isinstance(frame, bytes | bytearray | memoryview):
        return of_line(bytes(frame), sent=sent)
    if not isinstance(frame, Mapping):
        return None
    kind = frame.get("type")
    if not isinstance(kind, str) or kind in _PASSED_OVER:
        return None
    if kind == "queue_update":
        return {"type": kind, "queued": _length(frame.get("steering")) + _length(frame.get("followUp"))}
    if kind == "agent_end" or (sent and kind not in {"extension_ui_response", "set_thinking_level"}):
        return None if sent else {"type": kind}
    picked = {name: frame[name] for name in _KEPT if name in frame}
    try:
        return msgspec.convert(picked, Frame)
    except (msgspec.ValidationError, RecursionError):
        return cast("Frame", {name: picked[name] for name in _Bare.__annotations__ if name in picked})


_KEPT = tuple(name for name in Frame.__annotations__ if name not in {"steering", "followUp", "queued"})


def _length(value: object) -> int:
    return len(value) if isinstance(value, list | tuple) else 0


def _interesting(frame: Frame) -> Frame | None:
    kind = frame.get("type")
    if not isinstance(kind, str) or kind in _PASSED_OVER:
        return None
    if kind == "queue_update":
        return {"type": kind, "queued": len(frame.get("steering") or ()) + len(frame.get("followUp") or ())}
    return frame


class Lines:
    """Cuts a stream of bytes into lines at `\\n`, as they come; what is too long is left out."""

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines that end in `data`, without their ends."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            if self._skipping:
                self._skipping = False
            elif self._rest:
                self._rest += data[start:end]
                yield bytes(self._rest)
                self._rest.clear()
            else:
                yield data[start:end]
            start = end + 1
        if not self._skipping:
            self._rest += data[start:]
            if len(self._rest) > self._limit:
                self.skip()

    def skip(self) -> None:
        """Pass over everything up to the next end of a line: the bytes that follow are not those after the last."""
        self._rest = bytearray()
        self._skipping = True
