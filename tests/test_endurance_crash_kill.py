"""`kill -9` of the running program, at every kind of instant, with everything that can be going on: nothing is lost."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash_support import Fleet, Watch, as_text, end_of_log, kill_at_write, kill_in_commit, stored, uninterrupted
from otlp_receiver import HttpReceiver, Reply, http_receiver
from process_support import Exporter, free_port, wait_for
from spans_process_support import PENDING, received
from support import total

WHEN = ("starting", "first step", "steady", "commit", "checkpoint")


class Collector:
    """A collector that, for the length of a block, is down, refuses, resets, and forgets to answer. Then it is good."""

    def __init__(self, seed: int) -> None:
        self.port, self.receiver = free_port(), HttpReceiver()
        self._chance, self._stop = random.Random(seed), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _rule(self, _: list[Any]) -> Reply:
        return self._chance.choice((Reply(), Reply(), Reply(status=503), Reply(reset=True),
                                    Reply(reset=True, store=True), Reply(status=429, headers={"retry-after": "1"})))

    def __enter__(self) -> HttpReceiver:
        self.receiver.rule = self._rule
        self._thread.start()
        return self.receiver

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.receiver.rule = lambda _: Reply()

    def _run(self) -> None:
        while not self._stop.is_set():
            with http_receiver(port=self.port, receiver=self.receiver):
                self._stop.wait(self._chance.uniform(0.5, 2))
            self._stop.wait(self._chance.uniform(0.2, 1))


def test_kill_9_at_any_instant_loses_nothing_and_takes_nothing_back(
    amount: Callable[[int, int], int], tmp_path: Path
) -> None:
    """Starting, in the first step, in between, while pages of a commit are written and while they are copied.

    Totals are those of an uninterrupted run and of the truth, no counter falls between any two scrapes, and each span
    arrives under one id with one content.
    """
    seed, kills = 20, amount(10, 510)
    chance, when, torn = random.Random(seed), Counter[str](), 0
    fleet, collector, state = Fleet(tmp_path, seed), Collector(seed), tmp_path / "state.db"
    flags = [*fleet.flags, f"--otlp.endpoint=http://127.0.0.1:{collector.port}", "--otlp.timeout=2s"]
    with Exporter(tmp_path, *flags) as exporter, Watch(exporter, every=0.05) as scrapes:
        with collector as receiver, fleet:
            for number in range(kills):
                moment = WHEN[number % len(WHEN)]
                if moment == "starting":
                    time.sleep(chance.uniform(0, 0.5))  # the random instants that this test is about
                else:
                    exporter.wait_until_listening()
                    if moment == "first step":
                        time.sleep(chance.uniform(0, 0.05))
                    elif moment == "steady":
                        time.sleep(chance.uniform(0.1, 0.6))
                    elif moment == "commit":
                        kill_in_commit(
                            exporter.pid, state, fleet.burst.set, chance.randrange(1, 150_000), seconds=0.5)
                    else:
                        kill_at_write(exporter.pid, state, fleet.burst.set, seconds=2)
                exporter.signal(signal.SIGKILL)
                assert exporter.wait() == -signal.SIGKILL
                when[moment] += 1
                torn += end_of_log(state)[1]
                exporter.start(wait=False)
        exporter.wait_until_listening()
        wait_for(lambda: exporter.get("/-/ready").status == 200, "readiness", deadline=120)
        exporter.scrape()
        final = exporter.scrape()
        expected, ids = uninterrupted(fleet, tmp_path / "uninterrupted")
        with http_receiver(port=collector.port, receiver=receiver):
            wait_for(lambda: ids <= {span.span_id.hex() for span in list(receiver.spans)}, "all spans", deadline=120)
            wait_for(lambda: total(exporter.scrape(), PENDING) == 0, "an empty outbox")
        assert exporter.terminate() == 0
    arrived = received(receiver)
    print(f"seed {seed}: {kills} kills ({as_text(when)}), {torn} left half a commit; {fleet.actions} actions, "
          f"{scrapes.count} scrapes, {len(arrived)} spans in {len(receiver.spans)} deliveries")
    assert scrapes.fallen == []
    assert fleet.differences(final) == []
    assert stored(state) == expected
    assert arrived.keys() == ids
    assert {span: arrived[span] for span in fleet.spans()} == fleet.spans()
    assert exporter.logged("Traceback") == []

