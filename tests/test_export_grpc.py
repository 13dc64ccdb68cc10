"""gRPC collectors that are down, refuse, hang and come back: the same promises as over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

from otlp_receiver import GrpcReceiver, MemoryOutbox, Reply, deliver, drain, free_port, grpc_receiver, refusing, span

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def rpc(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcReceiver]:
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
    with grpc_receiver() as receiver:
        yield receiver


_RETRYABLE = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS",
              "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN")


@pytest.mark.parametrize("code", _RETRYABLE)
def test_grpc_temporary_codes(rpc: GrpcReceiver, code: str) -> None:
    """Codes that OTLP calls retryable, and those that accuse nobody, cost nothing but delay."""
    rpc.replies = [Reply(code=grpc.StatusCode[code], message="later")] * 2
    outbox = MemoryOutbox([span(n) for n in range(1, 4)])
    worker = deliver(rpc, outbox)
    assert drain(worker) == [1, 2, 0]
    assert rpc.numbers == [1, 2, 3]
    assert outbox.dropped == []


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"])
def test_grpc_codes_that_an_operator_repairs(rpc: GrpcReceiver, code: str) -> None:
    """A wrong token holds the spans, and is retried slowly."""
    rpc.replies = [Reply(code=grpc.StatusCode[code])] * 2
    assert drain(deliver(rpc, MemoryOutbox([span(1)]))) == [60, 60, 0]
    assert rpc.numbers == [1]


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_grpc_retry_info_is_honoured(rpc: GrpcReceiver, code: str) -> None:
    """The delay that a server attaches is waited for."""
    rpc.replies = [Reply(code=grpc.StatusCode[code], retry_delay=12.5)]
    assert deliver(rpc, MemoryOutbox([span(1)])).step() == 12.5


def test_grpc_poison_and_size(rpc: GrpcReceiver) -> None:
    """INVALID_ARGUMENT is narrowed down to the span; a message beyond the limit is halved."""
    bad = Reply(code=grpc.StatusCode.INVALID_ARGUMENT, message="bad span")
    large = Reply(code=grpc.StatusCode.RESOURCE_EXHAUSTED, message="Received message larger than max (9 vs. 4)")
    rpc.rule = lambda spans: large if len(spans) > 10 else refusing({7}, bad)(spans)
    outbox = MemoryOutbox([span(n) for n in range(1, 41)])
    drain(deliver(rpc, outbox))
    assert sorted(rpc.numbers) == [n for n in range(1, 41) if n != 7]
    assert outbox.dropped == [(7, "refused")]


def test_grpc_partial_success_and_garbage(rpc: GrpcReceiver) -> None:
    """Rejected spans are counted; a success whose body is nonsense is no success."""
    rpc.replies = [Reply(body=b"\xff\xff\xff", store=False), Reply(rejected=1)]
    worker = deliver(rpc, MemoryOutbox([span(1), span(2)]))
    assert drain(worker) == [1, 0]
    assert worker.counts.dropped["rejected"] == 1


def test_grpc_collector_down_hanging_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listening, then nobody answering, then all is well: everything is there."""
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
    port, receiver, outbox = free_port(), GrpcReceiver(), MemoryOutbox([span(n) for n in range(1, 4)])
    receiver.address = f"127.0.0.1:{port}"
    worker = deliver(receiver, outbox, timeout=0.5)
    assert [worker.step(), worker.step()] == [1, 2]
    assert outbox.size() == 3
    receiver.replies = [Reply(hang=True)]
    with grpc_receiver(port=port, receiver=receiver):
        assert worker.step() == 4
        assert "DEADLINE_EXCEEDED" in worker.counts.last_error
        drain(worker)
    assert receiver.numbers == [1, 2, 3]
