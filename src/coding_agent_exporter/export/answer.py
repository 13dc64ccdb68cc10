"""Takes what a collector said, gives delivery one of six things that can follow from it.

The table is OTLP's, with one difference. The specification has a client drop everything that is not answered with
429, 502, 503 or 504 (or gRPC's equals). That suits a queue in memory. Ours is on disk, so what an operator can
repair is waited for: a wrong token, a wrong path, a proxy's log-in page must not cost an hour of spans.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Kind(Enum):
    ACCEPTED = auto()
    """The collector has the spans, `rejected` of them excepted. It does not say which."""
    AGAIN = auto()
    """Temporary: no connection, no answer in time, an answer that makes no sense, an overloaded collector."""
    HOLD = auto()
    """Nothing is wrong with the spans, and nothing will change by itself: somebody has to repair a setting."""
    BROKEN = auto()
    """The collector failed over these spans. Temporary as a rule; when it lasts, one of them may be the cause."""
    REFUSED = auto()
    """Something is wrong with at least one of the spans."""
    TOO_LARGE = auto()
    """Less at a time, please."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`error` is one line for people, empty when all is well; `retry_after` the seconds that were asked for."""

    kind: Kind
    error: str = ""
    rejected: int = 0
    retry_after: float | None = None


_HTTP = {
    400: Kind.REFUSED, 422: Kind.REFUSED, 413: Kind.TOO_LARGE,
    # 408 and 425 are not on OTLP's list, but say by themselves that a repetition is welcome.
    408: Kind.AGAIN, 425: Kind.AGAIN, 429: Kind.AGAIN, 502: Kind.AGAIN, 503: Kind.AGAIN, 504: Kind.AGAIN,
}

_GRPC = {
    "CANCELLED": Kind.AGAIN, "DEADLINE_EXCEEDED": Kind.AGAIN, "ABORTED": Kind.AGAIN, "OUT_OF_RANGE": Kind.AGAIN,
    "UNAVAILABLE": Kind.AGAIN, "DATA_LOSS": Kind.AGAIN,
    "INVALID_ARGUMENT": Kind.REFUSED,
    "UNAUTHENTICATED": Kind.HOLD, "PERMISSION_DENIED": Kind.HOLD, "UNIMPLEMENTED": Kind.HOLD, "NOT_FOUND": Kind.HOLD,
}

# What gRPC's implementations say of a message beyond the receiver's limit.
_SIZE = re.compile(r"larger than max|exceeds (the )?max|too large|message size", re.IGNORECASE)
_UNREADABLE = re.compile(r"[^\x20-\x7e]+")
_LONGEST = 200


def http_kind(status: int) -> Kind:
    """What follows from an HTTP status, 2xx excepted. Redirects are not followed: they would carry the token along."""
    known = _HTTP.get(status)
    if known is not None:
        return known
    return Kind.BROKEN if status >= 500 else Kind.HOLD


def grpc_kind(code: str, details: str, *, retry_info: bool) -> Kind:
    """What follows from a gRPC status that is not OK; `code` is its name, in capitals.

    RESOURCE_EXHAUSTED says three things: come back later (RetryInfo), too large (only the text tells), or, from
    servers that leave RetryInfo out, come back later all the same.
    """
    if code == "RESOURCE_EXHAUSTED":
        return Kind.TOO_LARGE if not retry_info and _SIZE.search(details) else Kind.AGAIN
    return _GRPC.get(code, Kind.BROKEN)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None when it is missing or makes no sense.

    A date is compared with the server's own clock where it sent that, else with `now` (epoch seconds).
    """
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    until = _date(text)
    if until is None:
        return None
    sent = _date(headers.get("date", ""))
    return max(0.0, until - (now if sent is None else sent))


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def one_line(text: str | bytes) -> str:
    """The readable part of what a stranger said, short enough for a log line."""
    if isinstance(text, bytes):
        text = text[:4 * _LONGEST].decode("latin-1")
    text = _UNREADABLE.sub(" ", text).strip()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
