"""Delivery by the running program: protocols, kills, collectors that are down or misbehave, bounds, and shutdown."""

from __future__ import annotations

import random
import signal
import ssl
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from otlp_receiver import GrpcReceiver, HttpReceiver, Reply, grpc_receiver, http_receiver
from process_support import Exporter, free_port, wait_for
from spans_process_support import (
    DROPPED,
    PENDING,
    POISON,
    LiveSession,
    age,
    by_id,
    received,
    wait_for_pending,
    wait_until_received,
)
from support import total
from web_support import Authority

if TYPE_CHECKING:
    from coding_agent_exporter.spanmodel import Span

KILLS = 10
MOODS = (
    ("takes", Reply()),
    ("503", Reply(status=503)),
    ("stores and hangs", Reply(late=True)),
    ("429", Reply(status=429, headers={"retry-after": "1"})),
    ("takes", Reply()),
    ("resets", Reply(reset=True)),
    ("stores and resets", Reply(reset=True, store=True)),
    ("takes", Reply()),
    ("hangs", Reply(hang=True)),
    ("answers garbage", Reply(body=b"\xff\xff\xff<html>", store=False)),
)
COMES, GOES = {2, 6}, {5}
"""Kills after which the collector comes up, and goes down."""
LONG = 20.0
"""Seconds for which a request may take: a scrape that waited for one would take as long."""


def pi_flags(home: Path, *flags: str) -> list[str]:
    return [f"--sessions.dir=pi={home / 'pi'}", *flags]


def is_poison(span: Any) -> bool:
    return bool(span.name == f"chat {POISON}")


class Agents:
    """A thread that writes to some sessions, forks among them, until the block ends. What it began it finishes."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory, self._chance = directory, random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.sessions = [LiveSession(directory) for _ in range(4)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def spans(self) -> list[Span]:
        """All that shall arrive, sooner or later."""
        return [span for session in self.sessions for span in session.spans]

    def _run(self) -> None:
        for number in count():
            session = self._chance.choice(self.sessions)
            session.anything(self._chance)
            if number % 40 == 39:
                self.sessions.append(session.fork(self._directory))
            if number % 25 == 12:
                session.prompt(("1:bash",), model=POISON)
            if self._stop.wait(self._chance.uniform(0, 0.04)):
                return


class Moody:
    """How a collector answers: mostly badly, in turn. `moods` is what it has done so far."""

    def __init__(self) -> None:
        self.well = False
        self.moods: set[str] = set()
        self._next = cycle(MOODS)

    def __call__(self, spans: list[Any]) -> Reply:
        if any(map(is_poison, spans)):
            self.moods.add("refuses")
            return Reply(status=400)
        if self.well or not spans:
            return Reply()
        mood, reply = next(self._next)
        self.moods.add(mood)
        return replace(reply)


@pytest.mark.parametrize("seed", [1])
def test_every_span_arrives_through_kills_and_refusals(seed: int, tmp_path: Path) -> None:
    """Agents write, the collector is down, refuses, hangs and resets, the exporter is killed at random moments.

    In the end every span is there that the session files hold, with the same content each time it was sent, and no
    other; only those that the collector refuses by themselves are missing, and they alone.
    """
    chance, receiver, mood, port = random.Random(seed), HttpReceiver(), Moody(), free_port()
    receiver.rule = mood
    moods = {mood for mood, _ in MOODS} | {"refuses"}
    with ExitStack() as up, Exporter(tmp_path, *pi_flags(
        tmp_path, f"--otlp.endpoint=http://127.0.0.1:{port}", "--otlp.timeout=400ms", "--otlp.flush-timeout=20s")
    ) as exporter:
        exporter.scrape()
        with Agents(tmp_path / "pi", seed) as agents:
            kills = 0
            while kills < KILLS or (mood.moods != moods and kills < 10 * KILLS):
                if kills in COMES:
                    receiver.release.clear()
                    up.enter_context(http_receiver(port=port, receiver=receiver))
                elif kills in GOES:
                    up.close()
                time.sleep(chance.uniform(0.2, 0.9))
                exporter.kill()
                exporter.start()
                kills += 1
        assert mood.moods == moods
        mood.well = True
        exporter.kill()
        exporter.start()
        wanted = by_id(agents.spans)
        good = {name: span for name, span in wanted.items() if not is_poison(span)}
        assert len(agents.sessions) > 4
        assert len(wanted) - len(good) > 2
        assert len(good) > 500
        wait_until_received(receiver, good)
        wait_for_pending(exporter, 0, 0)
        assert exporter.terminate() == 0
        assert received(receiver) == good
        assert len(receiver.spans) > len(good)  # some were stored without an answer, and had to be sent again


@pytest.mark.parametrize("trouble", ["down", "hanging", "dripping", "failing"])
def test_a_bad_collector_does_not_slow_metrics_down(trouble: str, tmp_path: Path) -> None:
    """Scrapes are answered and count new turns while spans wait; when the collector is well again they leave."""
    port, receiver = free_port(), HttpReceiver()
    bad = {"hanging": Reply(hang=True), "dripping": Reply(drip=True), "failing": Reply(status=503)}
    receiver.rule = lambda _: bad.get(trouble, Reply())
    flags = pi_flags(tmp_path, f"--otlp.endpoint=http://127.0.0.1:{port}", f"--otlp.timeout={LONG:.0f}s")
    with ExitStack() as stack, Exporter(tmp_path, *flags) as exporter:
        if trouble != "down":
            stack.enter_context(http_receiver(port=port, receiver=receiver))
        exporter.scrape()
        session, slowest, waiting = LiveSession(tmp_path / "pi"), 0.0, []
        for turns in range(1, 21):
            session.prompt()
            began = time.monotonic()
            samples = exporter.scrape()
            slowest = max(slowest, time.monotonic() - began)
            waiting.append(total(samples, PENDING))
            shown = total(samples, "coding_agent_turns_total")
            assert shown == (turns if turns > 1 else 0)  # zero first
        assert waiting == [3.0 * turns for turns in range(1, 21)]
        assert slowest < LONG / 4
        if trouble == "down":
            stack.enter_context(http_receiver(port=port, receiver=receiver))
        else:
            wait_for(lambda: receiver.requests, "an attempt")
        receiver.rule = lambda _: Reply()
        receiver.release.set()
        wait_until_received(receiver, by_id(session.spans))
        wait_for_pending(exporter, 0, 0)


def test_the_outbox_is_bounded_by_count(tmp_path: Path) -> None:
    """The oldest spans make room, and are counted; those that are left arrive after a restart."""
    port = free_port()
    flags = pi_flags(tmp_path, f"--otlp.endpoint=http://127.0.0.1:{port}", "--otlp.max-queue=10",
                     "--otlp.flush-timeout=100ms")
    with Exporter(tmp_path, *flags) as exporter:
        exporter.scrape()
        session = LiveSession(tmp_path / "pi")
        for _ in range(12):
            session.prompt()
            exporter.scrape()
        samples = exporter.scrape()
        assert total(samples, PENDING) == 10
        assert total(samples, DROPPED, reason="overflow") == 26
        assert total(samples, DROPPED) == 26
        assert exporter.logged("spans dropped")
        assert exporter.terminate() == 0
        with http_receiver(port=port) as receiver:
            exporter.start()
            wait_for_pending(exporter, 0, 0)
            newest = by_id(session.spans[-10:])
            assert received(receiver) == newest


def test_the_outbox_is_bounded_by_age(tmp_path: Path) -> None:
    """What has waited too long is dropped and counted, and what is younger stays."""
    port = free_port()
    flags = pi_flags(tmp_path, f"--otlp.endpoint=http://127.0.0.1:{port}", "--otlp.max-age=1m",
                     "--otlp.flush-timeout=100ms")
    with Exporter(tmp_path, *flags) as exporter:
        exporter.scrape()
        session = LiveSession(tmp_path / "pi")
        session.prompt()
        assert total(exporter.scrape(), PENDING) == 3
        assert exporter.terminate() == 0
        age(exporter, "UPDATE outbox SET created = created - 120")
        old = by_id(session.spans)
        session.prompt()
        exporter.start()
        samples = wait_for_pending(exporter, 3, 3)
        assert total(samples, DROPPED, reason="expired") == 3
        assert total(samples, DROPPED) == 3
        with http_receiver(port=port) as receiver:
            wait_until_received(receiver, {
                name: span for name, span in by_id(session.spans).items() if name not in old})


def test_shutdown_sends_what_is_left_without_waiting_for_its_turn(tmp_path: Path) -> None:
    """A collector that asked for ten minutes of patience, and asks again, gets the spans at SIGTERM all the same."""
    with http_receiver() as receiver:
        receiver.replies = [Reply(status=503, headers={"retry-after": "600"}) for _ in range(2)]
        with Exporter(tmp_path, *pi_flags(
            tmp_path, f"--otlp.endpoint={receiver.url}", "--otlp.flush-timeout=60s")
        ) as exporter:
            exporter.scrape()
            session = LiveSession(tmp_path / "pi")
            session.prompt()
            exporter.scrape()
            receiver.wait_for(lambda: receiver.requests)
            session.prompt(("1:bash",))  # nobody scrapes any more
            assert exporter.terminate() == 0
            assert received(receiver) == by_id(session.spans)
            assert len(receiver.spans) == len(session.spans)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
@pytest.mark.parametrize("trouble", ["down", "hanging"])
def test_a_dead_collector_delays_shutdown_no_longer_than_allowed(trouble: str, protocol: str, tmp_path: Path) -> None:
    """The process ends long before its request would; what is left is sent after the restart, and once."""
    port = free_port()
    receiver: HttpReceiver | GrpcReceiver = GrpcReceiver() if protocol == "grpc" else HttpReceiver()
    receiver.rule = lambda _: Reply(hang=True)
    flags = pi_flags(tmp_path, f"--otlp.endpoint=http://127.0.0.1:{port}", "--otlp.timeout=4m",
                     "--otlp.flush-timeout=500ms", f"--otlp.protocol={protocol}")
    with Exporter(tmp_path, *flags) as exporter:
        exporter.scrape()
        session = LiveSession(tmp_path / "pi")
        session.prompt(("1:bash", "2:read"))
        with ExitStack() as stack:
            if trouble == "hanging":
                stack.enter_context(collector(port, receiver))
            exporter.scrape()
            if trouble == "hanging":
                receiver.wait_for(lambda: receiver.requests)
            exporter.signal(signal.SIGTERM)
            assert exporter.wait() == 0  # gives up after 30 s
        receiver.rule = lambda _: Reply()
        with collector(port, receiver):
            exporter.start()
            wait_until_received(receiver, by_id(session.spans))
            wait_for_pending(exporter, 0, 0)
            assert len(receiver.spans) == len(session.spans)


def collector(
    port: int, receiver: HttpReceiver | GrpcReceiver
) -> AbstractContextManager[HttpReceiver] | AbstractContextManager[GrpcReceiver]:
    """A collector at this port, of the receiver's kind."""
    if isinstance(receiver, GrpcReceiver):
        return grpc_receiver(port=port, receiver=receiver)
    return http_receiver(port=port, receiver=receiver)


# --- ways to a collector

@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


def _sends(home: Path, receiver: HttpReceiver | GrpcReceiver, *flags: str, env: dict[str, str]) -> None:
    """Fail unless a live session arrives at this collector as it should."""
    with Exporter(home, f"--sessions.dir=pi={home / 'pi'}", *flags, env=env) as exporter:
        exporter.scrape()
        session = LiveSession(home / "pi")
        session.prompt(("1:read", "2:bash"))
        exporter.scrape()
        wait_until_received(receiver, by_id(session.spans))


@pytest.mark.parametrize("by", ["flags", "variables"])
def test_grpc(by: str, tmp_path: Path) -> None:
    """Chosen by a flag or by the standard variable."""
    with grpc_receiver() as receiver:
        url = f"http://{receiver.address}"
        if by == "flags":
            _sends(tmp_path, receiver, f"--otlp.endpoint={url}", "--otlp.protocol=grpc",
                   "--otlp.headers=authorization=Bearer%20t0ken", "--otlp.compression=gzip", env={})
            assert receiver.headers[0]["authorization"] == "Bearer t0ken"
        else:
            _sends(tmp_path, receiver, env={"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_http_with_headers_and_compression(tmp_path: Path) -> None:
    """A token from the variable, one from the flag, and a compressed body at the path of the protocol."""
    with http_receiver() as receiver:
        _sends(tmp_path, receiver, f"--otlp.endpoint={receiver.url}/base", "--otlp.headers=x-scope=team%20a",
               "--otlp.compression=gzip", env={"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20t0ken"})
        headers = receiver.headers[0]
    assert (headers["x-scope"], headers["authorization"]) == ("team a", "Bearer t0ken")
    assert (headers["content-encoding"], headers[":path"]) == ("gzip", "/base/v1/traces")
    assert headers["content-type"] == "application/x-protobuf"


def test_https_with_an_authority_of_its_own(authority: Authority, tmp_path: Path) -> None:
    """OTEL_EXPORTER_OTLP_CERTIFICATE is trusted; without it nothing is sent to that collector, and all waits."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("server", "127.0.0.1"))
    with http_receiver(tls=context) as receiver:
        flags = (f"--sessions.dir=pi={tmp_path / 'pi'}", f"--otlp.endpoint={receiver.url}", "--otlp.flush-timeout=0")
        with Exporter(tmp_path, *flags) as exporter:
            exporter.scrape()
            session = LiveSession(tmp_path / "pi")
            session.prompt(("1:read",))
            exporter.scrape()
            wait_for(lambda: exporter.logged("spans wait for the collector"), "a refusal to talk to a stranger")
            assert total(exporter.scrape(), PENDING) == len(session.spans)
            assert receiver.requests == []
            exporter.terminate()
        with Exporter(tmp_path, *flags, env={"OTEL_EXPORTER_OTLP_CERTIFICATE": str(authority.certificate)}):
            wait_until_received(receiver, by_id(session.spans))


@pytest.mark.parametrize(("flags", "env", "names"), [
    (["--otlp.endpoint=collector"], {}, "otlp.endpoint"),
    (["--otlp.endpoint=ftp://c:1"], {}, "otlp.endpoint"),
    (["--otlp.endpoint=http://c:1", "--otlp.protocol=http/json"], {}, "otlp.protocol"),
    ([], {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"},
     "OTEL_EXPORTER_OTLP_PROTOCOL"),
    (["--otlp.endpoint=https://c:1"], {"OTEL_EXPORTER_OTLP_CERTIFICATE": "/no/such/file"},
     "OTEL_EXPORTER_OTLP_CERTIFICATE"),
    (["--otlp.endpoint=http://c:1", "--otlp.headers=no-value"], {}, "otlp.headers"),
])
def test_a_bad_setting_is_one_line_and_exit_code_2(
    flags: list[str], env: dict[str, str], names: str, tmp_path: Path
) -> None:
    """It says where it was written."""
    exporter = Exporter(tmp_path, *flags, env=env).start(wait=False)
    assert exporter.wait() == 2
    (line,) = exporter.lines
    assert names in line


def test_without_an_endpoint_there_is_no_outbox_and_no_protobuf(tmp_path: Path) -> None:
    """Turns are counted, nothing waits to be sent, and the libraries for sending are not loaded."""
    with http_receiver() as receiver:
        for flags, sends in (([], False), ([f"--otlp.endpoint={receiver.url}"], True)):
            home = tmp_path / str(sends)
            home.mkdir()
            with Exporter(home, f"--sessions.dir=pi={home / 'pi'}", *flags) as exporter:
                exporter.scrape()
                LiveSession(home / "pi").prompt()
                exporter.scrape()
                samples = exporter.scrape()
                assert total(samples, "coding_agent_turns_total") == 1
                if sends:
                    wait_for(lambda: receiver.spans, "spans")
                else:
                    assert total(samples, PENDING) == 0
                loaded = Path(f"/proc/{exporter.pid}/maps").read_text()
                assert ("google" in loaded) == sends
                assert "grpc" not in loaded
