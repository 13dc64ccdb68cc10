"""Takes the settings, gives a running exporter: the loop between scrapes and the order of shutdown."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from coding_agent_exporter.config import ConfigError
from coding_agent_exporter.export import create as create_exporter
from coding_agent_exporter.export.metrics import create_metrics
from coding_agent_exporter.export.target import resolve
from coding_agent_exporter.expose import Snapshot, SnapshotCollector
from coding_agent_exporter.logs import fields
from coding_agent_exporter.pipeline import Pipeline
from coding_agent_exporter.watch import Waker, create
from coding_agent_exporter.web import Server
from coding_agent_exporter.webapp import App

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from coding_agent_exporter.config import Settings
    from coding_agent_exporter.export import Exporter
    from coding_agent_exporter.export.metrics import MetricsExporter

    Beside = Callable[[Sequence[tuple[str, int]], Callable[[], None]], AbstractContextManager[None]]

log = logging.getLogger(__name__)

MIN_INTERVAL = 0.1
"""Seconds between steps that changes cause: bounds what busy agents cost. With the 75 ms in which the waker reports a
change, a file that stands for 250 ms is read while it does, and 75 ms are left for a busy machine."""

MAX_INTERVAL = 10.0
"""Seconds after which a step is made without a cause: staleness, and what no notification told of."""

POLL_SHARE = 0.05
"""Where files are polled, looking at all of them takes no more of a core than this. Heartbeats are read each time."""


def _nothing(_: Sequence[tuple[str, int]], __: Callable[[], None]) -> AbstractContextManager[None]:
    return nullcontext()


def serve(settings: Settings, *, beside: Beside = _nothing) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code; raises OSError when it cannot start.

    `beside` is entered once the server listens, with the addresses it is bound to and what asks it to stop; and left
    when it was asked, while metrics are still served: what is written until then is still counted.
    """
    relax_gc()
    stop, hurry = threading.Event(), threading.Event()
    exporter: Exporter | None = None

    def wake_exporter() -> None:
        if exporter is not None:
            exporter.wake()

    pipeline = Pipeline(settings, spans=_wants_spans(settings), committed=wake_exporter)
    try:
        exporter = _exporter(settings, pipeline)
        waker = create(settings.watch_poll_interval, force_polling=settings.watch_force_polling)
        try:
            app = App(pipeline, waker)
            app.server = server = Server(
                settings.web_listen_address, app,
                telemetry_path=settings.web_telemetry_path, web_config=settings.web_config_file,
                max_connections=settings.web_max_connections,
            )

            def end() -> None:
                stop.set()
                waker.wake()

            def ask_to_stop() -> None:
                if stop.is_set():
                    hurry.set()
                end()

            app.exporter = exporter
            metrics = _metrics_exporter(settings, pipeline, app)
            pushers = [pusher for pusher in (exporter, metrics) if pusher is not None]
            with _signals(ask_to_stop):
                server.start()
                for pusher in pushers:
                    pusher.start()
                try:
                    log.info("listening", extra=fields(
                        version=pipeline.version, address=" ".join(_address(*address) for address in server.addresses),
                        path=settings.web_telemetry_path, state=settings.state_path))
                    with beside(server.addresses, end):
                        _loop(pipeline, waker, stop)
                        log.info("stopping", extra=fields(linger=settings.shutdown_linger))
                        pipeline.stop()
                    _linger(pipeline, settings.shutdown_linger, hurry)
                finally:
                    deadline = time.monotonic() + settings.otlp_flush_timeout
                    for pusher in pushers:
                        pusher.stop(max(0.1, deadline - time.monotonic()))
                    server.stop()
        finally:
            waker.close()
    finally:
        pipeline.close()
    log.info("stopped")
    return 0


@contextmanager
def _signals(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` for each SIGTERM and SIGINT, in a thread of its own.

    A handler runs in the main thread, between any two of its instructions: also where that holds the very lock that
    the handler needs to wake it, and then neither would go on.
    """
    numbers, done = (signal.SIGTERM, signal.SIGINT), False

    def listen() -> None:
        while True:
            signal.sigwait(numbers)
            if done:
                return
            ask()

    # For threads that were there before, in which these are not blocked.
    handlers = {number: signal.signal(number, lambda *_: ask()) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        done = True
        assert listener.ident is not None, "it was started"
        signal.pthread_kill(listener.ident, signal.SIGTERM)
        listener.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _wants_spans(settings: Settings) -> bool:
    """Whether there is a collector for spans. Raises ConfigError."""
    try:
        return resolve(os.environ, **settings.collector) is not None
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _exporter(settings: Settings, pipeline: Pipeline) -> Exporter | None:
    try:
        return create_exporter(
            pipeline.outbox, os.environ, version=pipeline.version, instance=pipeline.instance, **settings.collector)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _metrics_exporter(settings: Settings, pipeline: Pipeline, app: App) -> MetricsExporter[Snapshot] | None:
    if not settings.otlp_metrics:
        return None
    try:
        return create_metrics(
            app.collect, lambda snapshot: SnapshotCollector(snapshot).collect(), os.environ, version=pipeline.version,
            instance=pipeline.instance, started=pipeline.started, interval=settings.otlp_metrics_interval or None,
            **settings.collector)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def relax_gc() -> None:
    """Look for reference cycles more rarely: there are hardly any, and decoding makes many objects that live shortly.

    A fifth of the time that a large backlog takes went into looking.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _loop(pipeline: Pipeline, waker: Waker, stop: threading.Event) -> None:
    more, looked, took = False, float("-inf"), 0.0
    while not stop.is_set():
        changes = None
        if not more:
            waker.watch(pipeline.inputs.found.watch)
            if waker.wait(MAX_INTERVAL) and looked > time.monotonic() - MAX_INTERVAL:
                changes = waker.changes
                if waker.polling and changes is None and time.monotonic() < looked + took / POLL_SHARE:
                    changes = frozenset()
        began = time.monotonic()
        more = pipeline.step(changes=changes)
        if changes is None:
            looked, took = began, time.monotonic() - began
        if not more:
            stop.wait(max(0.0, MIN_INTERVAL - (time.monotonic() - began)))


def _linger(pipeline: Pipeline, seconds: float, hurry: threading.Event) -> None:
    """Stay until a scrape has seen everything, the time is up, or a second signal came."""
    began = time.monotonic()
    deadline = began + seconds
    # With a hold there are several servers: one that has seen everything does not speak for the others.
    hold = pipeline.settings.counters_zero_hold
    enough = began + (hold if hold < seconds else 0.0)
    while (left := deadline - time.monotonic()) > 0 and not hurry.is_set():
        if pipeline.final() and time.monotonic() >= enough:
            break
        with pipeline.scraped:
            pipeline.scraped.wait(min(left, 0.2))
        pipeline.step()
    if seconds > 0:
        log.info("lingered", extra=fields(final=pipeline.final()))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
