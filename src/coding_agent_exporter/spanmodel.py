"""Takes nothing, gives spans, outbox and export the one span type they exchange."""

from __future__ import annotations

from typing import Literal

import msgspec

Value = str | int | float | bool | list[str]


class SpanEvent(msgspec.Struct, frozen=True, array_like=True):
    """Something at one moment of a span; `at` is epoch nanoseconds."""

    name: str
    at: int
    attributes: dict[str, Value] = {}


class SpanLink(msgspec.Struct, frozen=True, array_like=True):
    """A related span. Ids are in hex: 32 and 16 digits."""

    trace: str
    span: str


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One finished span. Ids are in hex (32 and 16 digits; `parent` is empty for a root), times epoch nanoseconds.

    `error`: empty, or a short code for why it failed (never a message: that could be content).
    """

    trace: str
    span: str
    parent: str
    name: str
    kind: Literal["internal", "client"]
    start: int
    end: int
    attributes: dict[str, Value] = {}
    error: str = ""
    events: list[SpanEvent] = []
    links: list[SpanLink] = []
