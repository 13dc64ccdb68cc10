"""Collectors that are down, refuse, hang, lie and come back: every span arrives, and what cannot is counted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otlp_receiver import (
    Clock,
    HttpReceiver,
    MemoryOutbox,
    Reply,
    deliver,
    drain,
    free_port,
    http_receiver,
    refusing,
    span,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def http() -> Iterator[HttpReceiver]:
    with http_receiver() as receiver:
        yield receiver


@pytest.mark.parametrize("reply", [
    Reply(429), Reply(502), Reply(503), Reply(504), Reply(500), Reply(408), Reply(reset=True),
    Reply(body=b"\xff\xff\xff", store=False), Reply(cut_body=True, store=False),
    Reply(cut_headers=True, store=False),
    Reply(body=b"{", content_type="application/json", store=False),
], ids=["429", "502", "503", "504", "500", "408", "reset", "garbage", "cut off", "headers cut off", "broken JSON"])
def test_a_temporary_failure_costs_nothing_but_delay(http: HttpReceiver, reply: Reply) -> None:
    """After three failures in a row, everything arrives once and in order; nothing was dropped."""
    http.replies = [reply] * 3
    outbox = MemoryOutbox([span(n) for n in range(1, 6)])
    worker = deliver(http, outbox)
    assert drain(worker) == [1.0, 2.0, 4.0, 0.0]
    assert http.numbers == [1, 2, 3, 4, 5]
    assert (worker.counts.exported, worker.counts.failed, worker.counts.consecutive) == (5, 3, 0)
    assert outbox.dropped == []


def test_the_backoff_is_bounded_and_starts_over_after_a_success(http: HttpReceiver) -> None:
    """Ceilings double from a second to a minute, and begin at a second again once something went through."""
    http.replies = [Reply(503)] * 9 + [Reply()] + [Reply(503)]
    outbox = MemoryOutbox([span(1)])
    worker = deliver(http, outbox)
    assert [worker.step() for _ in range(10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60, 0]
    outbox.add(span(2))
    assert worker.step() == 1


def test_the_jitter_spreads_over_the_whole_delay(http: HttpReceiver) -> None:
    """The wait is drawn between nothing and the ceiling."""
    asked = []

    def jitter(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    http.replies = [Reply(503)] * 3
    assert drain(deliver(http, MemoryOutbox([span(1)]), jitter=jitter)) == [0, 0, 0, 0]
    assert asked == [(0, 1), (0, 2), (0, 4)]


@pytest.mark.parametrize(("headers", "delay"), [
    ({"retry-after": "17"}, 17), ({"retry-after": "99999"}, 600), ({"retry-after": "0"}, 1),
    ({"retry-after": "soon"}, 1), ({"retry-after": "-5"}, 1),
    # The date is read by the server's clock. (The receiver's own Date header is sent first, and wins.)
    ({"retry-after": "Thu, 01 Jan 1970 00:00:07 GMT"}, 1), ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 600),
])
def test_retry_after_is_honoured(http: HttpReceiver, headers: dict[str, str], delay: float) -> None:
    """Seconds and dates, ten minutes at most; nonsense and the past count as nothing."""
    http.replies = [Reply(429, headers)]
    assert deliver(http, MemoryOutbox([span(1)])).step() == delay


def test_a_collector_that_was_down_gets_everything_when_it_comes_back() -> None:
    """Connection refused keeps the spans; at the same address, a collector started later has them all."""
    port, outbox, receiver = free_port(), MemoryOutbox([span(n) for n in range(1, 1301)]), HttpReceiver()
    receiver.url = f"http://127.0.0.1:{port}"
    worker = deliver(receiver, outbox)
    assert [worker.step() for _ in range(3)] == [1, 2, 4]
    assert outbox.size() == 1300
    with http_receiver(port=port, receiver=receiver):
        drain(worker)
    assert receiver.numbers == list(range(1, 1301))


@pytest.mark.parametrize("reply", [Reply(hang=True), Reply(drip=True), Reply(hang=True, store=True)],
                         ids=["silent", "a byte at a time", "silent, but has stored it"])
def test_a_collector_that_hangs_is_left_in_time(http: HttpReceiver, reply: Reply) -> None:
    """A request ends at its timeout even while bytes keep coming. What was stored comes again under the same ids."""
    http.replies = [reply]
    worker = deliver(http, MemoryOutbox([span(1), span(2)]), timeout=0.3)
    assert worker.step() == 1
    assert worker.counts.last_error == "no answer in time"
    drain(worker)
    assert set(http.numbers) == {1, 2}
    assert len(http.numbers) == (4 if reply.stores else 2)


def test_an_unknown_host_and_a_server_without_http_are_temporary() -> None:
    """DNS failures and answers that are no HTTP keep the spans, and are named."""
    receiver, outbox = HttpReceiver(), MemoryOutbox([span(1)])
    receiver.url = "http://collector.invalid:4318"
    worker = deliver(receiver, outbox)
    assert worker.step() == 1
    assert worker.counts.last_error
    assert outbox.size() == 1


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405, 415])
def test_a_wrong_setting_loses_no_span(http: HttpReceiver, status: int, caplog: pytest.LogCaptureFixture) -> None:
    """A status that an operator can repair holds the spans, says so once as an error, and retries slowly."""
    http.replies = [Reply(status, {"location": f"{http.url}/elsewhere"})] * 4
    outbox = MemoryOutbox([span(1), span(2)])
    worker = deliver(http, outbox)
    with caplog.at_level(logging.INFO):
        assert drain(worker) == [60, 60, 60, 60, 0]
    assert http.numbers == [1, 2]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert all(headers[":path"] == "/v1/traces" for headers in http.headers)


def test_a_log_in_page_is_no_yes(http: HttpReceiver) -> None:
    """A success in HTML is a proxy talking, not a collector: the spans stay."""
    http.replies = [Reply(body=b"<html>log in</html>", content_type="text/html; charset=utf-8", store=False)]
    assert drain(deliver(http, MemoryOutbox([span(1)]))) == [60, 0]
    assert http.numbers == [1]


@pytest.mark.parametrize(("body", "content_type", "rejected"), [
    (b"", "application/x-protobuf", 0), (b"{}", "application/json", 0), (b"ok", "text/plain", 0),
    (b'{"partialSuccess":{"rejectedSpans":"1"}}', "application/json", 1),
])
def test_collectors_may_say_yes_in_their_own_way(http: HttpReceiver, body: bytes, content_type: str,
                                                 rejected: int) -> None:
    """An empty body, JSON, and plain text are accepted; JSON is read for a partial success."""
    http.replies = [Reply(body=body, content_type=content_type)]
    outbox = MemoryOutbox([span(1), span(2)])
    worker = deliver(http, outbox)
    assert drain(worker) == [0]
    assert (worker.counts.exported, worker.counts.dropped["rejected"]) == (2 - rejected, rejected)


@pytest.mark.parametrize("bad", [{1}, {5}, {200}, {512}, {3, 4}, {1, 100, 512}])
def test_only_the_poisoned_spans_are_dropped(http: HttpReceiver, bad: set[int]) -> None:
    """A 400 is narrowed down in few requests: every other span arrives once, the bad ones are dropped and counted."""
    http.rule = refusing(bad, Reply(400, body=b"\x08\x03\x12\x08bad span"))
    outbox = MemoryOutbox([span(n) for n in range(1, 601)])
    worker = deliver(http, outbox)
    drain(worker)
    assert sorted(http.numbers) == [n for n in range(1, 601) if n not in bad]
    assert outbox.dropped == [(n, "refused") for n in sorted(bad)]
    assert worker.counts.dropped["refused"] == len(bad)
    assert worker.counts.exported == 600 - len(bad)
    assert len(http.requests) <= 2 + 20 * len(bad)


def test_many_poisoned_spans_take_several_passes_of_bounded_work(http: HttpReceiver) -> None:
    """One pass sends 65 requests at most, and still every pass gets somewhere."""
    bad = set(range(1, 513, 2))
    http.rule = refusing(bad, Reply(422))
    worker = deliver(http, MemoryOutbox([span(n) for n in range(1, 513)]))
    passes = 0
    while (before := len(http.requests), worker.step())[1] is not None:
        passes += 1
        assert len(http.requests) - before <= 65
    assert passes > 1
    assert sorted(http.numbers) == sorted(set(range(1, 513)) - bad)
    assert worker.counts.dropped["refused"] == len(bad)


def test_one_span_alone_is_dropped_when_an_empty_request_passes(http: HttpReceiver) -> None:
    """With nothing else to send, an empty request shows that the collector works and the span is to blame."""
    http.rule = refusing({1}, Reply(400))
    outbox = MemoryOutbox([span(1)])
    assert drain(deliver(http, outbox)) == [0]
    assert outbox.dropped == [(1, "refused")]


def test_a_server_that_refuses_everything_is_not_believed(http: HttpReceiver) -> None:
    """Plain HTTP sent to a TLS port is answered with 400 whatever is in it: nothing is dropped."""
    http.rule = lambda spans: Reply(400, body=b"Client sent an HTTP request to an HTTPS server.",
                                    content_type="text/plain")
    outbox = MemoryOutbox([span(n) for n in range(1, 601)])
    worker = deliver(http, outbox)
    assert [worker.step() for _ in range(3)] == [60, 60, 60]
    assert outbox.size() == 600
    assert outbox.dropped == []
    assert "HTTPS server" in worker.counts.last_error
    assert len(http.requests) <= 3 * 65
    http.rule = lambda spans: Reply()
    drain(worker)
    assert http.numbers == list(range(1, 601))


@pytest.mark.parametrize("most", [1, 3, 100])
def test_too_large_is_sent_in_smaller_pieces(http: HttpReceiver, most: int) -> None:
    """413 halves the batch until it fits; order is kept and nothing is dropped."""
    http.rule = lambda spans: Reply() if len(spans) <= most else Reply(413)
    outbox = MemoryOutbox([span(n) for n in range(1, 201)])
    drain(deliver(http, outbox))
    assert http.numbers == list(range(1, 201))
    assert outbox.dropped == []


def test_a_span_that_is_too_large_alone_is_dropped(http: HttpReceiver) -> None:
    """The one span that no request can be small enough for is counted as too_large."""
    http.rule = refusing({3}, Reply(413))
    outbox = MemoryOutbox([span(n) for n in range(1, 9)])
    drain(deliver(http, outbox))
    assert sorted(http.numbers) == [1, 2, 4, 5, 6, 7, 8]
    assert outbox.dropped == [(3, "too_large")]


def test_a_batch_of_large_spans_is_split_before_it_is_sent(http: HttpReceiver) -> None:
    """No request of more than one span exceeds what gRPC servers take."""
    spans = [span(n, attributes={"text": "x" * 1_500_000}) for n in range(1, 7)]
    drain(deliver(http, MemoryOutbox(spans)))
    assert http.numbers == [1, 2, 3, 4, 5, 6]
    assert max(len(raw) for raw in http.raw) <= 4 * 1024 * 1024


def test_a_collector_that_breaks_over_one_span_does_not_stop_the_others(http: HttpReceiver) -> None:
    """After a while of HTTP 500 the cause is narrowed down; it is dropped only because others were accepted."""
    http.rule = refusing({2}, Reply(500))
    outbox = MemoryOutbox([span(n) for n in range(1, 9)])
    delays = drain(deliver(http, outbox))
    assert delays == [1, 2, 4, 8, 16, 0]
    assert sorted(http.numbers) == [1, 3, 4, 5, 6, 7, 8]
    assert outbox.dropped == [(2, "refused")]


def test_a_collector_that_breaks_over_everything_loses_nothing(http: HttpReceiver) -> None:
    """HTTP 500 for every span, while empty requests pass, is a broken store behind it: the spans wait."""
    http.rule = lambda spans: Reply(500) if spans else Reply()
    outbox = MemoryOutbox([span(n) for n in range(1, 5)])
    worker = deliver(http, outbox)
    for _ in range(12):
        worker.step()
    assert outbox.dropped == []
    http.rule = lambda spans: Reply()
    drain(worker)
    assert http.numbers == [1, 2, 3, 4]


@pytest.mark.parametrize(("said", "counted"), [(2, 2), (0, 0), (99, 5), (-1, 0)])
def test_a_partial_success_is_counted_and_not_repeated(http: HttpReceiver, said: int, counted: int) -> None:
    """The batch is done; as many as the collector says are counted as rejected, within reason."""
    http.replies = [Reply(rejected=said, message="no such tenant")]
    outbox = MemoryOutbox([span(n) for n in range(1, 6)])
    worker = deliver(http, outbox)
    assert drain(worker) == [0]
    assert len(http.requests) == 1
    assert worker.counts.dropped["rejected"] == counted
    assert worker.counts.exported == 5 - counted


def test_a_span_that_the_protocol_cannot_carry_harms_no_other(http: HttpReceiver) -> None:
    """Ids of the wrong length, numbers beyond 64 bits and half characters are dropped as invalid, and counted."""
    outbox = MemoryOutbox([
        span(1), span(2, trace="12"), span(3, attributes={"n": 2**64}), span(4, name="\ud800"), span(5, start=-1),
        span(6, trace="0" * 32), span(7)])
    worker = deliver(http, outbox)
    drain(worker)
    assert http.numbers == [1, 7]
    assert outbox.dropped == [(n, "invalid") for n in (2, 3, 4, 5, 6)]
    assert worker.counts.dropped["invalid"] == 5


def test_a_collector_that_goes_away_within_a_refused_batch(http: HttpReceiver) -> None:
    """What was accepted before it went is not sent again, what was not stays, and the backoff begins anew."""
    http.replies = [Reply(503), Reply(503), Reply(400), Reply(), Reply(reset=True)]
    outbox = MemoryOutbox([span(n) for n in range(1, 5)])
    worker = deliver(http, outbox)
    assert [worker.step() for _ in range(3)] == [1, 2, 1]
    assert list(outbox.rows) == [3, 4]
    drain(worker)
    assert http.numbers == [1, 2, 3, 4]


def test_no_request_goes_on_past_the_deadline_of_the_last_flush(http: HttpReceiver) -> None:
    """Once a deadline is set, requests get what is left of it, delays are short, and afterwards nothing is sent."""
    clock = Clock()
    outbox = MemoryOutbox([span(1)])
    worker = deliver(http, outbox, clock=clock)
    http.replies = [Reply(503, {"retry-after": "300"}), Reply(hang=True)]
    worker.deadline = clock.now + 0.2
    assert worker.step() == 1
    assert worker.step() == 1
    assert worker.counts.last_error == "no answer in time"
    clock.now += 0.3
    worker.step()
    assert len(http.requests) == 2
    assert outbox.size() == 1


def test_an_error_message_does_not_repeat_the_token(http: HttpReceiver) -> None:
    """A server that echoes the request's credentials does not get them into logs or metrics."""
    http.replies = [Reply(401, body=b"unknown token sesame-open-1234", content_type="text/plain")]
    worker = deliver(http, MemoryOutbox([span(1)]), headers={"authorization": "Bearer sesame-open-1234"})
    worker.step()
    assert worker.counts.last_error == "HTTP 401: unknown token ***"


_TROUBLE = st.sampled_from([
    Reply(), Reply(400), Reply(401), Reply(413), Reply(429, {"retry-after": "3"}), Reply(500), Reply(503),
    Reply(reset=True), Reply(cut_body=True, store=False), Reply(reset=True, store=True)])


@settings(max_examples=60, deadline=None)
@given(trouble=st.lists(_TROUBLE, max_size=25), bad=st.sets(st.integers(1, 40), max_size=4),
       later=st.integers(0, 10))
def test_whatever_happens_every_span_arrives_or_is_counted(trouble: list[Reply], bad: set[int], later: int) -> None:
    """Over any history of answers: no id but those sent, none missing that was not counted, counts that add up.

    A collector that takes one batch and refuses another at will can have a good span dropped as refused; nothing
    but a refusal can.
    """
    with http_receiver() as receiver:
        receiver.replies = list(trouble)
        receiver.rule = refusing(bad, Reply(400))
        outbox = MemoryOutbox([span(n) for n in range(1, 31)])
        worker = deliver(receiver, outbox)
        for _ in range(5):
            worker.step()
        outbox.add(*(span(n) for n in range(31, 31 + later)))
        drain(worker)
    everything, dropped = set(range(1, 31 + later)), {number for number, _ in outbox.dropped}
    assert set(receiver.numbers) | dropped == everything
    assert worker.counts.exported + len(outbox.dropped) == len(everything)
    if not any(reply.status in {400, 413, 500} for reply in trouble):
        assert dropped <= bad
    if not any(reply.reset and reply.stores for reply in trouble):
        assert len(receiver.numbers) == len(set(receiver.numbers))
