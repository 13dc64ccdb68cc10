"""What leaves, and by which way: every text field of every input has a marker of its own, and every output is searched.

The table in SECURITY.md is the whole list; what is not in it is content, or treated as such.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from otlp_receiver import http_receiver
from process_support import DEADLINE, Exporter, environment, wait_for
from security_support import Collector
from spans_process_support import OPENMETRICS, PENDING
from support import CAPTURES, DATA, total

if TYPE_CHECKING:
    from collections.abc import Iterator

SECURITY = Path(__file__).parent.parent / "SECURITY.md"

STRUCTURE = frozenset({"type", "role", "timestamp", "stopReason", "source", "cost_mode", "activity", "pressure",
                       "lastEvent", "reason"})
"""Fields with a code or a time, which is checked: text in its place costs the entry."""

LINKS = frozenset({"id", "parentId", "toolCallId", "firstKeptEntryId", "fromId", "targetId"})
"""Fields of a session file that name an entry or a call in another field: with markers they would not fit."""

OUTPUTS = ("metrics", "OTLP metrics", "spans", "page", "log", "state file", "check", "usage")

class Planter:
    """Puts markers into documents: `mk<number>x` at both ends of a text, the same for the same field of a kind."""

    def __init__(self) -> None:
        self.fields: list[str] = []
        self._numbers: dict[str, int] = {}

    def planted(self, kind: str, value: Any, path: str = "", field: str = "") -> Any:
        if isinstance(value, dict):
            # What a tool is called with, or has returned, is content under any key.
            kind_of = f"({value['type']})" if path and isinstance(value.get("type"), str) else ""
            return {key: self.planted(kind, inner, f"{path}{kind_of}.{key}".lstrip("."), key)
                    for key, inner in value.items()}
        if isinstance(value, list):
            return [self.planted(kind, inner, path, field) for inner in value]
        if not isinstance(value, str) or field in STRUCTURE or (kind == "session" and path and field in LINKS):
            return value
        return f"{self._marker(f'{kind} {path}')}{value}{self._marker(f'{kind} {path}')}"

    def line(self, kind: str, line: str) -> str:
        document = self.planted(kind, json.loads(line))
        if kind == "session" and document.get("type") == "session":
            document["id"] += self._marker("session id")
        return json.dumps(document)

    def text(self, kind: str) -> str:
        """A marker for something that is no field."""
        return self._marker(kind)

    def found(self, output: bytes) -> set[str]:
        """The fields whose marker is in these bytes."""
        return {self.fields[int(number)] for number in re.findall(rb"mk(\d+)x", output)}

    def _marker(self, field: str) -> str:
        number = self._numbers.setdefault(field, len(self._numbers))
        if number == len(self.fields):
            self.fields.append(field)
        return f"mk{number}x"


def sessions(planter: Planter, home: Path) -> Iterator[str]:
    """Recorded sessions of pi and oh-my-pi; gives flags."""
    for agent in ("pi", "oh-my-pi"):
        source = CAPTURES / agent / "sessions"
        for path in source.rglob("*.jsonl"):
            lines = [planter.line("session", line) for line in path.read_text().splitlines()]
            project, *rest = path.relative_to(source).parts
            project += planter.text("path of a session file")
            write(Path(home, agent, project, *rest), *lines, *broken(planter, "session"))
        yield f"--sessions.dir={agent}={home / agent}"


def usage_logs(planter: Planter, home: Path) -> Iterator[str]:
    for agent in ("pi", "opencode", "claude-code"):
        for path in (CAPTURES / agent / "agents").rglob("events.jsonl"):
            lines = [planter.line("usage", line) for line in path.read_text().splitlines()]
            name, *rest = path.relative_to(CAPTURES / agent / "agents").parts
            name += planter.text("id of an agent, a directory")
            write(Path(home, "logs/agents", name, *rest), *lines, *broken(planter, "usage"))
    yield f"--usage.root=logs={home / 'logs'}"


def instances(planter: Planter, home: Path) -> Iterator[str]:
    directory = home / "instances"
    for name in ("pi", "oh-my-pi"):
        recorded = [json.loads(line) for line in (DATA / "heartbeats" / f"{name}.jsonl").read_text().splitlines()]
        document = next(one["doc"] for one in reversed(recorded) if "doc" in one)
        document["session"] |= {"name": "nightly", "file": "/a"}
        document["model"] |= {"name": "Haiku", "thinkingLevel": "high"}
        document["workspace"]["git"] |= {"branch": "main", "commit": "abc"}
        document["messages"] = {"lastAssistantText": "a", "lastAssistantHtml": "a", "lastUserText": "a"}
        document["extra"] = {"prompt": "a"}
        pid = document["process"]["pid"]
        write(directory / f"{pid}.json", json.dumps(planter.planted("instance", document)))
    for number, text in enumerate(broken(planter, "instance")):
        write(directory / f"{900_000 + number}.json", text)
    yield f"--telemetry.dir=pi={directory}"


def broken(planter: Planter, kind: str) -> list[str]:
    """Lines, or files, that are rejected in every way: an error message may not repeat what it is about."""
    marker = planter.text(f"{kind} line that is rejected")
    wrong: dict[str, object] = {
        "session_id": {marker: marker}, "timestamp": marker, "type": "cost_snapshot", "process": {"pid": marker}}
    return [
        marker, f'{{"{marker}', json.dumps([marker]), json.dumps({"type": marker, marker: marker}), json.dumps(wrong),
        json.dumps({**wrong, "timestamp": "2026-01-01T00:00:00Z", "session_id": "s", "event_id": 7,
                    "message_id": {marker: marker}, "cost": {"total_cost_usd": marker},
                    "tokens": {"input": marker, marker: 1}}),
        json.dumps({"type": "message", "id": "1", "timestamp": marker, "message": {
            "role": "assistant", "usage": {"input": marker, "cost": {"total": marker}}, "content": marker}}),
        json.dumps({"text": marker * 20_000}), f"\x01\x02{marker}\x1b[2J",
    ]


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def printed(home: Path, *command: str) -> bytes:
    done = subprocess.run([sys.executable, "-m", "coding_agent_exporter", *command], env=environment(home), cwd=home,
                          capture_output=True, timeout=DEADLINE, check=False)
    assert done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def leaving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Planter, dict[str, set[str]]]:
    """The planted fields, and which of them came out: field -> outputs."""
    home, planter = tmp_path_factory.mktemp("content"), Planter()
    flags = [*sessions(planter, home), *usage_logs(planter, home), *instances(planter, home)]
    recorded = ["--telemetry.stale-after=100000h", "--telemetry.forget-after=200000h"]
    outputs: dict[str, list[bytes]] = defaultdict(list)
    with http_receiver(receiver=Collector()) as spans, http_receiver(receiver=Collector()) as metrics:
        env = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": spans.url, "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": metrics.url}
        with Exporter(
            home, *flags, *recorded, "--log.level=debug", "--input.max-line-size=64KiB", "--usage.agent-label",
            "--otlp.backfill", "--otlp.compression=none", "--otlp.metrics", "--otlp.metrics-interval=1s",
            "--otlp.flush-timeout=2s", env=env,
        ) as exporter:
            # A new series is shown at 0 first.
            outputs["metrics"] += [exporter.get(headers=headers).body for headers in ({}, OPENMETRICS, {})]
            outputs["page"] += [exporter.get(path).body for path in ("/", "/-/ready", "/-/healthy")]
            wait_for(lambda: total(exporter.scrape(), PENDING) == 0, "the spans to be sent")
            outputs["state file"] += [path.read_bytes() for path in home.glob("state.db*")]
            exporter.terminate()
            outputs["state file"] += [path.read_bytes() for path in home.glob("state.db*")]
            outputs["log"].append("\n".join(exporter.lines).encode())
        for name, receiver in (("spans", spans), ("OTLP metrics", metrics)):
            outputs[name] += [*receiver.raw, *(str(headers).encode() for headers in receiver.headers)]
    outputs["check"] += [printed(home, "check", *flags, *recorded, f"--format={form}") for form in ("text", "json")]
    outputs["usage"] += [
        printed(home, "usage", f"--by={by}", f"--format={form}", *flags)
        for by, form in (("model,session", "table"), ("agent,source", "csv"), ("session,agent,model,day", "json"))]
    found: dict[str, set[str]] = defaultdict(set)
    for output, texts in outputs.items():
        for field in planter.found(b"".join(texts)):
            found[field].add(output)
    return planter, found


def table() -> dict[str, set[str]]:
    """What SECURITY.md says: field -> outputs."""
    text = SECURITY.read_text(encoding="utf-8")
    found = re.search(r"^\| field \|.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert found
    head, _, *rows = found[0].strip().splitlines()
    columns = cells(head)[1:]
    assert set(columns) <= set(OUTPUTS)
    return {field.strip("`"): {column for column, mark in zip(columns, marks, strict=True) if mark == "yes"}
            for field, *marks in map(cells, rows)}


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def test_what_leaves_is_what_is_said_to_leave(leaving: tuple[Planter, dict[str, set[str]]]) -> None:
    """Of all text in session files, usage logs and instance files, of their names, and of lines that are rejected,
    only that gets out which SECURITY.md lists, and where it says; content is in no output and not in the state file."""
    planter, found = leaving
    assert found == table()
    assert len(planter.fields) > 80
    parts = r"content\((text|thinking)|arguments|lastAssistant|lastUser|prompt|summary|errorMessage|rejected|details"
    content = {field for field in planter.fields if re.search(parts, field)}
    assert len(content) > 20
    assert not content & found.keys()


def test_the_state_file_is_its_owners(tmp_path: Path) -> None:
    """Names of sessions, models and directories are nobody else's business, whatever the umask."""
    before = os.umask(0)
    try:
        with Exporter(tmp_path) as exporter:
            exporter.scrape()
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("state.db*")}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("state.db", "state.db-wal", "state.db-shm", "state.db.lock"), 0o600)
