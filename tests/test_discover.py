"""Discovery: which files are logs, whose they are, in which order they are read, and what is watched."""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from coding_agent_exporter import discover, listing
from coding_agent_exporter.discover import Discovery, Found
from coding_agent_exporter.model import Root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

LATER = time.time() + 1000
"""A clock long past every change that a test makes: listings are trusted at once."""


def write(path: Path, *, age: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}\n")
    os.utime(path, (1_800_000_000 - age, 1_800_000_000 - age))
    return path


def usage(root: Path) -> Discovery:
    return Discovery([Root("usage", "u", root)], clock=lambda: LATER)


def sessions(root: Path) -> Discovery:
    return Discovery([Root("sessions", "s", root)], clock=lambda: LATER)


def paths(found: Found, root: Path) -> list[str]:
    return [file.path.relative_to(root).as_posix() for file in found.files]


def watched(found: Found, root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in found.watch}


def problems(found: Found, root: Path) -> set[tuple[str, str]]:
    return {(path.relative_to(root).as_posix(), reason) for _, path, reason in found.unreadable}


# Usage logs


def test_the_parts_of_a_log_are_read_in_the_order_of_writing(tmp_path: Path) -> None:
    """Preserved before live, rotated before current, older before newer; one name for all of them."""
    expected = [
        "preserved/my--name--agent-1/events/claude/usage/events.jsonl.1",
        "preserved/my--name--agent-1/events/claude/usage/events.jsonl",
        "agents/agent-1/events/claude/usage/events.jsonl.20260101",
        "agents/agent-1/events/claude/usage/events.jsonl.2",
        "agents/agent-1/events/claude/usage/events.jsonl.1",
        "agents/agent-1/events/claude/usage/events.jsonl.1800000000",
        "agents/agent-1/events/claude/usage/events.jsonl.1800000001",
        "agents/agent-1/events/claude/usage/events.jsonl",
        "agents/agent-1/events/opencode/usage/events.jsonl",
    ]
    ages = [50, 40, 30, 20, 20, 10, 10, 99, 99]
    for name, age in zip(expected, ages, strict=True):
        write(tmp_path / name, age=age)
    found = usage(tmp_path).scan()
    assert paths(found, tmp_path) == expected
    assert [file.log for file in found.files] == ["agent-1/claude"] * 8 + ["agent-1/opencode"]
    first = found.files[0]
    assert (first.kind, first.root, first.source, first.agent) == ("usage", "u", "claude", "agent-1")
    assert sorted(found.files, key=lambda file: file.order) == found.files


def test_nothing_but_the_pattern_is_looked_at(tmp_path: Path) -> None:
    """An agent's state directory can hold anything, also what looks like a log elsewhere."""
    for name in (
        "agents/a/work/events/pi-coding/usage/events.jsonl", "agents/a/events/pi-coding/events.jsonl",
        "agents/a/events/pi-coding/usage/deep/events.jsonl", "agents/a/events/pi-coding/usage/events.jsonl.gz",
        "agents/a/events/pi-coding/usage/events.jsonl.1.gz", "agents/a/events/pi-coding/usage/events.jsonl.",
        "agents/a/events/pi-coding/usage/other.jsonl", "agents/.hidden/events/pi-coding/usage/events.jsonl",
        "preserved/no-separator/events/pi-coding/usage/events.jsonl", "agents/file", "agents/b/events",
        "preserved/no-id--/events/pi-coding/usage/events.jsonl", "agents/c/events/claude/usage",
    ):
        write(tmp_path / name)
    found = usage(tmp_path).scan()
    assert paths(found, tmp_path) == []
    assert found.unreadable == []


def test_a_root_can_be_one_agent(tmp_path: Path) -> None:
    """A state directory itself is the agent that its name says."""
    root = tmp_path / "agent-7"
    write(root / "events/pi-coding/usage/events.jsonl")
    (file,) = usage(root).scan().files
    assert (file.agent, file.log) == ("agent-7", "agent-7/pi-coding")


# Session files


def test_sessions_are_read_before_their_forks_and_sub_agents(tmp_path: Path) -> None:
    """By the time in the name, whatever the project; a sub-agent after its parent; the undated last."""
    expected = [
        "--b--/2026-11-21T01-00-00-000Z_u1.jsonl",
        "--a--/2026-11-21T02-00-00-000Z_u2.jsonl",
        "--a--/2026-11-21T02-00-00-000Z_u2/SubOne.jsonl",
        "--a--/2026-11-21T02-00-00-000Z_u2/deep/SubTwo.jsonl",
        "2026-11-21T03-00-00-000Z_u3.jsonl",
        "--a--/name.jsonl",
    ]
    for name in (*reversed(expected), "--a--/2026-11-21T02-00-00-000Z_u2/x/y/too-deep.jsonl", "--a--/notes.txt",
                 "--a--/.hidden.jsonl", "--a--/2026.jsonl.bak"):
        write(tmp_path / name)
    found = sessions(tmp_path).scan()
    assert paths(found, tmp_path) == expected
    assert [file.log for file in found.files] == expected
    assert {(file.kind, file.root, file.source) for file in found.files} == {("sessions", "s", "")}


def test_oh_my_pi_is_known_by_its_directory(tmp_path: Path) -> None:
    """Below .omp it is oh-my-pi that writes."""
    write(tmp_path / ".omp/agent/sessions/-p/2026-11-21T01-00-00-000Z_u1.jsonl")
    assert [file.source for file in sessions(tmp_path / ".omp/agent/sessions").scan().files] == ["omp"]


def test_usage_logs_come_before_session_files(tmp_path: Path) -> None:
    """Whatever the order of the roots."""
    write(tmp_path / "s/p/2026-11-21T01-00-00-000Z_u1.jsonl")
    write(tmp_path / "u/agents/z/events/pi-coding/usage/events.jsonl")
    discovery = Discovery([Root("sessions", "s", tmp_path / "s"), Root("usage", "u", tmp_path / "u")])
    assert [file.kind for file in discovery.scan().files] == ["usage", "sessions"]


# Links, and what cannot be read


def test_a_file_is_listed_once(tmp_path: Path) -> None:
    """One file by two roots, by a link or by a hard link is one; the first root has it."""
    real = write(tmp_path / "agents/z/events/pi-coding/usage/events.jsonl")
    other = tmp_path / "agents/z/events/claude/usage"
    other.mkdir(parents=True)
    (other / "events.jsonl").hardlink_to(real)
    (tmp_path / "agents/a").symlink_to("z")
    roots = [Root("usage", "first", tmp_path), Root("usage", "second", tmp_path / "agents/z"),
             Root("sessions", "third", tmp_path / "agents/z")]
    (file,) = Discovery(roots).scan().files
    assert (file.root, file.agent) == ("first", "z")


def test_links_lead_only_to_what_is_inside(tmp_path: Path) -> None:
    """Linked agents, sources and files inside the root are followed; others are reported."""
    root, outside = tmp_path / "root", tmp_path / "root-2"
    write(outside / "agents/a/events/pi-coding/usage/events.jsonl")
    write(outside / "events.jsonl")
    write(root / "store/pi-coding/usage/events.jsonl")
    (root / "agents/a/events/x/usage").mkdir(parents=True)
    (root / "agents/a/events/linked").symlink_to(root / "store/pi-coding")
    (root / "agents/a/events/x/usage/events.jsonl").symlink_to(outside / "events.jsonl")
    (root / "agents/a/events/x/usage/events.jsonl.1").symlink_to("nowhere")
    (root / "agents/a/events/x/usage/events.jsonl.2").symlink_to("events.jsonl.2")
    (root / "agents/b").symlink_to(outside / "agents/a")
    found = usage(root).scan()
    assert paths(found, root) == ["agents/a/events/linked/usage/events.jsonl"]
    assert problems(found, root) == {
        ("agents/a/events/x/usage/events.jsonl", "outside_root"),
        ("agents/a/events/x/usage/events.jsonl.2", "io"), ("agents/b", "outside_root")}


def test_a_link_that_now_leads_elsewhere_is_looked_at_again(tmp_path: Path) -> None:
    """A log that is a link to a dated file follows it."""
    folder = tmp_path / "agents/a/events/pi-coding/usage"
    first, second = write(folder / "1.log"), write(folder / "2.log")
    other = tmp_path / "other"
    other.symlink_to(first)
    (folder / "events.jsonl").symlink_to(other)
    discovery = usage(tmp_path)
    before = discovery.scan()
    other.unlink()
    other.symlink_to(second)
    after = discovery.scan()
    assert len(after.files) == 1
    assert after is not before or before.files[0].path.resolve() == second.resolve()


def test_circles_end(tmp_path: Path) -> None:
    """Directories that link to themselves or to each other are entered once."""
    write(tmp_path / "p/2026-11-21T01-00-00-000Z_u1.jsonl")
    (tmp_path / "p/loop").symlink_to(".")
    (tmp_path / "p/up").symlink_to("..")
    (tmp_path / "q").symlink_to("q")
    write(tmp_path / "r/2026-11-21T02-00-00-000Z_u2.jsonl")
    found = sessions(tmp_path).scan()
    assert paths(found, tmp_path) == [
        "p/2026-11-21T01-00-00-000Z_u1.jsonl", "r/2026-11-21T02-00-00-000Z_u2.jsonl"]


def test_what_is_no_file_is_reported_once(tmp_path: Path) -> None:
    """A directory or a FIFO in the place of a log is unreadable, at every scan the same."""
    folder = tmp_path / "agents/a/events/pi-coding/usage"
    (folder / "events.jsonl").mkdir(parents=True)
    os.mkfifo(folder / "events.jsonl.1")
    discovery = usage(tmp_path)
    for _ in range(2):
        found = discovery.scan()
        assert sorted((path.name, reason) for _, path, reason in found.unreadable) == [
            ("events.jsonl", "not_regular"), ("events.jsonl.1", "not_regular")]


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="names are any bytes on Linux only")
def test_names_that_are_not_text_stay_outside(tmp_path: Path) -> None:
    """Such a name is reported in a form that every label and log line can hold."""
    for part in (b"agents/\xff/events/pi-coding/usage", b"agents/a/events/\xfe/usage"):
        folder = os.path.join(os.fsencode(tmp_path), part)  # noqa: PTH118 - pathlib knows no bytes
        os.makedirs(folder)  # noqa: PTH103 - the same
        Path(os.fsdecode(folder), "events.jsonl").touch()
    found = usage(tmp_path).scan()
    assert found.files == []
    assert problems(found, tmp_path) == {
        ("agents/\\xff", "bad_name"), ("agents/a/events/\\xfe", "bad_name")}


def test_names_in_any_language_are_text(tmp_path: Path) -> None:
    """UTF-8 is as good as ASCII."""
    write(tmp_path / "agents/agént-日本\u3000x/events/pi-coding/usage/events.jsonl")
    assert [file.agent for file in usage(tmp_path).scan().files] == ["agént-日本\u3000x"]


def system(patch: pytest.MonkeyPatch, **calls: Callable[..., object]) -> None:
    """Let discovery meet another operating system, and leave ours to everybody else."""
    for module in (discover, listing):
        patch.setattr(module, "os", SimpleNamespace(**{**vars(os), **calls}))


def refusing(target: Path, real: Callable[..., object]) -> Callable[..., object]:
    def call(path: str, *rest: object, **more: object) -> object:
        if str(path) == str(target):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)
    return call


def test_a_forbidden_directory_is_reported_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One agent's permissions do not hide the others, and their change is noticed."""
    for agent in ("a", "b"):
        write(tmp_path / f"agents/{agent}/events/pi-coding/usage/events.jsonl")
    locked = tmp_path / "agents/a/events"
    discovery = usage(tmp_path)
    with monkeypatch.context() as patch:
        system(patch, scandir=refusing(locked, os.scandir))
        for _ in range(2):
            found = discovery.scan()
            assert [file.agent for file in found.files] == ["b"]
            assert problems(found, tmp_path) == {("agents/a/events", "permission")}
            assert "agents/a/events" not in watched(found, tmp_path)
    locked.chmod(0o750)
    found = discovery.scan()
    assert [file.agent for file in found.files] == ["a", "b"]
    assert found.unreadable == []


def test_a_forbidden_root_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root behind a closed door is not missing."""
    system(monkeypatch, stat=refusing(tmp_path, os.stat))
    found = usage(tmp_path).scan()
    assert [(path, reason) for _, path, reason in found.unreadable] == [(tmp_path, "permission")]
    assert found.missing == []


# Roots, and what is watched


@pytest.mark.parametrize("kind", ["telemetry", "usage", "sessions"])
def test_a_missing_root_is_waited_for(tmp_path: Path, kind: str) -> None:
    """The nearest directory that exists is watched, until the root does."""
    root = Root("telemetry" if kind == "telemetry" else "usage" if kind == "usage" else "sessions", "r",
                tmp_path / "a/b/c")
    discovery = Discovery([root], clock=lambda: LATER)
    for existing in (tmp_path, tmp_path / "a", tmp_path / "a/b"):
        existing.mkdir(exist_ok=True)
        found = discovery.scan()
        assert (found.missing, set(found.watch), len(found.unreadable)) == ([root], {existing}, 0)
    root.path.mkdir()
    found = discovery.scan()
    assert (len(found.missing), set(found.watch)) == (0, {root.path})
    root.path.rmdir()
    assert discovery.scan().missing == [root]


def test_a_root_that_is_a_file_is_reported(tmp_path: Path) -> None:
    """It exists, and cannot be looked into."""
    write(tmp_path / "file")
    found = usage(tmp_path / "file").scan()
    assert problems(found, tmp_path) == {("file", "not_directory")}
    assert found.missing == []


def test_telemetry_is_watched_and_holds_no_logs(tmp_path: Path) -> None:
    """Instance files are somebody else's to read."""
    write(tmp_path / "4711.json")
    write(tmp_path / "x.jsonl")
    found = Discovery([Root("telemetry", "t", tmp_path)]).scan()
    assert (len(found.files), set(found.watch)) == (0, {tmp_path})


def test_what_is_watched_is_where_something_can_come(tmp_path: Path) -> None:
    """Directories of logs, and those where a log's directory is still missing; not what is preserved."""
    for folder in ("agents/full/events/claude/usage", "agents/full/events/other/not-usage", "agents/new",
                   "preserved/x--old/events/claude/usage"):
        (tmp_path / folder).mkdir(parents=True)
    assert watched(usage(tmp_path).scan(), tmp_path) == {
        ".", "agents", "agents/new", "agents/full/events", "agents/full/events/claude/usage",
        "agents/full/events/other", "preserved"}
    assert watched(sessions(tmp_path / "agents").scan(), tmp_path) >= {"agents", "agents/full", "agents/new"}


# What changes from scan to scan


def test_what_comes_and_goes_is_noticed(tmp_path: Path) -> None:
    """New agents, sources, rotated parts, moves to preserved/ and deletions show in the next scan."""
    discovery = usage(tmp_path)
    log = tmp_path / "agents/a/events/pi-coding/usage/events.jsonl"
    steps: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: (tmp_path / "agents/a").mkdir(parents=True), []),
        (lambda: log.parent.mkdir(parents=True), []),
        (lambda: write(log), ["agents/a/events/pi-coding/usage/events.jsonl"]),
        (lambda: log.rename(f"{log}.1"), ["agents/a/events/pi-coding/usage/events.jsonl.1"]),
        (lambda: write(tmp_path / "agents/a/events/claude/usage/events.jsonl"),
         ["agents/a/events/claude/usage/events.jsonl", "agents/a/events/pi-coding/usage/events.jsonl.1"]),
        ((tmp_path / "preserved").mkdir,
         ["agents/a/events/claude/usage/events.jsonl", "agents/a/events/pi-coding/usage/events.jsonl.1"]),
        (lambda: (tmp_path / "agents/a").rename(tmp_path / "preserved/n--a"),
         ["preserved/n--a/events/claude/usage/events.jsonl", "preserved/n--a/events/pi-coding/usage/events.jsonl.1"]),
        (lambda: (tmp_path / "preserved/n--a").rename(tmp_path / "away"), []),
    ]
    assert paths(discovery.scan(), tmp_path) == []
    for change, expected in steps:
        change()
        assert paths(discovery.scan(), tmp_path) == expected


def test_new_sessions_are_noticed(tmp_path: Path) -> None:
    """In old projects, in new ones, and below a session."""
    discovery = sessions(tmp_path)
    for name in ("p/2026-11-21T01-00-00-000Z_u1.jsonl", "p/2026-11-21T02-00-00-000Z_u2.jsonl",
                 "p/2026-11-21T02-00-00-000Z_u2/Sub.jsonl", "q/2026-11-21T03-00-00-000Z_u3.jsonl"):
        assert name not in paths(discovery.scan(), tmp_path)
        write(tmp_path / name)
        assert name in paths(discovery.scan(), tmp_path)


def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the directories that are listed from now on."""
    seen: list[str] = []

    def scandir(path: str) -> object:
        seen.append(path)
        return os.scandir(path)

    system(monkeypatch, scandir=scandir)
    return seen


def test_nothing_is_listed_while_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Appending to logs lists nothing and gives the same object; a change lists only its own agent."""
    logs = [write(tmp_path / f"agents/{agent}/events/pi-coding/usage/events.jsonl") for agent in "abc"]
    discovery = usage(tmp_path)
    before = discovery.scan()
    seen = listed(monkeypatch)
    for log in logs:
        log.write_text("{}\n{}\n")
    assert discovery.scan() is before
    assert seen == []
    logs[1].rename(f"{logs[1]}.1")
    assert len(discovery.scan().files) == 3
    assert {Path(path).relative_to(tmp_path).parts[1] for path in seen} == {"b"}


def freeze_times(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make all directories say that they last changed at this time."""
    def frozen(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def call(path: str) -> os.stat_result:
            status, moment = real(path), int(seconds * 1e9)
            return os.stat_result(tuple(status)[:10], {"st_mtime_ns": moment, "st_ctime_ns": moment})
        return call
    system(monkeypatch, stat=frozen(os.stat), lstat=frozen(os.lstat))


def test_a_fresh_time_stamp_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes twice within one tick of the file system's clock is seen both times."""
    now = 1_800_000_000.0
    freeze_times(monkeypatch, now - 1)
    log = write(tmp_path / "agents/a/events/pi-coding/usage/events.jsonl")
    discovery = Discovery([Root("usage", "u", tmp_path)], clock=lambda: now)
    assert len(discovery.scan().files) == 1
    write(log.with_name("events.jsonl.1"))
    write(tmp_path / "agents/b/events/pi-coding/usage/events.jsonl")
    assert len(discovery.scan().files) == 3


def test_a_file_system_without_times_is_listed_again_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a directory's times never move, a new file is found after a minute."""
    now = 1_800_000_000.0
    freeze_times(monkeypatch, 0)
    log = write(tmp_path / "agents/a/events/pi-coding/usage/events.jsonl")
    discovery = Discovery([Root("usage", "u", tmp_path)], clock=lambda: now)
    before = discovery.scan()
    now += 100
    assert discovery.scan() is before
    write(log.with_name("events.jsonl.1"))
    now += 10
    assert discovery.scan() is before
    now += 60
    assert len(discovery.scan().files) == 2


def test_an_error_of_the_system_is_not_trusted_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no trace in a directory's times when it passes: the next scan but a second later looks again."""
    now, failing = LATER, [True]
    for agent in "ab":
        write(tmp_path / f"agents/{agent}/events/pi-coding/usage/events.jsonl")
    place, seen = str(tmp_path / "agents/a/events/pi-coding/usage"), []

    def scandir(path: str) -> object:
        seen.append(path)
        if path == place and failing[0]:
            raise OSError(errno.EIO, "Input/output error")
        return os.scandir(path)

    system(monkeypatch, scandir=scandir)
    discovery = Discovery([Root("usage", "u", tmp_path)], clock=lambda: now)
    before = discovery.scan()
    assert (len(before.files), [reason for _, _, reason in before.unreadable]) == (1, ["io"])
    seen.clear()
    for _ in range(100):
        assert discovery.scan() is before
    assert seen == [], "not at every scan"
    failing[0], now = False, now + 1.1
    found = discovery.scan()
    assert (len(found.files), found.unreadable) == (2, [])
    assert seen.count(place) == 1
    assert len(seen) < 5, "only where the error was"


def test_errors_everywhere_cost_a_bounded_share_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thousand agents on a disk that fails, each is looked at again once in a few seconds."""
    now, seen = LATER, []
    for agent in range(1000):
        (tmp_path / f"agents/{agent}/events").mkdir(parents=True)

    def scandir(path: str) -> object:
        if path.endswith("/events"):
            seen.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return os.scandir(path)

    system(monkeypatch, scandir=scandir)
    discovery = Discovery([Root("usage", "u", tmp_path)], clock=lambda: now)
    for _ in range(60):
        discovery.scan()
        now += 1
    assert 2_000 <= len(seen) <= 60 * 1000 / 5


def test_a_clock_that_is_set_back_keeps_no_listing_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a day, on a file system whose times never move: a new file is still found at once."""
    now = LATER
    freeze_times(monkeypatch, 0)
    log = write(tmp_path / "agents/a/events/pi-coding/usage/events.jsonl")
    discovery = Discovery([Root("usage", "u", tmp_path)], clock=lambda: now)
    assert len(discovery.scan().files) == 1
    write(log.with_name("events.jsonl.1"))
    now -= 86_400
    assert len(discovery.scan().files) == 2


def test_what_is_renamed_while_it_is_listed_is_in_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part gets another name between two reads of its directory, and would be under neither."""
    log = write(tmp_path / "agents/a/events/pi-coding/usage/events.jsonl")
    part, moved = write(log.with_name("events.jsonl.1")), log.with_name("events.jsonl.2")

    def scandir(path: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
        with os.scandir(path) as entries:
            kept = list(entries)
        if part.exists() and path == str(part.parent):
            part.rename(moved)
            kept = [entry for entry in kept if entry.name != part.name]
        return nullcontext(iter(kept))

    system(monkeypatch, scandir=scandir)
    assert [file.path for file in usage(tmp_path).scan().files] == [moved, log]


def test_junk_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of files beside the agents cost one listing."""
    write(tmp_path / "agents/a/events/pi-coding/usage/events.jsonl")
    for number in range(3000):
        (tmp_path / f"agents/junk-{number}").touch()
    discovery = usage(tmp_path)
    found = discovery.scan()
    seen = listed(monkeypatch)
    assert discovery.scan() is found
    assert (len(found.files), found.unreadable, seen) == (1, [], [])
