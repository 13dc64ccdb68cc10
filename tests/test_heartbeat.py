"""Instance files: what `parse` makes of their bytes, and what `InstanceDir` makes of a directory."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from coding_agent_exporter.decode.heartbeat import derive_pressure, parse
from coding_agent_exporter.heartbeat import LIST_EVERY, Heartbeats, InstanceDir, Scan
from coding_agent_exporter.instances import Instances
from coding_agent_exporter.model import Activity, Heartbeat, Pressure, Rejected, Root

DATA = Path(__file__).parent / "data" / "heartbeats"
FULL: dict[str, Any] = {
    "schemaVersion": 2,
    "process": {"pid": 77, "startedAt": 1795225187616, "updatedAt": 1795225190500, "heartbeatMs": 250},
    "system": {"host": "vm", "user": "SECRET"},
    "workspace": {"cwd": "/srv/project", "git": {"branch": "main", "commit": "SECRET"}},
    "session": {"id": "01a1", "file": "/SECRET", "name": "nightly"},
    "model": {"provider": "loopback", "id": "haiku", "name": "SECRET", "thinkingLevel": "high"},
    "state": {"activity": "working", "hasPendingMessages": True},
    "context": {"tokens": 15520, "contextWindow": 16000, "percent": 97, "pressure": "near_limit",
                "closeToLimit": True, "nearLimit": True},
    "messages": {"lastAssistantText": "SECRET"},
    "lastEvent": "turn_end",
}


def changed(**sections: object) -> bytes:
    """FULL with the given sections replaced; None leaves a section out."""
    document = {name: value for name, value in {**FULL, **sections}.items() if value is not None}
    return json.dumps(document).encode()


def process(**fields: object) -> bytes:
    return changed(process={**FULL["process"], **fields})


def context(**fields: object) -> Heartbeat:
    heartbeat = parse(changed(context={**FULL["context"], **fields}))
    assert isinstance(heartbeat, Heartbeat)
    return heartbeat


def samples() -> list[dict[str, Any]]:
    return [json.loads(line)["doc"] for name in ("pi.jsonl", "oh-my-pi.jsonl")
            for line in (DATA / name).read_text().splitlines() if '"doc"' in line]


def test_every_field_is_taken_from_its_place() -> None:
    """A complete document becomes a complete Heartbeat, in seconds."""
    assert parse(changed()) == Heartbeat(
        pid=77, started_at=1795225187.616, updated_at=1795225190.5, heartbeat_seconds=0.25,
        activity=Activity.WORKING, has_pending_messages=True, last_event="turn_end", session_id="01a1",
        session_name="nightly", host="vm", cwd="/srv/project", git_branch="main", provider="loopback",
        model="haiku", thinking_level="high", context_percent=97.0, context_tokens=15520.0,
        context_window=16000.0, pressure=Pressure.NEAR_LIMIT, close_to_limit=True, near_limit=True)


def test_a_pid_and_a_time_are_enough() -> None:
    """A document with nothing else is a reading in which all else is unknown."""
    assert parse(b'{"process": {"pid": 1, "updatedAt": 1500}}') == Heartbeat(
        pid=1, started_at=None, updated_at=1.5, heartbeat_seconds=1.5, activity=Activity.UNKNOWN,
        has_pending_messages=False, last_event="")


def test_nothing_outside_of_the_allowlist_is_kept() -> None:
    """Neither the user, the session file nor any text of a message is in what parse returns."""
    documents = [changed(), *(json.dumps(document).encode() for document in samples())]
    assert all(b"SECRET" in document for document in documents)
    assert not any("SECRET" in repr(parse(document)) for document in documents)


@pytest.mark.parametrize(("raw", "reason"), [
    (b"", "not_json"),
    (changed()[:-40], "not_json"),
    (b"\x00" * 100, "not_json"),
    (b'{"process": {"pid": ' + b"9" * 5000 + b', "updatedAt": 1}}', "not_json"),
    (b"[" * 200_000, "too_deep"),
    (b'{"process":' * 200_000, "too_deep"),
    (b"[]", "not_object"),
    (b"null", "not_object"),
    (b"{}", "no_process"),
    (changed(process=[1]), "no_process"),
    (process(pid=None), "no_process"),
    (process(pid=True), "no_process"),
    (process(pid="77"), "no_process"),
    (process(pid=77.0), "no_process"),
    (process(pid=0), "no_process"),
    (process(pid=-1), "no_process"),
    (process(pid=2**80), "no_process"),
    (process(updatedAt=None), "bad_time"),
    (process(updatedAt="1795225190500"), "bad_time"),
    (process(updatedAt=True), "bad_time"),
    (process(updatedAt=0), "bad_time"),
    (process(updatedAt=-5), "bad_time"),
    (process(updatedAt=float("nan")), "bad_time"),
    (process(updatedAt=float("inf")), "bad_time"),
    (process(updatedAt=1e300), "bad_time"),
    (process(updatedAt=10**400), "bad_time"),
])
def test_what_is_no_heartbeat_is_rejected_with_a_reason(raw: bytes, reason: str) -> None:
    """Bytes without a process and a time are refused, whatever they are; nothing raises."""
    assert parse(raw) == Rejected(reason)


@pytest.mark.parametrize("wrong", [None, 5, True, [], {}, "", "x", [[[]]], {"id": {}}, 1e308])
@pytest.mark.parametrize("section", [
    "system", "workspace", "session", "model", "state", "context", "lastEvent", "messages"])
def test_a_section_of_another_type_costs_that_section_only(section: str, wrong: object) -> None:
    """A wrong section leaves the reading of the others as it was."""
    heartbeat = parse(changed(**{section: wrong}))
    assert isinstance(heartbeat, Heartbeat)
    kept = {"session": heartbeat.session_id == "01a1", "model": heartbeat.model == "haiku",
            "context": heartbeat.context_percent == 97, "state": heartbeat.activity is Activity.WORKING,
            "system": heartbeat.host == "vm", "workspace": heartbeat.cwd == "/srv/project"}
    assert {name for name, whole in kept.items() if not whole} == ({section} & kept.keys())


@pytest.mark.parametrize("wrong", [None, True, "97", -1, float("nan"), float("inf"), 10**400, [97]])
def test_a_percent_that_is_no_quantity_is_unknown(wrong: object) -> None:
    """NaN, negative, huge or mistyped percent is None, as after a compaction."""
    assert context(percent=wrong).context_percent is None


def test_long_texts_are_cut() -> None:
    """Ten megabytes in a field that is read become 200 characters."""
    heartbeat = parse(changed(session={"id": "é" * 10_000_000}))
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.session_id == "é" * 200


def test_half_a_surrogate_pair_does_not_hide_the_agent() -> None:
    """A text cut in the middle of an emoji is legal for its writer; what is shown of it can be encoded."""
    raw = changed(messages={"lastAssistantText": "SECRET \ud83d"}, session={"id": "01a1", "name": "a\ud83db"})
    assert b"\\ud83d" in raw
    heartbeat = parse(raw)
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.session_name == "a?b"


def test_invalid_utf8_costs_the_character_only() -> None:
    """A byte that is no UTF-8 in a branch name leaves the reading usable."""
    heartbeat = parse(changed().replace(b'"main"', b'"ma\xffin"'))
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.git_branch == "ma\ufffdin"


@pytest.mark.parametrize(("percent", "pressure"), [
    (0, Pressure.NORMAL), (84.99, Pressure.NORMAL), (85, Pressure.APPROACHING_LIMIT),
    (94.99, Pressure.APPROACHING_LIMIT), (95, Pressure.NEAR_LIMIT), (99.99, Pressure.NEAR_LIMIT),
    (100, Pressure.AT_LIMIT), (250, Pressure.AT_LIMIT), (None, None)])
@pytest.mark.parametrize("reported", [None, "critical", 3, ""])
def test_an_unknown_pressure_is_derived_from_the_percent(reported: object, percent: float | None,
                                                         pressure: Pressure | None) -> None:
    """Where the writer reports no known pressure, pi-telemetry's default thresholds apply."""
    assert context(percent=percent, pressure=reported).pressure is pressure


def test_a_reported_pressure_is_believed() -> None:
    """Thresholds can be configured at the writer: 60 percent may be its near_limit."""
    assert context(percent=60, pressure="near_limit").pressure is Pressure.NEAR_LIMIT


def test_derived_pressure_is_what_real_agents_report() -> None:
    """In every recorded reading with a percent, deriving gives the pressure that the agent reported."""
    readings = [parse(json.dumps(document).encode()) for document in samples()]
    known = [(heartbeat.pressure, derive_pressure(heartbeat.context_percent)) for heartbeat in readings
             if isinstance(heartbeat, Heartbeat) and heartbeat.context_percent is not None]
    assert all(reported is derived for reported, derived in known)
    assert {reported for reported, _ in known} == set(Pressure)


@pytest.fixture
def folder(tmp_path: Path) -> InstanceDir:
    return InstanceDir(Root("telemetry", "home", tmp_path), max_bytes=10_000)


def put(folder: InstanceDir, name: str, content: bytes) -> None:
    """Replace a file as pi-telemetry does, with a time of change that no clock resolution can blur."""
    path = folder.root.path / name
    stamp = path.stat().st_mtime_ns + 1_000_000 if path.exists() else 1_795_225_190_000_000_000
    scratch = folder.root.path / f"{name}.tmp-1"
    scratch.write_bytes(content)
    os.utime(scratch, ns=(stamp, stamp))
    scratch.rename(path)


def names(scan: Scan) -> list[str]:
    return sorted(name for name, _ in scan.changed)


def test_only_what_changed_is_reported(folder: InstanceDir) -> None:
    """A scan gives new and changed files, and the names of all."""
    put(folder, "77.json", changed())
    put(folder, "78.json", process(pid=78))
    first = folder.scan()
    assert names(first) == ["77.json", "78.json"]
    assert first.states == {"ok": 2, "unreadable": 0, "invalid": 0, "ignored": 0}
    assert dict(first.changed)["77.json"] == parse(changed())
    put(folder, "78.json", process(pid=78, updatedAt=1795225191000))
    second = folder.scan()
    assert (names(second), second.present) == (["78.json"], frozenset({"77.json", "78.json"}))
    assert names(folder.scan()) == []


def test_an_unchanged_file_is_not_opened_again(folder: InstanceDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred idle agents cost a listing, not a hundred reads."""
    for pid in range(1, 101):
        put(folder, f"{pid}.json", process(pid=pid))
    opened: list[str] = []
    real = os.open

    def counted(path: str, flags: int) -> int:
        opened.append(path)
        return real(path, flags)

    monkeypatch.setattr(os, "open", counted)
    assert len(folder.scan().changed) == 100
    assert len(opened) == 100
    assert len(folder.scan().present) == 100
    assert len(opened) == 100


def test_removed_files_are_no_longer_present(folder: InstanceDir) -> None:
    """A file that was removed is neither present nor counted, and is new when it comes back."""
    put(folder, "77.json", changed())
    folder.scan()
    (folder.root.path / "77.json").unlink()
    empty = folder.scan()
    assert (empty.present, empty.states["ok"]) == (frozenset(), 0)
    put(folder, "77.json", changed())
    assert names(folder.scan()) == ["77.json"]


def test_other_names_are_not_instance_files(folder: InstanceDir) -> None:
    """Temporary files, other names and digits of other scripts are passed over in silence."""
    for name in ("77.json.tmp-77", "a77.json", "77.JSON", "77.json\n", "-7.json", "\u0667.json", ".json", "77"):
        (folder.root.path / name).write_bytes(changed())
    assert folder.scan() == Scan()


def test_a_missing_directory_is_an_empty_one(tmp_path: Path) -> None:
    """The directory may appear later, vanish, or not be a directory: no error."""
    folder = InstanceDir(Root("telemetry", "home", tmp_path / "later"))
    assert folder.scan() == Scan()
    folder.root.path.mkdir()
    put(folder, "77.json", changed())
    assert names(folder.scan()) == ["77.json"]
    (folder.root.path / "77.json").unlink()
    folder.root.path.rmdir()
    assert folder.scan() == Scan()
    folder.root.path.write_text("a file")
    assert folder.scan() == Scan()


def test_a_directory_that_cannot_be_listed_keeps_its_files(folder: InstanceDir,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing filesystem is one complaint; the processes in it have not been seen to go."""
    put(folder, "77.json", changed())
    folder.scan()

    def broken(_: object) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "scandir", broken)
    first, second = folder.scan(), folder.scan()
    here = frozenset({"77.json"})
    assert (first.present, first.rejected) == (here, [Rejected("unreadable")])
    assert (second.present, second.rejected) == (here, [])
    monkeypatch.undo()
    assert folder.scan() == Scan(present=here, states={"ok": 1, "unreadable": 0, "invalid": 0, "ignored": 0})


def test_a_torn_file_counts_once_and_is_read_when_it_is_whole(folder: InstanceDir) -> None:
    """An invalid file is counted once for its content, however often it is rewritten, and recovers."""
    torn = changed()[:50]
    put(folder, "77.json", torn)
    first = folder.scan()
    assert (first.changed, first.rejected, first.states["invalid"]) == ([], [Rejected("not_json")], 1)
    assert folder.scan().rejected == []
    put(folder, "77.json", torn)
    assert folder.scan().rejected == []
    put(folder, "77.json", torn[:40])
    assert folder.scan().rejected == [Rejected("not_json")]
    put(folder, "77.json", changed())
    whole = folder.scan()
    assert (names(whole), whole.states["invalid"]) == (["77.json"], 0)
    put(folder, "77.json", torn[:40])
    assert folder.scan().rejected == [Rejected("not_json")]


def test_a_copy_under_another_name_is_refused(folder: InstanceDir) -> None:
    """One pid is one file: a copy would show the same series twice."""
    put(folder, "78.json", changed())
    put(folder, "077.json", changed())
    scan = folder.scan()
    assert (scan.changed, scan.rejected) == ([], [Rejected("wrong_pid")] * 2)


def test_a_file_that_is_too_large_is_not_read(folder: InstanceDir) -> None:
    """Past the limit a file is unreadable, counted once while it grows; at the limit it is read."""
    fits = changed().ljust(10_000)
    put(folder, "77.json", fits + b" ")
    first = folder.scan()
    assert (first.changed, first.rejected, first.states["unreadable"]) == ([], [Rejected("too_large")], 1)
    put(folder, "77.json", fits + b"  ")
    assert folder.scan().rejected == []
    put(folder, "77.json", fits)
    assert names(folder.scan()) == ["77.json"]


def test_a_file_that_grows_while_it_is_read_is_too_large(folder: InstanceDir,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds for what is read, not only for what the file's size promised."""
    put(folder, "77.json", changed())
    path = folder.root.path / "77.json"
    real = os.fstat

    def grow(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        path.write_bytes(changed().ljust(10_001))
        return status

    monkeypatch.setattr(os, "fstat", grow)
    scan = folder.scan()
    assert (scan.changed, scan.rejected) == ([], [Rejected("too_large")])


def test_a_file_replaced_after_it_was_listed_is_read_once(folder: InstanceDir,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened is what was read: the next scan does not take it for another change."""
    put(folder, "77.json", changed())
    real = os.open

    def renew(path: str, flags: int) -> int:
        put(folder, "77.json", process(updatedAt=1795225191000))
        return real(path, flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", renew)
        (_, heartbeat), = folder.scan().changed
    assert heartbeat.updated_at == 1795225191
    assert names(folder.scan()) == []


def test_links_fifos_and_directories_are_refused(folder: InstanceDir, tmp_path: Path) -> None:
    """Only regular files are read: no link out of the directory, and no FIFO to hang on."""
    secret = tmp_path / "secret"
    secret.write_bytes(process(pid=1))
    (folder.root.path / "1.json").symlink_to(secret)
    os.mkfifo(folder.root.path / "2.json")
    (folder.root.path / "3.json").mkdir()
    first, second = folder.scan(), folder.scan()
    assert (first.changed, first.rejected) == ([], [Rejected("not_regular")] * 3)
    assert (second.rejected, second.states["unreadable"]) == ([], 3)


def test_a_file_swapped_after_it_was_listed_is_not_followed(folder: InstanceDir, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A link or FIFO put in the file's place at the last moment is refused too."""
    put(folder, "77.json", changed())
    put(folder, "78.json", process(pid=78))
    real = os.open

    def swap(path: str, flags: int) -> int:
        Path(path).unlink()
        if path.endswith("77.json"):
            os.mkfifo(path)
        else:
            (tmp_path / "target").write_bytes(process(pid=78))
            Path(path).symlink_to(tmp_path / "target")
        return real(path, flags)

    monkeypatch.setattr(os, "open", swap)
    scan = folder.scan()
    assert scan.changed == []
    assert sorted(rejected.reason for rejected in scan.rejected) == ["not_regular", "unreadable"]


def test_a_file_that_vanishes_before_it_is_read_is_no_error(folder: InstanceDir,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends while we look is gone, not rejected."""
    put(folder, "77.json", changed())
    real = os.open

    def vanish(path: str, flags: int) -> int:
        Path(path).unlink()
        return real(path, flags)

    monkeypatch.setattr(os, "open", vanish)
    assert folder.scan() == Scan()


def test_an_unreadable_file_is_tried_again(folder: InstanceDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission that comes later leaves no trace in the file's times: the file is read all the same."""
    put(folder, "77.json", changed())

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        first, second = folder.scan(), folder.scan()
    assert (first.rejected, first.states["unreadable"]) == ([Rejected("unreadable")], 1)
    assert first.present == frozenset({"77.json"})
    assert second.rejected == []
    assert names(folder.scan()) == ["77.json"]


def test_only_the_freshest_files_are_followed_and_the_rest_is_counted(tmp_path: Path) -> None:
    """Thousands of files that dead agents left, or that somebody made up, cost no more than the bound."""
    directory = InstanceDir(Root("telemetry", "t", tmp_path), max_files=10)

    def write(pid: int, second: int) -> None:
        path = tmp_path / f"{pid}.json"
        path.write_bytes(process(pid=pid))
        os.utime(path, (second, second))

    for pid in range(1, 26):
        write(pid, 1_000 + pid)
    found = directory.scan()
    assert found.present == {f"{pid}.json" for pid in range(16, 26)}
    assert (found.states["ok"], found.states["ignored"]) == (10, 15)
    assert [rejected.reason for rejected in found.rejected] == ["too_many"]
    assert found.paths == [str(tmp_path)]
    write(1, 1_070)  # an agent that is a little fresher takes no place of one that may be alive
    assert directory.scan().present == found.present
    assert directory.scan().rejected == []
    write(1, 1_077)  # the oldest has been silent for more than a minute by then
    found = directory.scan()
    assert found.present == {"1.json", *(f"{pid}.json" for pid in range(17, 26))}
    assert [name for name, _ in found.changed] == ["1.json"]
    for pid in range(2, 17):
        (tmp_path / f"{pid}.json").unlink()
    assert directory.scan().states["ignored"] == 0
    write(2, 1_000)
    assert directory.scan().rejected[0].reason == "too_many"


def paths(folder: InstanceDir, *names: str) -> frozenset[str]:
    return frozenset(str(folder.root.path / name) for name in names)


def test_only_what_is_known_to_have_changed_is_looked_at(folder: InstanceDir,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat costs the reading of one file: no listing, and no look at the others."""
    for pid in (77, 78, 79):
        put(folder, f"{pid}.json", process(pid=pid))
    folder.scan()
    put(folder, "77.json", process(updatedAt=1795225191000))
    put(folder, "78.json", process(pid=78, updatedAt=1795225191000))
    (folder.root.path / "79.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", None)
        scan = folder.scan(paths(folder, "77.json", "77.json.tmp-77", "x/1.json", "../1.json"))
        assert (names(scan), scan.present) == (["77.json"], frozenset({"77.json", "78.json", "79.json"}))
        assert folder.scan(paths(folder, "79.json")).present == frozenset({"77.json", "78.json"})
        assert folder.scan(frozenset()).states["ok"] == 2
    assert names(folder.scan()) == ["78.json"]


def test_a_series_of_partial_looks_sees_what_looks_at_all_see(tmp_path: Path) -> None:
    """Files that appear, change, tear, vanish and become links: both ways of looking find the same, each time."""
    chance = random.Random(7)
    root = Root("telemetry", "home", tmp_path)
    whole, partial = InstanceDir(root), InstanceDir(root)
    for number in range(600):
        touched = chance.sample(range(70, 78), chance.randrange(4))
        for pid in touched:
            path = tmp_path / f"{pid}.json"
            path.unlink(missing_ok=True)
            what = chance.randrange(6)
            if what < 3:
                put(whole, path.name, process(pid=pid, updatedAt=1795225190000 + number))
            elif what == 3:
                put(whole, path.name, changed()[:50 + number])
            elif what == 4:
                path.symlink_to("nowhere")
        one, other = whole.scan(), partial.scan(paths(partial, *(f"{pid}.json" for pid in touched)))
        one.changed.sort()
        other.changed.sort()
        assert (sorted(zip(one.paths, one.rejected, strict=True)), one.changed, one.present, one.states) == (
            sorted(zip(other.paths, other.rejected, strict=True)), other.changed, other.present, other.states)


def test_a_change_that_nobody_told_of_is_found_within_a_second(tmp_path: Path) -> None:
    """A hint can be missing: an agent that still writes must not pass for a silent one."""
    folder = InstanceDir(Root("telemetry", "home", tmp_path))
    heartbeats, instances = Heartbeats([folder.root]), Instances()
    start = 1795225190.0
    put(folder, "77.json", process(updatedAt=round(start * 1000)))
    heartbeats.read(instances, start)
    for number in range(1, 200):
        now = start + number / 10
        put(folder, "77.json", process(updatedAt=round(now * 1000)))
        heartbeats.read(instances, now, changes=paths(folder, "78.json"))
        (instance,) = instances.view(now)
        assert now - instance.heartbeat.updated_at <= LIST_EVERY
    # A clock that was set back must not put it off.
    put(folder, "77.json", process(updatedAt=round(start * 1000) - 50_000))
    assert heartbeats.read(instances, start - 50, changes=frozenset())[0][1].changed
