"""Spans of the running program: what arrives at a collector, what does not leave, and the metrics made of turns."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from agents_support import PiInstance, PiLog
from coding_agent_exporter.spanmodel import Span
from otlp_receiver import HttpReceiver, http_receiver
from process_support import Exporter, wait_for
from spans_process_support import (
    OPENMETRICS,
    PENDING,
    LiveSession,
    age,
    attributes,
    by_id,
    flat,
    golden,
    planted,
    received,
    wait_until_received,
)
from spans_support import SPANS, recorded, tree
from support import CAPTURES, Samples, parse, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECORDINGS = {"pi": CAPTURES / "pi" / "sessions", "oh-my-pi": CAPTURES / "oh-my-pi" / "sessions",
              "cases": SPANS / "cases"}
HISTOGRAMS = ("coding_agent_turn_duration_seconds", "coding_agent_tool_duration_seconds",
              "coding_agent_time_to_first_token_seconds")
LONG_QUIET = "UPDATE accounts SET touched = touched - 7200"
"""Sessions were last written to two hours ago."""


def drop_in(source: Path, target: Path) -> None:
    """Copy a recording; it appears at once, and was written two hours ago."""
    beside = target.with_name(f"{target.name}.tmp")
    shutil.copytree(source, beside)
    before = time.time() - 7200
    for path in beside.rglob("*"):
        os.utime(path, (before, before))
    beside.rename(target)


def session_flags(home: Path) -> list[str]:
    return [f"--sessions.dir={agent}={home / agent}" for agent in RECORDINGS]


# --- the recordings

@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Exporter, HttpReceiver]]:
    """An exporter that runs while the recordings appear, with the collector that has got all their spans."""
    home = tmp_path_factory.mktemp("recordings")
    with http_receiver() as receiver, Exporter(
        home, f"--otlp.endpoint={receiver.url}", "--otlp.backfill", *session_flags(home),
        env={"OTEL_RESOURCE_ATTRIBUTES": "team=a,k8s.node.name=n1", "OTEL_SERVICE_NAME": "agents"},
    ) as exporter:
        exporter.scrape()
        for agent, source in RECORDINGS.items():
            drop_in(source, home / agent)
        exporter.scrape()
        # One run of oh-my-pi breaks off: it is over once its session has been quiet for long.
        wait_for(lambda: len(receiver.spans) >= len(flat(golden(*RECORDINGS))) - 1, "the spans to arrive")
        exporter.terminate()
        age(exporter, LONG_QUIET)
        exporter.start()
        wait_for(lambda: len(receiver.spans) >= len(flat(golden(*RECORDINGS))), "the last run to arrive")
        yield exporter, receiver


def test_what_arrives_of_the_recordings_are_the_golden_spans(replayed: tuple[Exporter, HttpReceiver]) -> None:
    """Dropped into the directories of the running program: ids, parents, kinds, names, times, attributes, and once."""
    _, receiver = replayed
    made = [span for agent in RECORDINGS for span in recorded(agent)]
    assert received(receiver) == by_id(made)
    assert len(receiver.spans) == len(made)
    for agent in RECORDINGS:
        ids = {span.span for span in recorded(agent)}
        assert tree([span for span in received(receiver).values() if span.span in ids]) == golden(agent)


def test_the_resource_and_scope_say_who_sends(replayed: tuple[Exporter, HttpReceiver]) -> None:
    """Service, host and what the variables add, the same over a restart; the scope is the program with its version."""
    _, receiver = replayed
    resources = [found for request in receiver.requests for found in request.resource_spans]
    first = attributes(resources[0].resource.attributes)
    assert all(attributes(found.resource.attributes) == first for found in resources)
    assert len(receiver.requests) >= 2
    assert first.items() >= {"service.name": "agents", "team": "a", "k8s.node.name": "n1"}.items()
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", str(first["service.instance.id"]))
    assert {"host.name", "service.version"} <= first.keys()
    scopes = {(scope.scope.name, scope.scope.version) for found in resources for scope in found.scope_spans}
    assert scopes == {("coding_agent_exporter", first["service.version"])}


def test_turns_and_tools_are_counted_as_in_the_golden_spans(replayed: tuple[Exporter, HttpReceiver]) -> None:
    """Counters by agent, stop reason, tool and outcome; histograms are cumulative and sum up to the spans' times."""
    exporter, _ = replayed
    exporter.scrape()
    samples = exporter.scrape()
    for agent in RECORDINGS:
        found = flat(golden(agent))
        turns = [span for span in found if span["name"] == "turn"]
        stops = Counter(span["attributes"]["gen_ai.response.finish_reasons"][0] for span in found
                        if span["name"].startswith("chat "))
        tools = Counter((span["attributes"]["gen_ai.tool.name"], _outcome(span)) for span in found
                        if span["name"].startswith("execute_tool "))
        assert len(turns) == stops.total() > 0
        assert total(samples, "coding_agent_turns_total", root=agent) == len(turns)
        for stop, count in stops.items():
            assert total(samples, "coding_agent_turns_total", root=agent, stop_reason=stop) == count
        assert total(samples, "coding_agent_tool_calls_total", root=agent) == tools.total()
        for (tool, outcome), count in tools.items():
            assert total(samples, "coding_agent_tool_calls_total", root=agent, tool=tool, outcome=outcome) == count
        turn, tool = HISTOGRAMS[:2]
        assert total(samples, f"{turn}_count", root=agent) == len(turns)
        assert total(samples, f"{tool}_count", root=agent) == tools.total()
        assert total(samples, f"{turn}_sum", root=agent) == pytest.approx(sum(map(_seconds, turns)), abs=1e-3)
    assert _broken_histograms(samples) == []
    assert {key[0].removesuffix("_count") for key in samples if key[0].endswith("_count")} >= set(HISTOGRAMS)


def _outcome(span: dict[str, Any]) -> str:
    return {"": "ok", "tool_error": "error"}.get(span.get("error", ""), "unknown")


def _seconds(span: dict[str, Any]) -> float:
    return (datetime.fromisoformat(span["end"]) - datetime.fromisoformat(span["start"])).total_seconds()


def _broken_histograms(samples: Samples) -> list[str]:
    """Series whose buckets fall, or whose last bucket is not their count, or that lack a part."""
    buckets: dict[tuple[str, frozenset[tuple[str, str]]], dict[float, float]] = {}
    for (name, labels), value in samples.items():
        if name.endswith("_bucket"):
            rest = frozenset(pair for pair in labels if pair[0] != "le")
            buckets.setdefault((name.removesuffix("_bucket"), rest), {})[float(dict(labels)["le"])] = value
    found = []
    for (name, labels), values in buckets.items():
        counts = [values[bound] for bound in sorted(values)]
        if counts != sorted(counts) or samples.get((f"{name}_count", labels)) != values.get(float("inf")):
            found.append(f"{name} {dict(labels)}: {values}")
        if (f"{name}_sum", labels) not in samples:
            found.append(f"{name} {dict(labels)} has no sum")
    return found


# --- metrics

def test_exemplars_lead_to_traces_that_the_collector_has(tmp_path: Path) -> None:
    """OpenMetrics has the span of a turn or tool call on its bucket, and parses; the classic format has none."""
    with http_receiver() as receiver, Exporter(
        tmp_path, f"--otlp.endpoint={receiver.url}", *session_flags(tmp_path)
    ) as exporter:
        exporter.scrape()
        drop_in(RECORDINGS["pi"], tmp_path / "pi")  # from before the first start: its traces are not sent
        session = LiveSession(tmp_path / "cases")
        session.prompt(("1:read", "2:bash"), ("1:edit",))
        exporter.scrape()
        wait_until_received(receiver, by_id(session.spans))
        text = exporter.get(headers=OPENMETRICS).text
        classic = exporter.get().text
    marks: dict[str, list[Any]] = {}
    for family in parse_openmetrics(text):  # type: ignore[no-untyped-call]  # prometheus_client
        for sample in family.samples:
            if sample.exemplar is not None:
                assert sample.name.endswith("_bucket")
                marks.setdefault(sample.name.removesuffix("_bucket"), []).append(sample.exemplar.labels)
    assert marks.keys() == set(HISTOGRAMS[:2])
    sent = {(span.trace, span.span): span.name for span in session.spans}
    for name, found in marks.items():
        names = {sent.get((mark["trace_id"], mark["span_id"]), "not sent").split()[0] for mark in found}
        assert names == {"turn" if "turn" in name else "execute_tool"}
    assert '# {trace_id="' in text
    assert "trace_id" not in classic


def test_promtool_finds_nothing_in_the_histograms(
    replayed: tuple[Exporter, HttpReceiver], tool: Callable[[str], str]
) -> None:
    """Turns, tools and first tokens of all recordings, with what the exporter says of its spans."""
    exporter, _ = replayed
    page = exporter.get().body
    assert all(f"# TYPE {name} histogram".encode() in page for name in HISTOGRAMS)
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=page, capture_output=True, check=False)
    assert (done.stdout + done.stderr).decode() == ""
    assert done.returncode == 0


def test_counts_of_turns_begin_at_zero_and_outlive_a_restart(tmp_path: Path) -> None:
    """A first turn is an increase that `increase()` sees, in every series of a histogram; kill -9 changes nothing."""
    with Exporter(tmp_path, f"--sessions.dir=pi={tmp_path / 'pi'}") as exporter:
        exporter.scrape()
        session = LiveSession(tmp_path / "pi")
        session.prompt(("1:read",), ("1:read", "2:bash"), failed="2")
        first, second = _of_turns(exporter.scrape()), _of_turns(exporter.scrape())
        assert first.keys() == second.keys()
        assert set(first.values()) == {0.0}
        assert total(second, "coding_agent_turns_total") == 3
        assert total(second, "coding_agent_tool_calls_total", outcome="ok") == 2
        assert total(second, "coding_agent_tool_calls_total", outcome="error") == 1
        assert _broken_histograms(second) == []
        exporter.kill()
        exporter.start()
        assert _of_turns(exporter.scrape()) == second
        session.prompt(("1:read",))
        third = _of_turns(exporter.scrape())
        assert total(third, "coding_agent_turns_total") == 5
        assert third.keys() == second.keys()


def _of_turns(samples: Samples) -> Samples:
    names = ("coding_agent_turns", "coding_agent_turn_", "coding_agent_tool_")
    return {key: value for key, value in samples.items() if key[0].startswith(names)}


# --- what is sent, and what is not

def test_what_ended_before_the_first_start_is_not_sent(tmp_path: Path) -> None:
    """Recordings and an old session give no span, also after a restart; a session that is written now gives all."""
    with http_receiver() as receiver, Exporter(
        tmp_path, f"--otlp.endpoint={receiver.url}", *session_flags(tmp_path)
    ) as exporter:
        exporter.scrape()
        for agent, source in RECORDINGS.items():
            drop_in(source, tmp_path / agent)
        LiveSession(tmp_path / "pi", ago=3600).prompt(("1:bash",))
        live = LiveSession(tmp_path / "pi")
        live.prompt(("1:bash", "2:read"))
        exporter.scrape()
        wait_until_received(receiver, by_id(live.spans))
        exporter.terminate()
        exporter.start()
        live.prompt(("1:bash",))
        LiveSession(tmp_path / "pi", ago=900).prompt()
        exporter.scrape()
        exporter.terminate()
        wait_until_received(receiver, by_id(live.spans))


def test_a_session_that_is_seen_again_adds_nothing(tmp_path: Path) -> None:
    """Copied to another root, forked, moved, cut off and written anew: each turn is sent once, under one id."""
    roots = [f"--sessions.dir={name}={tmp_path / name}" for name in ("a", "b", "c")]
    with http_receiver() as receiver, Exporter(tmp_path, f"--otlp.endpoint={receiver.url}", *roots) as exporter:
        exporter.scrape()
        session = LiveSession(tmp_path / "a")
        session.prompt(("1:read",), ("1:bash", "2:bash"))
        exporter.scrape()
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        exporter.scrape()
        fork = session.fork(tmp_path / "a")
        exporter.scrape()
        fork.prompt(("1:edit",))
        content = session.path.read_bytes()
        os.truncate(session.path, 0)
        exporter.scrape()
        session.path.write_bytes(content)
        exporter.scrape()
        moved = tmp_path / "c" / session.path.name
        moved.parent.mkdir()
        session.path.rename(moved)
        exporter.scrape()
        session.path = moved
        session.prompt(("1:read",))
        exporter.scrape()
        exporter.terminate()
        made = [*session.spans, *fork.spans]
        assert received(receiver) == by_id(made)
        assert len(receiver.spans) == len(made)


def test_usage_logs_give_one_span_for_each_message(tmp_path: Path) -> None:
    """OpenCode always: 46 spans without the six copies of a fork. pi when asked to, and then its session files none."""
    logs = [json.loads(line) for path in sorted((CAPTURES / "pi" / "agents").rglob("events.jsonl"))
            for line in path.read_text().splitlines()]
    with http_receiver() as receiver, Exporter(
        tmp_path, f"--otlp.endpoint={receiver.url}", "--otlp.backfill", "--otlp.pi-spans=usage",
        f"--usage.root=logs={tmp_path / 'logs'}", *session_flags(tmp_path),
    ) as exporter:
        exporter.scrape()
        drop_in(RECORDINGS["pi"], tmp_path / "pi")
        (tmp_path / "logs").mkdir()
        for agent in ("pi", "opencode"):
            for source in sorted((CAPTURES / agent / "agents").iterdir()):
                (tmp_path / "logs/agents").mkdir(exist_ok=True)
                drop_in(source, tmp_path / "logs/agents" / source.name)
        exporter.scrape()
        # The last message of each session of OpenCode is over once its log has been quiet.
        exporter.terminate()
        age(exporter, LONG_QUIET)
        exporter.start()
        wait_for(lambda: len(receiver.spans) >= 46 + len(logs), "the spans to arrive")
        exporter.terminate()
        found = received(receiver)
    assert len(found) == len(receiver.spans)
    assert {(span.kind, span.parent, span.attributes["gen_ai.operation.name"]) for span in found.values()} == {
        ("client", "", "chat")}
    opencode = [span for span in found.values() if str(span.attributes["gen_ai.conversation.id"]).startswith("ses_")]
    pi = [span for span in found.values() if span not in opencode]
    assert (len(opencode), len(pi)) == (46, len(logs))
    assert _cost(opencode) == pytest.approx(0.185294525, abs=1e-12)
    assert _cost(pi) == pytest.approx(sum(event["cost"]["total_cost_usd"] for event in logs), abs=1e-12)


def _cost(made: list[Span]) -> float:
    return sum(float(str(span.attributes.get("coding_agent.cost.usd", 0.0))) for span in made)


STRUCTURE = frozenset({
    "type", "role", "id", "parentId", "timestamp", "parentSession", "provider", "model", "modelId", "stopReason",
    "responseId", "toolCallId", "customType", "startedAt", "updatedAt",
    # of heartbeats and usage logs
    "source", "event_id", "session_id", "message_id", "cost_mode", "activity", "pressure", "lastEvent",
})
"""Fields whose text is a name, an id, a time or a code. All other text is content, or may be."""


def test_no_content_leaves(tmp_path: Path) -> None:
    """A secret in every text field of session files, usage logs and heartbeats: none is sent, served or logged."""
    marker = "hunter2-SECRET"
    instances = tmp_path / "instances"

    def plant(source: Path, target: Path) -> None:
        lines = [json.dumps(planted(json.loads(line), marker, STRUCTURE)) for line in source.read_text().splitlines()]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(f"{line}\n" for line in lines))

    with http_receiver() as receiver, Exporter(
        tmp_path, f"--otlp.endpoint={receiver.url}", "--otlp.backfill", "--telemetry.info-labels=", "--log.level=debug",
        f"--telemetry.dir=pi={instances}", f"--usage.root=logs={tmp_path / 'logs'}", *session_flags(tmp_path),
        "--telemetry.stale-after=1h",
    ) as exporter:
        exporter.scrape()
        for agent, source in RECORDINGS.items():
            for path in source.rglob("*.jsonl"):
                plant(path, tmp_path / agent / path.relative_to(source))
        for agent in ("pi", "opencode", "claude-code"):
            for path in (CAPTURES / agent / "agents").rglob("events.jsonl"):
                plant(path, tmp_path / "logs" / path.relative_to(CAPTURES / agent))
        _hostile(LiveSession(tmp_path / "pi"), marker)
        log = PiLog(tmp_path / "logs", "agent-live")
        log.append({**log.event("anthropic/opus", 1), "prompt": marker, "cwd": marker, "error": {"message": marker}})
        PiInstance(instances, 1).write(50)
        document = json.loads((instances / "1.json").read_text())
        document["messages"] = {"lastAssistantText": marker, "lastAssistantHtml": marker, "lastUserText": marker}
        document |= {"system": {"host": marker, "user": marker}, "extra": {"prompt": marker},
                     "workspace": {"cwd": marker, "git": {"branch": marker}}}
        document["session"] |= {"name": marker, "file": f"/{marker}.jsonl"}
        document["model"]["thinkingLevel"] = marker
        (instances / "1.json").write_text(json.dumps(document))
        exporter.scrape()
        wait_for(lambda: len(received(receiver)) > 200 and total(exporter.scrape(), PENDING) == 0, "the spans")
        pages = [exporter.get(path, headers).body for path in ("/metrics", "/", "/-/ready", f"/{marker[:0]}")
                 for headers in ({}, OPENMETRICS)]
        exporter.terminate()
    assert total(parse(pages[0].decode()), "coding_agent_instance_info") == 1
    leaving = b"".join([*(request.SerializeToString() for request in receiver.requests), *receiver.raw, *pages,
                        *(str(headers).encode() for headers in receiver.headers), "\n".join(exporter.lines).encode()])
    assert len(leaving) > 100_000
    assert b"hunter2" not in leaving


def _hostile(session: LiveSession, marker: str) -> None:
    """Every kind of text that the recordings happen not to hold."""
    session.entry("session_info", session.now(), name=marker)
    session.entry("label", session.now(), label=marker, targetId="00000001")
    session.entry("branch_summary", session.now(), summary=marker, fromId="00000001")
    session.entry("custom", session.now(), customType="note", data={"text": marker, marker: 1})
    session.entry("custom_message", session.now(), customType="note", content=marker, details={"x": marker})
    session.entry(marker, session.now(), summary=marker)
    session.user(session.now())
    session.call(session.now(), session.now(), "1:bash", errorMessage=marker, diagnostics={"error": marker},
                 api=marker, usage={"input": marker, "cost": {"total": marker, "currency": marker}}, ttft=marker)
    session.entry("compaction", session.now(), summary=marker, details={"readFiles": [marker]}, firstKeptEntryId=marker)
    session.result("1", session.now(), failed=True)
    session.call(session.now(), session.now(), stop=f"because {marker}", errorMessage=marker)
