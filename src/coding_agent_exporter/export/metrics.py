"""Takes what a scrape would be shown, gives it to an OTLP collector every so often: metrics by push.

A push is a scrape that this program makes of itself: it steps the pipeline, and what it delivers counts as shown. So
a new series goes out at its first value (0, as a rule) before it goes out at its value, here too. The value follows an
interval later (a minute at most), and not at once: a collector that is itself scraped keeps only the latest point, and
would show its Prometheus no zero at all. Nothing is lost when a push fails, since all of it is cumulative.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from coding_agent_exporter.export.answer import Answer, Kind
from coding_agent_exporter.export.delivery import FIRST_DELAY, LAST_DELAY, MAX_BODY, MAX_RETRY_AFTER
from coding_agent_exporter.export.target import resolve
from coding_agent_exporter.export.target import resource as resource_attributes
from coding_agent_exporter.logs import fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from coding_agent_exporter.export.delivery import Transport
    from coding_agent_exporter.export.metricwire import MetricEncoder, Shown, View
    from coding_agent_exporter.export.target import Target

DEFAULT_INTERVAL = 60.0
MIN_INTERVAL, MAX_INTERVAL = 1.0, 24 * 3600.0
ZERO_STANDS = 60.0
"""Seconds for which a first value stands at most: as long as Prometheus, left at its defaults, takes to scrape."""
LAST_ZERO_STANDS = 1.0
"""The same at a stop, when there is no time."""
MIN_BODY = 16 * 1024
"""Bytes of a request that no collector should find too large."""
ENOUGH_REFUSALS = 3
"""Families that a collector may refuse, each alone, before it counts as one that takes nothing."""
_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
_TEMPORALITY = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
_ABOUT_POINTS = {Kind.REFUSED, Kind.TOO_LARGE}
_NEEDS_A_PERSON = {Kind.HOLD, Kind.REFUSED, Kind.TOO_LARGE}

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PushCounts:
    """What has happened since start. Written by one thread, read by others as it stands."""

    exported: int = 0
    """Pushes that the collector took, points that it `rejected` excepted."""
    failed: int = 0
    """Pushes that it did not take, or that went wrong on this side."""
    rejected: int = 0
    """Points that it did not take out of pushes that it took. They come again with the next."""
    consecutive: int = 0
    """Failures in a row, up to now."""
    last_error: str = ""


V = TypeVar("V", bound="View")


class Push(Generic[V]):
    """The exporter's work, one push at a time.

    `collect` gives what a scrape would be shown, and what to call once that was delivered; `present` the families of
    it. `interval` and `timeout` (of a request) are seconds; `clock` is monotonic.
    """

    def __init__(self, collect: Callable[[], tuple[V, Callable[[], None]]], present: Callable[[V], Iterable[Shown]],
                 encoder: MetricEncoder, transport: Transport, counts: PushCounts, *, interval: float,
                 timeout: float, clock: Callable[[], float],
                 jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._collect, self._present, self._encoder, self._transport = collect, present, encoder, transport
        self._interval, self._timeout, self._clock, self._jitter = interval, timeout, clock, jitter
        self.counts = counts
        self._limit = MAX_BODY
        self._remark = ""
        self._last_zero = False
        self.deadline: float | None = None
        """When set, on `clock`: the last push. Delays are a second at most, and no request goes on for longer."""

    def step(self) -> float | None:
        """Push what there is now. The seconds from its start to that of the next; None: that was the last one."""
        try:
            view, delivered = self._collect()
            answer = self._send(view)
            if answer.kind is Kind.ACCEPTED:
                delivered()
        except Exception as error:  # the boundary: a scrape that fails must not end export for good
            if not self.counts.consecutive:
                log.exception("a push of metrics went wrong")
            return self._failed(Answer(Kind.AGAIN, f"push: {type(error).__name__}"), said=True)
        if answer.kind is not Kind.ACCEPTED:
            return self._failed(answer)
        if self.counts.consecutive:
            log.info("metrics reach the collector again")
        self.counts.exported += 1
        self.counts.consecutive = 0
        if self.deadline is None:
            return min(self._interval, ZERO_STANDS) if view.held else self._interval
        # Once: what is still held after that is held for other reasons, and for longer.
        again = bool(view.held) and not self._last_zero
        self._last_zero = True
        return LAST_ZERO_STANDS if again else None

    def _failed(self, answer: Answer, *, said: bool = False) -> float:
        counts = self.counts
        counts.failed += 1
        counts.consecutive += 1
        counts.last_error = answer.error
        if counts.consecutive == 1 and not said:
            person = answer.kind in _NEEDS_A_PERSON
            log.log(logging.ERROR if person else logging.WARNING, "metrics do not reach the collector",
                    extra=fields(error=answer.error, needs_a_person=person))
        if self.deadline is not None:
            return self._jitter(0.0, FIRST_DELAY)
        ceiling = min(LAST_DELAY, FIRST_DELAY * 2.0 ** min(counts.consecutive - 1, 30))
        delay = max(self._interval, self._jitter(0.0, ceiling))
        return max(delay, min(answer.retry_after or 0.0, MAX_RETRY_AFTER))

    def _send(self, view: V) -> Answer:
        """Send all of a snapshot, in as many requests as it takes. The first answer that is not a yes, or a yes.

        What the collector refuses is narrowed down to families: one that it does not like must not hold up the
        others. That takes a collector which accepts some of them; else the refusal is the answer.
        """
        from coding_agent_exporter.export.metricwire import pack, points  # noqa: PLC0415 - loads protobuf

        pieces = pack(self._encoder.messages(view, self._present(view)), self._limit)
        accepted = False
        refused: list[Answer] = []
        lost = 0
        while pieces and (accepted or len(refused) < ENOUGH_REFUSALS):
            piece = pieces[0]
            body = self._encoder.request(piece)
            answer = self._request(body)
            if answer.kind is Kind.ACCEPTED:
                accepted = True
                self._note(answer, sum(map(points, piece)))
                del pieces[0]
            elif answer.kind is Kind.TOO_LARGE and self._limit > MIN_BODY:
                self._limit = max(MIN_BODY, min(self._limit, len(body)) // 2)
                pieces = pack([message for left in pieces for message in left], self._limit)
            elif answer.kind not in _ABOUT_POINTS:
                return answer
            elif len(piece) > 1:
                half = len(piece) // 2
                pieces[:1] = [piece[:half], piece[half:]]
            else:
                refused.append(answer)
                lost += points(piece[0])
                del pieces[0]
        if not refused:
            return Answer(Kind.ACCEPTED)
        if not accepted:
            return refused[0]
        self._note(Answer(Kind.ACCEPTED, refused[0].error, rejected=lost), lost)
        return Answer(Kind.ACCEPTED)

    def _request(self, body: bytes) -> Answer:
        timeout = self._timeout
        if self.deadline is not None:
            timeout = min(timeout, self.deadline - self._clock())
            if timeout <= 0:
                return Answer(Kind.AGAIN, "no time is left")
        return self._transport.send(body, timeout)

    def _note(self, answer: Answer, sent: int) -> None:
        """What a collector says of points that it took, or did not take among others."""
        rejected = max(0, min(answer.rejected, sent))
        self.counts.rejected += rejected
        remark = answer.error or ("points are rejected" if rejected else "")
        if remark and remark != self._remark:
            self._remark = remark
            log.log(logging.ERROR if rejected else logging.WARNING, "the collector has a remark",
                    extra=fields(error=remark, rejected=rejected))
        if rejected:
            self.counts.last_error = remark


class MetricsExporter(Generic[V]):
    """Pushes metrics in the background, from start() on and then every `interval` seconds.

    See `Push` for `collect` and `present`: both are called from a thread of this class, and not any more after
    stop(). `started` is when this process started, `wall` gives epoch seconds, `clock` is monotonic.
    """

    def __init__(self, target: Target, collect: Callable[[], tuple[V, Callable[[], None]]],
                 present: Callable[[V], Iterable[Shown]], *, resource: Mapping[str, str], version: str,
                 interval: float, started: float, clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time) -> None:
        """Nothing is loaded or connected before start()."""
        self.target, self.interval = target, interval
        self.counts = PushCounts()
        self._collect, self._present = collect, present
        self._resource, self._version, self._started = resource, version, started
        self._clock, self._wall = clock, wall
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._over = False
        self._transport: Transport | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, with a push at once. Raises RuntimeError when called twice."""
        if self._thread:
            raise RuntimeError("already started")
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
        self._thread.start()

    def stop(self, grace: float) -> None:
        """Push what there is now, for at most `grace` seconds: twice where the first push shows something new at 0."""
        with self._changed:
            self._deadline = self._clock() + grace
            self._changed.notify_all()
        if self._thread:
            self._thread.join(grace)
            self._over = True
            if self._thread.is_alive() and self._transport:
                self._transport.cut()
                self._thread.join(0.2)

    def _run(self) -> None:
        try:
            push = self._build()
        except Exception as error:  # a broken installation: scrapes go on
            self.counts.failed += 1
            self.counts.last_error = f"cannot start: {error}"
            log.exception("cannot export metrics")
            return
        try:
            while not self._over and self._once(push):
                pass
        finally:
            if self._transport:
                self._transport.close()

    def _build(self) -> Push[V]:
        # Here, and not above: protobuf takes memory and start-up time, gRPC a lot of it.
        from coding_agent_exporter.export.metricwire import MetricEncoder  # noqa: PLC0415 - see above

        agent = f"coding-agent-exporter/{self._version}"
        if self.target.protocol == "grpc":
            from coding_agent_exporter.export.otlp_grpc import GrpcTransport  # noqa: PLC0415 - see above

            self._transport = GrpcTransport(self.target, agent)
        else:
            from coding_agent_exporter.export.otlp_http import HttpTransport  # noqa: PLC0415 - see above

            self._transport = HttpTransport(self.target, agent, self._wall)
        return Push(self._collect, self._present, MetricEncoder(self._resource, self._version, self._started),
                    self._transport, self.counts, interval=self.interval, timeout=self.target.timeout,
                    clock=self._clock)

    def _once(self, push: Push[V]) -> bool:
        """One push and the wait after it. False when it was the last."""
        with self._changed:
            push.deadline = self._deadline
        began = self._clock()
        delay = push.step()
        with self._changed:
            if self._deadline is None:
                left = began + (delay or 0.0) - self._clock()
                if left > 0:
                    self._changed.wait_for(lambda: self._deadline is not None, left)
                return True
            if push.deadline is None:
                return True  # stop() came during the push: once more, as it may have missed the last of it
            left = self._deadline - self._clock()
            if delay is None or left <= 0:
                return False
            # At least half of what is left is for the next push.
            self._changed.wait(min(delay, left / 2))
            return True


def create_metrics(collect: Callable[[], tuple[V, Callable[[], None]]], present: Callable[[V], Iterable[Shown]],
                   environ: Mapping[str, str], *, version: str, instance: str, started: float, endpoint: str = "",
                   protocol: str = "", headers: str = "", compression: str = "", timeout: float | None = None,
                   insecure: bool | None = None, interval: float | None = None, host: str | None = None,
                   clock: Callable[[], float] = time.monotonic,
                   wall: Callable[[], float] = time.time) -> MetricsExporter[V] | None:
    """An exporter that is not started yet; None when neither a setting nor a variable names an endpoint.

    `interval` is seconds; without it, OTEL_METRIC_EXPORT_INTERVAL (milliseconds) or a minute. Everything else is as
    in `export.create` and `MetricsExporter`. Raises ValueError with one line for people.
    """
    target = resolve(environ, signal="metrics", endpoint=endpoint, protocol=protocol, headers=headers,
                     compression=compression, timeout=timeout, insecure=insecure)
    if target is None:
        return None
    attributes = resource_attributes(environ, version=version, instance=instance,
                                     host=socket.gethostname() if host is None else host)
    wanted = environ.get(_TEMPORALITY, "").strip().lower()
    if wanted not in {"", "cumulative"}:
        # Not an error: the variable may be meant for all programs of a pod.
        log.warning("metrics are cumulative all the same", extra=fields(variable=_TEMPORALITY, value=wanted))
    return MetricsExporter(target, collect, present, resource=attributes, version=version,
                           interval=_interval(environ, interval), started=started, clock=clock, wall=wall)


def _interval(environ: Mapping[str, str], given: float | None) -> float:
    origin, seconds = "otlp.metrics-interval", given
    if seconds is None:
        text = environ.get(_INTERVAL, "").strip()
        if not text:
            return DEFAULT_INTERVAL
        origin = _INTERVAL
        try:
            seconds = float(text) / 1000
        except ValueError:
            seconds = 0.0
    if not MIN_INTERVAL <= seconds <= MAX_INTERVAL:
        raise ValueError(f"{origin}: an interval is at least {MIN_INTERVAL:.0f} second and at most a day")
    return seconds
