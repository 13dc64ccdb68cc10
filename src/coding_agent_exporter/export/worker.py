"""Takes a wake from pipeline whenever spans were committed, gives delivery a thread, and stops it in time."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from coding_agent_exporter.export.answer import Answer, Kind
from coding_agent_exporter.export.delivery import Counts, Delivery

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coding_agent_exporter.export.delivery import Outbox, Transport
    from coding_agent_exporter.export.target import Target
    from coding_agent_exporter.spanmodel import Span

LOOK_ANYWAY = 60.0
"""Seconds after which the outbox is looked at without a wake."""

log = logging.getLogger(__name__)


class Exporter:
    """Drains an outbox in the background. `wake` and `counts` are safe from any thread.

    The outbox is used from the worker's thread only, one call at a time, and not any more after stop().
    """

    def __init__(self, target: Target, outbox: Outbox, *, resource: Mapping[str, str], version: str,
                 clock: Callable[[], float], wall: Callable[[], float]) -> None:
        """`clock` is monotonic, `wall` epoch seconds. Nothing is loaded or connected before start()."""
        self.target = target
        self.counts = Counts()
        self._outbox, self._resource, self._version = _Gate(outbox), resource, version
        self._clock, self._wall = clock, wall
        self._changed = threading.Condition()
        self._woken = False
        self._deadline: float | None = None
        self._transport: Transport | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin with what is in the outbox. Raises RuntimeError when called twice."""
        if self._thread:
            raise RuntimeError("already started")
        self._thread = threading.Thread(target=self._run, name="otlp-export", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """New spans were committed. Does not shorten the wait after a failure."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def stop(self, grace: float) -> None:
        """Send what is left, for at most `grace` seconds; the rest stays in the outbox.

        Waits after failures are cut short, Retry-After included: for a short-lived pod there is no later.
        """
        with self._changed:
            self._deadline = self._clock() + grace
            self._changed.notify_all()
        if self._thread:
            self._thread.join(grace)
            if self._thread.is_alive() and self._transport:
                self._transport.cut()
                self._thread.join(0.2)
        self._outbox.shut()

    def _run(self) -> None:
        try:
            delivery = self._build()
        except Exception as error:  # a broken installation: metrics go on, and the spans wait in the outbox
            self.counts.failed += 1
            self.counts.last_error = f"cannot start: {error}"
            log.exception("cannot export spans")
            return
        try:
            while self._once(delivery):
                pass
        except _ShutError:
            log.debug("a request outlasted the time to stop")
        finally:
            if self._transport:
                self._transport.close()

    def _build(self) -> Delivery:
        # Here, and not above: protobuf takes memory and start-up time, gRPC a lot of it.
        from coding_agent_exporter.export.wire import Encoder  # noqa: PLC0415 - see above

        agent = f"coding-agent-exporter/{self._version}"
        if self.target.protocol == "grpc":
            from coding_agent_exporter.export.otlp_grpc import GrpcTransport  # noqa: PLC0415 - see above

            self._transport = GrpcTransport(self.target, agent)
        else:
            from coding_agent_exporter.export.otlp_http import HttpTransport  # noqa: PLC0415 - see above

            self._transport = HttpTransport(self.target, agent, self._wall)
        return Delivery(self._outbox, self._transport, Encoder(self._resource, self._version), self.counts,
                        timeout=self.target.timeout, clock=self._clock)

    def _once(self, delivery: Delivery) -> bool:
        """One pass and the wait after it. False when it was the last."""
        with self._changed:
            # Before the outbox is looked at: what is committed after that wakes again.
            self._woken = False
            delivery.deadline = self._deadline
        try:
            delay = delivery.step()
        except _ShutError:
            raise
        except Exception as error:  # the boundary: a failing outbox must not end export for good
            self.counts.failed += 1
            log.exception("a pass over the outbox failed")
            delay = delivery.failed(Answer(Kind.AGAIN, f"outbox: {type(error).__name__}"))
        with self._changed:
            if self._deadline is None:
                if delay is None:
                    self._changed.wait_for(lambda: self._woken or self._deadline is not None, LOOK_ANYWAY)
                elif delay > 0:
                    self._changed.wait_for(lambda: self._deadline is not None, delay)
                return True
            if delivery.deadline is None:
                return True  # stop() came during the pass: look once more, now in a hurry
            left = self._deadline - self._clock()
            if delay is None or left <= 0:
                return False
            if delay > 0:
                self._changed.wait(min(delay, left))
            return True


class _ShutError(Exception):
    """The outbox is not to be touched any more."""


class _Gate:
    """An outbox that can be taken away from a thread that is late."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox, self._lock, self._open = outbox, threading.Lock(), True

    def shut(self) -> None:
        with self._lock:
            self._open = False

    def _use(self) -> Outbox:
        if not self._open:
            raise _ShutError
        return self._outbox

    def take(self, limit: int) -> list[tuple[int, Span]]:
        with self._lock:
            return self._use().take(limit)

    def done(self, numbers: Sequence[int]) -> None:
        with self._lock:
            self._use().done(numbers)

    def drop(self, numbers: Sequence[int], reason: str) -> None:
        with self._lock:
            self._use().drop(numbers, reason)

    def size(self) -> int:
        with self._lock:
            return self._use().size()
