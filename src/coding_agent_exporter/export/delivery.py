"""Takes spans from the outbox, gives them to a transport, and marks in the outbox what became of them.

A span leaves the outbox when the collector has said yes, or when it has been found, alone, to be what the collector
refuses. A refusal of a batch is narrowed down by halves, and only believed if the same collector takes something
else: other spans, or an empty request, which the protocol has it accept. So a server that answers 400 to everything
(plain HTTP sent to a TLS port) costs nothing but time.

What is left as it is: spans that a *partial success* rejects are lost, since the collector gives a number and no
names, and forbids repeating the request. An answer lost after the collector stored a batch repeats that batch, under
the same ids.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from coding_agent_exporter.export.answer import Answer, Kind
from coding_agent_exporter.logs import fields

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

    from coding_agent_exporter.export.wire import Encoder
    from coding_agent_exporter.spanmodel import Span

BATCH = 512
MAX_BODY = 4 * 1024 * 1024
"""Bytes of a request before compression: gRPC servers accept no more unless told to."""
MAX_REQUESTS = 64
"""Requests of one pass. One bad span among 512 takes 20; more bad ones are left to the next pass."""
PATIENCE = 5
"""Passes in a row that a collector may fail over the same spans (HTTP 500) before one of them is suspected."""
FIRST_DELAY, LAST_DELAY = 1.0, 60.0
MAX_RETRY_AFTER = 600.0
DROP_REASONS = ("refused", "rejected", "too_large", "invalid")
"""Refused alone; rejected in a partial success; too large alone; not to be encoded."""

log = logging.getLogger(__name__)

Item = tuple[int, "Message"]

_ABOUT_SPANS = {Kind.REFUSED, Kind.TOO_LARGE}


class Outbox(Protocol):
    """Spans that have to be delivered, in the order in which they were committed. For one thread."""

    def take(self, limit: int) -> list[tuple[int, Span]]:
        """The oldest spans with their row numbers. They stay."""
        ...

    def done(self, numbers: Sequence[int]) -> None:
        """Delivered: remove them."""
        ...

    def drop(self, numbers: Sequence[int], reason: str) -> None:
        """Never to be delivered: remove and count them."""
        ...

    def size(self) -> int:
        """How many there are."""
        ...


class Transport(Protocol):
    """A way to a collector."""

    def send(self, body: bytes, timeout: float) -> Answer:
        """One request, answered or given up within about `timeout` seconds."""
        ...

    def cut(self) -> None:
        """End a request that another thread is in."""
        ...

    def close(self) -> None:
        """Release what is held; send() opens it again."""
        ...


@dataclass(slots=True)
class Counts:
    """What has happened since start. Written by one thread, read by others as it stands."""

    exported: int = 0
    """Spans that the collector has."""
    failed: int = 0
    """Requests that it did not accept, and passes that went wrong on this side."""
    consecutive: int = 0
    """Passes without success, up to now."""
    last_error: str = ""
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROP_REASONS, 0))


class Delivery:
    """The worker's work, one pass at a time. `timeout` is seconds for a request; `clock` is monotonic."""

    def __init__(self, outbox: Outbox, transport: Transport, encoder: Encoder, counts: Counts, *, timeout: float,
                 clock: Callable[[], float], jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._outbox, self._transport, self._encoder, self.counts = outbox, transport, encoder, counts
        self._timeout, self._clock, self._jitter = timeout, clock, jitter
        self._broken = 0
        """Passes in a row that ended with BROKEN, since the cause was last searched for."""
        self._reported: Kind | None = None
        self._warned = ""
        self.deadline: float | None = None
        """When set, on `clock`: the last flush. Delays are a second at most, and no request goes on for longer."""

    def step(self) -> float | None:
        """Send the oldest spans. The seconds to wait before the next pass, 0 for none; None: nothing is left."""
        rows = self._outbox.take(BATCH)
        if not rows:
            return None
        failure = self._pass(self._encode(rows))
        if failure is None:
            self._succeeded()
            return 0.0
        return self.failed(failure)

    def failed(self, answer: Answer) -> float:
        """Note that a pass went wrong. The seconds to wait before the next.

        Full jitter: anywhere between 0 and a ceiling that doubles from 1 s to a minute, so that many exporters do
        not return together to a collector that has just come back.
        """
        counts = self.counts
        counts.consecutive += 1
        counts.last_error = answer.error
        self._broken = self._broken + 1 if answer.kind is Kind.BROKEN else 0
        if answer.kind is not self._reported:
            self._reported = answer.kind
            level = logging.ERROR if answer.kind is Kind.HOLD else logging.WARNING
            log.log(level, "spans wait for the collector",
                    extra=fields(error=answer.error, needs_a_person=answer.kind is Kind.HOLD))
        if self.deadline is not None:
            return self._jitter(0.0, FIRST_DELAY)
        ceiling = min(LAST_DELAY, FIRST_DELAY * 2.0 ** min(counts.consecutive - 1, 30))
        delay = self._jitter(LAST_DELAY / 2 if answer.kind is Kind.HOLD else 0.0,
                             LAST_DELAY if answer.kind is Kind.HOLD else ceiling)
        return max(delay, min(answer.retry_after or 0.0, MAX_RETRY_AFTER))

    def _succeeded(self) -> None:
        if self._reported:
            log.info("spans are delivered again")
        self.counts.consecutive = self._broken = 0
        self._reported = None

    def _encode(self, rows: Sequence[tuple[int, Span]]) -> list[Item]:
        items: list[Item] = []
        invalid = []
        for number, span in rows:
            try:
                items.append((number, self._encoder.span(span)))
            except (ValueError, TypeError, LookupError):
                invalid.append(number)
        self._drop(invalid, "invalid", "OTLP cannot carry them")
        return items

    def _pass(self, items: list[Item]) -> Answer | None:
        """Send, in halves where the whole is refused. What went wrong, or None if the outbox got shorter."""
        pieces = [items] if items else []
        suspects: list[tuple[int, Answer]] = []
        accepted, requests = False, 0
        failure: Answer | None = None
        patient = self._broken < PATIENCE
        if not patient:
            self._broken = 0
        while pieces and requests < MAX_REQUESTS and failure is None:
            piece = pieces.pop()
            body = self._encoder.request(message for _, message in piece)
            answer = Answer(Kind.TOO_LARGE, "larger than gRPC's usual limit")
            if len(body) <= MAX_BODY or len(piece) == 1:
                requests += 1
                answer = self._send(body)
            if answer.kind is Kind.ACCEPTED:
                accepted = True
                self._done(piece, answer)
            elif answer.kind not in _ABOUT_SPANS and (patient or answer.kind is not Kind.BROKEN):
                failure = answer
            elif len(piece) == 1:
                suspects.append((piece[0][0], answer))
            else:
                half = len(piece) // 2
                # The older half is on top, and goes first.
                pieces += [piece[half:], piece[:half]]
        convicted = self._convict(suspects, accepted)
        if failure is None and not accepted and not convicted and items:
            # Refused, all that was tried, and nothing proves that this collector accepts anything.
            refusal = suspects[0][1] if suspects else answer
            kind = Kind.BROKEN if refusal.kind is Kind.BROKEN else Kind.HOLD
            failure = Answer(kind, refusal.error, retry_after=refusal.retry_after)
        return failure

    def _convict(self, suspects: list[tuple[int, Answer]], accepted: bool) -> bool:
        """Drop those that were refused alone by a collector that accepts other things. Whether any was."""
        if suspects and not accepted:
            # An empty request proves a lot, but not that a collector which breaks down can store anything.
            suspects = [(number, answer) for number, answer in suspects if answer.kind is not Kind.BROKEN]
            if not suspects or self._send(self._encoder.request(())).kind is not Kind.ACCEPTED:
                return False
        for reason, large in (("refused", False), ("too_large", True)):
            found = [(number, answer) for number, answer in suspects if (answer.kind is Kind.TOO_LARGE) is large]
            if found:
                self._drop([number for number, _ in found], reason, found[0][1].error)
        return bool(suspects)

    def _send(self, body: bytes) -> Answer:
        timeout = self._timeout
        if self.deadline is not None:
            timeout = min(timeout, self.deadline - self._clock())
            if timeout <= 0:
                return Answer(Kind.AGAIN, "no time is left")
        answer = self._transport.send(body, timeout)
        if answer.kind is not Kind.ACCEPTED:
            self.counts.failed += 1
            self.counts.last_error = answer.error
        return answer

    def _done(self, piece: list[Item], answer: Answer) -> None:
        self._outbox.done([number for number, _ in piece])
        rejected = max(0, min(answer.rejected, len(piece)))
        self.counts.exported += len(piece) - rejected
        self.counts.consecutive = 0
        self.counts.dropped["rejected"] += rejected
        if rejected:
            log.error("the collector rejected spans", extra=fields(count=rejected, error=answer.error))
        elif answer.error and answer.error != self._warned:
            self._warned = answer.error
            log.warning("the collector has a remark", extra=fields(error=answer.error))

    def _drop(self, numbers: list[int], reason: str, error: str) -> None:
        if numbers:
            self._outbox.drop(numbers, reason)
            self.counts.dropped[reason] += len(numbers)
            log.error("spans are dropped", extra=fields(reason=reason, count=len(numbers), error=error))
