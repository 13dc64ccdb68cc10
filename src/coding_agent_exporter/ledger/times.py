"""Takes times as events have them, gives the whole numbers that the ledger keeps: exact, where a float would not be."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

FOREVER = datetime.max.replace(tzinfo=UTC)

_LAST = (FOREVER - EPOCH).total_seconds() - 1


def seconds(at: datetime) -> int:
    """The epoch second that a time is in."""
    since = at - EPOCH
    return since.days * 86400 + since.seconds


def milliseconds(at: datetime) -> int:
    """The epoch millisecond that a time is nearest to: what names a message that began then."""
    since = at - EPOCH
    return (since.days * 86400 + since.seconds) * 1000 + (since.microseconds + 500) // 1000


def moment(second: float) -> datetime:
    """The first whole second from an epoch second on, or the end of the calendar."""
    return FOREVER if second > _LAST else EPOCH + timedelta(seconds=math.ceil(second))
