"""Files that nobody meant well: the program counts what is good beside them, says what it left out, and stays small."""

from __future__ import annotations

import json
import os
import random
import threading
from typing import TYPE_CHECKING

import pytest

from agents_support import OpenCodeLog, PiInstance, PiLog, PiSession, Truth
from process_support import Exporter
from support import Samples, parse, total

if TYPE_CHECKING:
    from pathlib import Path

COST = "coding_agent_cost_usd_total"
REJECTED = "coding_agent_exporter_rejected_total"
FILES = "coding_agent_exporter_files"
MEMORY = 120 << 20
"""Bytes of resident memory that no input may drive the exporter past."""


def rejected(samples: Samples, kind: str) -> dict[str, float]:
    return {
        dict(labels)["reason"]: value for (name, labels), value in samples.items()
        if name == REJECTED and ("kind", kind) in labels
    }


def test_lines_that_are_none_are_counted_by_reason_and_cost_nothing_else(tmp_path: Path) -> None:
    """A line of 100 MB, binary garbage, JSON nested 100,000 deep, wrong types, between good messages."""
    log = PiLog(tmp_path / ".mngr", "agent-1")
    garbage = random.Random(3).randbytes(1_000_000).replace(b"\n", b" ")
    with Exporter(tmp_path) as exporter:
        log.message("anthropic/opus", 10**12)
        exporter.scrape()
        for _ in range(100):
            log.write(b"x" * (1 << 20))
        log.write(b"\n")
        log.message("anthropic/opus", 10**12)
        log.write(garbage + b"\n")
        log.write(b"[" * 100_000 + b"\n" + b'{"a":' * 100_000 + b"\n")
        log.write(b"\0" * 5000 + b"\n")
        log.write(b"\n \r\n")
        log.write(b"[]\n17\nnull\n")
        log.write(b'{"type": "other"}\n')
        good = log.event("anthropic/opus", 10**12)
        for wrong in (
            {"timestamp": "yesterday"}, {"timestamp": 17}, {"session_id": ""}, {"session_id": 5},
            {"event_id": None},
        ):
            log.append({**good, **wrong})
        costs: tuple[object, ...] = (-1, 1e300, "1", True, None, {})
        for cost in costs:
            log.append({**good, "event_id": f"cost-{cost}", "cost": {"total_cost_usd": cost}, "tokens": None})
        counts: tuple[object, ...] = (-1, 2**70, "1", True, {}, 1.5)
        for count in counts:
            log.append({**good, "event_id": f"tokens-{count}", "cost": None, "tokens": {"input": count}})
        log.append(good)
        log.message("anthropic/opus", 10**12)
        exporter.scrape()
        seen = exporter.scrape()
        memory = exporter.peak_memory()
    assert total(seen, COST) == pytest.approx(4, abs=1e-9)
    assert total(seen, COST, model="opus") == pytest.approx(4, abs=1e-9)
    reasons = rejected(seen, "usage")
    assert reasons.pop("not_json") >= 3
    assert reasons.pop("bad_cost") == 5
    assert reasons.pop("bad_tokens") == 6
    assert reasons == {"oversized": 1, "not_object": 3, "other_type": 1, "bad_timestamp": 2, "no_session": 2,
                       "no_identity": 1}
    assert memory < MEMORY


def test_half_an_emoji_costs_nothing(tmp_path: Path) -> None:
    """JavaScript cuts text in the middle of a character and writes the half: legal JSON, and the money is real."""
    log, session = PiLog(tmp_path / ".mngr", "agent-1"), PiSession(tmp_path / ".pi/agent/sessions")
    log.write(json.dumps(log.event("anthropic/cut", 10**12)).replace("cut", "cut\\ud83d").encode() + b"\n")
    session.message("anthropic", "haiku", 3 * 10**12)
    session.path.write_text(session.path.read_text().replace("done", "done \\ude00"))
    with Exporter(tmp_path) as exporter:
        exporter.scrape()
        seen = exporter.scrape()
    assert total(seen, COST, model="cut\ufffd") + total(seen, COST, model="cut?") == 1
    assert total(seen, COST, model="haiku") == 3


def test_things_in_the_place_of_logs_are_counted_as_unreadable(tmp_path: Path) -> None:
    """A FIFO, a directory, a link out of the root, a socketless device: none hangs the exporter or is read."""
    root = tmp_path / ".mngr"
    outside = PiLog(tmp_path / "elsewhere", "secret")
    outside.message("secret/model", 10**12)
    good = PiLog(root, "good")
    good.message("anthropic/opus", 10**12)
    places = [PiLog(root, f"bad-{number}").path for number in range(5)]
    for place in places:
        place.parent.mkdir(parents=True)
    os.mkfifo(places[0])
    places[1].mkdir()
    places[2].symlink_to(outside.path)
    places[3].symlink_to("/dev/zero")
    places[4].symlink_to(places[4])  # to itself
    sessions = tmp_path / ".pi/agent/sessions"
    session = PiSession(sessions)
    session.message("anthropic", "haiku", 10**12)
    os.mkfifo(sessions / "--srv-project--" / "pipe.jsonl")
    (sessions / "round").symlink_to(sessions)
    (sessions / "out").symlink_to(tmp_path / "elsewhere")
    closed = os.geteuid() != 0
    if closed:
        unreadable = PiLog(root, "closed")
        unreadable.message("anthropic/opus", 10**12)
        unreadable.path.chmod(0)
    with Exporter(tmp_path) as exporter:
        exporter.scrape()
        seen = exporter.scrape()
        assert exporter.terminate() == 0
    assert total(seen, COST) == 2
    assert total(seen, COST, model="opus") == 1
    assert total(seen, COST, model="haiku") == 1
    assert "secret" not in {dict(labels).get("provider") for _, labels in seen}
    assert total(seen, FILES, kind="usage", state="ok") == 1
    assert total(seen, FILES, kind="usage", state="unreadable") >= 4 + closed
    assert total(seen, FILES, kind="sessions", state="unreadable") >= 1
    for place in places[:4]:
        assert exporter.logged(str(place)), "the operator can find it"


def test_instance_files_that_are_none_are_counted_by_state(tmp_path: Path) -> None:
    """A FIFO, a link, a directory, two megabytes, garbage, deep nesting, another's pid: one good one is shown."""
    directory = tmp_path / ".pi/agent/telemetry/instances"
    good = PiInstance(directory, 1)
    good.write(42)
    os.mkfifo(directory / "2.json")
    (directory / "3.json").symlink_to(good.path)
    (directory / "4.json").mkdir()
    (directory / "5.json").write_bytes(b" " * (2 << 20))
    (directory / "6.json").write_bytes(random.Random(6).randbytes(3000))
    (directory / "7.json").write_bytes(b'{"process":' * 50_000)
    (directory / "8.json").write_bytes(good.path.read_bytes())
    (directory / "9.json").write_bytes(b'{"process": {"pid": 9, "updatedAt": 1e999}, "context": [], "state": 1}')
    with Exporter(tmp_path) as exporter:
        exporter.scrape()
        seen = exporter.scrape()
        memory = exporter.peak_memory()
    assert {dict(labels).get("pid") for _, labels in seen} == {None, "1"}
    assert [len(exporter.logged(str(directory / f"{pid}.json"))) for pid in range(1, 10)] == [0, *[1] * 8], "named once"
    assert total(seen, "coding_agent_context_percent", pid="1") == 42
    assert [total(seen, FILES, kind="telemetry", state=state) for state in ("ok", "unreadable", "invalid")] == [1, 4, 4]
    assert sum(rejected(seen, "telemetry").values()) == 8, "each once, not once a scrape"
    assert memory < MEMORY


def test_files_that_vanish_while_they_are_read_disturb_nothing(tmp_path: Path) -> None:
    """Logs, agents and instances come and go in a thread, faster than they can be read."""
    root, stop = tmp_path / ".mngr", threading.Event()
    steady = PiLog(root, "steady")

    def flicker() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            log, agent = PiLog(root, f"gone-{number % 7}"), PiInstance(tmp_path / ".pi/agent/telemetry/instances", 5)
            log.message("anthropic/flicker", 1)
            agent.write(number % 100)
            agent.remove()
            log.delete()

    thread = threading.Thread(target=flicker, daemon=True)
    with Exporter(tmp_path) as exporter:
        thread.start()
        try:
            for _ in range(100):
                steady.message("anthropic/opus", 10**9)
                exporter.scrape()
        finally:
            stop.set()
            thread.join()
        seen = exporter.scrape()
        assert not exporter.logged("Traceback")
    assert total(seen, COST, model="opus") == pytest.approx(0.1, abs=1e-9)


def test_20000_model_names_fit_into_500_series_and_no_cent_is_lost(tmp_path: Path) -> None:
    """What is beyond the limit counts as model="other"; a restart gives nobody another place."""
    chance, truth = random.Random(20_000), Truth()
    log = PiLog(tmp_path / ".mngr", "agent-1", truth)
    with Exporter(tmp_path, "--counters.max-series=500") as exporter:
        exporter.scrape()
        for _ in range(20):
            log.append(*[
                log.event(f"hostile/model-{chance.getrandbits(60)}", chance.randrange(1, 10**12), (1, 2, 3, 4))
                for _ in range(1000)
            ])
            seen = exporter.scrape()
        seen = exporter.scrape()
        memory = exporter.peak_memory()
        exporter.terminate()
        exporter.start()
        again = exporter.scrape()
    for samples in (seen, again):
        models = {dict(labels)["model"] for name, labels in samples if name == COST}
        assert len(models) <= 501
        assert total(samples, COST) == pytest.approx(truth.usd, abs=1e-8)
        assert total(samples, COST, model="other") > 0.9 * truth.usd
        assert total(samples, "coding_agent_tokens_total") == 200_000
        assert total(samples, "coding_agent_messages_total") == 20_000
    assert total(seen, "coding_agent_exporter_series_dropped_total") > 0
    assert memory < MEMORY


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_label_values_of_any_kind_come_through_as_they_are(accept: str, tmp_path: Path) -> None:
    """Quotes, line breaks, backslashes, emoji, separators, control characters; a megabyte is cut."""
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    names = ['a"b', "a\nb", "a\\b", "a\\nb", "a b", "\U0001f916", "\u2028", "}{", "a,b=c", "#", "\x01", "é" * 50]
    log = OpenCodeLog(tmp_path / ".mngr", "agent-1")
    agent = PiInstance(tmp_path / ".pi/agent/telemetry/instances", 1)
    with Exporter(tmp_path) as exporter:
        for name in names:
            log.message(f"p/{name}", 10**12)
        log.message("p/" + "long" * (1 << 18), 10**12)
        log.append({**next(log.events("p/after", 0, (0, 0, 0, 0))), "session_id": "s" * (1 << 20)})
        agent.write(1)
        agent.path.write_text(agent.path.read_text().replace("opus", "\\ud83d \\n\\u0000\\\" " + "x" * 100_000))
        exporter.scrape()
        text = exporter.get(headers={"Accept": accept}).text
    if accept == "text/plain":
        seen = parse(text)
    else:
        seen = {(sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]  # theirs
                for sample in family.samples}
    models = {dict(labels)["model"]: value for (name, labels), value in seen.items() if name == COST}
    assert {name: models.get(name) for name in names} == dict.fromkeys(names, 1)
    longest = max(models, key=len)
    assert (longest, models[longest]) == (("long" * 50), 1)
    shown = {dict(labels)["model"] for name, labels in seen if name == "coding_agent_instance_info"}
    assert len(shown) == 1
    assert len(shown.pop()) <= 200
