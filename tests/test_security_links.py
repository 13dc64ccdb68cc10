"""A writer who exchanges files and directories for links, all the time: nothing outside of the roots is ever read.

Each name that leads to an input is exchanged for a link to its twin outside, where everything is as good as inside
but for the money. The exporter may read this file, as it may read its user's other files.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agents_support import PiInstance, PiLog, PiSession
from coding_agent_exporter.discover import Discovery
from coding_agent_exporter.heartbeat import InstanceDir
from coding_agent_exporter.model import Root
from coding_agent_exporter.tail import Tail, Unreadable
from otlp_receiver import http_receiver
from process_support import Exporter
from security_support import LONG, Collector, swapping
from support import total

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 100_000 if LONG else 3000
SCRAPES = 5000 if LONG else 150
DEADLINE = 3600.0 if LONG else 60.0
STOLEN = b"stolen"
LARGE = 1 << 33
"""Bytes of the log outside: a size that would be seen."""
COST = "coding_agent_cost_usd_total"


class Place:
    """Three inputs in the attacker's directory, and their twins outside; `pairs` of a name and a link to its twin."""

    def __init__(self, tmp_path: Path) -> None:
        self.home, self.outside = tmp_path / "home", tmp_path / "outside"
        links = tmp_path / "links"
        links.mkdir()
        self.usage, self.sessions = self.home / "mngr", self.home / "sessions"
        self.instances = self.home / "instances"
        log, session, agent = PiLog(self.usage, "a"), PiSession(self.sessions), PiInstance(self.instances, 1)
        log.message("anthropic/opus", 10**12)
        session.message("anthropic", "haiku", 10**12)
        agent.write(42)
        # The same names outside, and far more money.
        shutil.copytree(self.home, self.outside)
        for path in self.outside.rglob("*.json*"):
            text = path.read_text().replace("opus", "stolen").replace("haiku", "stolen").replace("evt-", "far-")
            text = text.replace(session.uuid, session.uuid[::-1]).replace(log.session, log.session[::-1])
            path.write_text(text.replace('total_cost_usd": 1.0', 'total_cost_usd": 1e6').replace(
                'total": 1.0', 'total": 1e6'))
        os.truncate(self.outside / log.path.relative_to(self.home), LARGE)
        names = [log.path, *list(log.path.parents)[:5], session.path, session.path.parent, agent.path]
        self.pairs = []
        for number, name in enumerate(names):
            link = links / str(number)
            link.symlink_to(self.outside / name.relative_to(self.home))
            self.pairs.append((name, link))
        assert {name.name for name, _ in self.pairs[:6]} == {
            "events.jsonl", "usage", "pi-coding", "events", "a", "agents"}

    @property
    def roots(self) -> list[Root]:
        return [Root("usage", "logs", self.usage), Root("sessions", "pi", self.sessions)]

    @property
    def telemetry(self) -> Root:
        return Root("telemetry", "pi", self.instances)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def until(done: Callable[[int], bool], look: Callable[[], None]) -> None:
    """Look until it is enough; `done` gets the number of looks."""
    end, looks = time.monotonic() + DEADLINE, 0
    while not done(looks):
        assert time.monotonic() < end, f"{looks} looks were not enough"
        look()
        looks += 1


def test_the_attack_works_on_who_checks_and_then_opens(place: Place) -> None:
    """What the other tests are worth: a reader who resolves the path, and then opens it, is led outside."""
    name, _ = place.pairs[0]
    root = os.path.realpath(place.usage)
    read: set[bool] = set()

    def look() -> None:
        with suppress(OSError):  # realpath's, where a link is none any more
            if os.path.realpath(name).startswith(root):
                with name.open("rb") as file:
                    read.add(STOLEN in file.read(10_000))

    with swapping(*place.pairs[:6]):
        until(lambda _: True in read, look)


def test_logs_outside_are_never_read(place: Place) -> None:
    """Thousands of looks for logs, and reads of all that was found, while every name on the way is exchanged."""
    discovery, tail = Discovery(place.roots), Tail()
    seen: set[str] = set()
    within = {root.alias: root.path for root in place.roots}

    def look() -> None:
        for file in discovery.scan().files:
            try:
                chunk = tail.read(file.path, None, within[file.root])
            except Unreadable as error:
                seen.add(error.reason)
            else:
                assert chunk is not None
                assert STOLEN not in chunk.data + chunk.partial
                seen.add(file.kind)

    with swapping(*place.pairs):
        until(lambda looks: looks >= ROUNDS and seen >= {"usage", "sessions", "outside_root"}, look)


def test_a_link_that_goes_while_it_is_resolved_ends_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """`realpath` raises where a link is exchanged for a file at the wrong instant: the next look finds out."""
    name, link = place.pairs[3]
    name.rename(link.with_name("events"))
    name.symlink_to(link.with_name("events"))
    discovery = Discovery(place.roots)
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "realpath", _gone)
        found = discovery.scan()
        assert [file.kind for file in found.files] == ["sessions"]
        assert [path for _, path, _ in found.unreadable] == [name]
    name.unlink()
    link.with_name("events").rename(name)
    assert [file.kind for file in discovery.scan().files] == ["usage", "sessions"]


def _gone(path: str) -> str:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)


def test_not_even_a_size_gets_out(place: Place, tmp_path: Path) -> None:
    """What waits to be read is what lies inside, though between a look and a read the log is another's."""
    with Exporter(tmp_path, f"--usage.root=logs={place.usage}") as exporter:
        with swapping(place.pairs[0]):
            lags = {total(exporter.scrape(), "coding_agent_exporter_lag_bytes") for _ in range(SCRAPES)}
        assert exporter.logged("outside_root") or exporter.logged("not_regular"), "the attack was noticed"
    assert max(lags) < LARGE - 10_000


def test_instance_files_outside_are_never_read(place: Place) -> None:
    """The same for instance files, each look a new one."""
    seen: set[str] = set()

    def look() -> None:
        found = InstanceDir(place.telemetry).scan()
        for _, heartbeat in found.changed:
            assert "stolen" not in repr(heartbeat)
            seen.add("read")
        seen.update(one.reason for one in found.rejected)

    with swapping(place.pairs[-1]):
        until(lambda looks: looks >= 10 * ROUNDS and seen >= {"read", "not_regular"}, look)


def test_the_program_is_not_led_outside(place: Place, tmp_path: Path) -> None:
    """The real program, scraped all the time while every name is exchanged: no label, span, log line or page is of
    what is outside, nor is a cent of it; what is inside counts once."""
    with http_receiver(receiver=Collector()) as receiver:
        with Exporter(
            tmp_path, f"--usage.root=logs={place.usage}", f"--sessions.dir=pi={place.sessions}",
            f"--telemetry.dir=pi={place.instances}", "--log.level=debug", f"--otlp.endpoint={receiver.url}",
            "--otlp.backfill", "--otlp.compression=none", "--otlp.metrics", "--otlp.flush-timeout=1s",
            "--telemetry.stale-after=1h",
        ) as exporter:
            with swapping(*place.pairs):
                pages = [exporter.get("/" if number % 10 == 0 else "/metrics").body for number in range(SCRAPES)]
            exporter.scrape()
            pages.append(exporter.get().body)
            seen = exporter.scrape()
            exporter.terminate()
        sent = list(receiver.raw)
        assert sent
    assert total(seen, COST) == total(seen, COST, provider="anthropic") == 2
    for text in (*pages, *sent, "\n".join(exporter.lines).encode()):
        assert STOLEN not in text
    state = b"".join(path.read_bytes() for path in tmp_path.glob("state.db*"))
    assert b"opus" in state
    assert STOLEN not in state
    assert exporter.logged("outside_root") or exporter.logged("unreadable"), "the attack was noticed"
    assert not exporter.logged("Traceback")
