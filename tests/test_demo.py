"""`demo`: made-up agents with the real exporter beside them, as a process that people start, watch and end."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from coding_agent_exporter import cli
from coding_agent_exporter.demo import scratch
from coding_agent_exporter.demo.work import CODEX, PREVIEW
from demo_support import PROGRAM, Demo, files
from process_support import DEADLINE, environment, run, wait_for
from support import Samples, total

if TYPE_CHECKING:
    from collections.abc import Callable

COST = "coding_agent_cost_usd_total"

@dataclass
class Seen:
    """What was to be seen of a demo that ran until everything had happened, and of how it ended."""

    samples: Samples = field(default_factory=dict)
    peak: float = 0.0
    text: str = ""
    errors: str = ""
    code: int = -1
    left: list[Path] = field(default_factory=list)
    home: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})
    checked: tuple[int, list[str]] = (-1, [])


def happened(seen: Seen) -> bool:
    """Whether all that a newcomer is promised has been in /metrics."""
    spent = {dict(labels)["model"] for (name, labels), value in seen.samples.items() if name == COST and value}
    return (
        seen.peak >= 95
        and total(seen.samples, "coding_agent_compactions_total") >= 1
        and total(seen.samples, "coding_agent_instances_lost_total") >= 1
        and total(seen.samples, "coding_agent_unpriced_tokens_total", model=PREVIEW.name) > 0
        and total(seen.samples, COST, provenance="estimated", model=CODEX.name) > 0
        and total(seen.samples, COST, cost_mode="subscription") > 0
        and total(seen.samples, "coding_agent_rate_limit_used_percent", window="five_hour") > 50
        and total(seen.samples, "coding_agent_exporter_rejected_total", reason="copied") > 0
        and len(spent) >= 4
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    place, found = tmp_path_factory.mktemp("show"), Seen()
    mine = place / "home" / ".pi" / "agent" / "telemetry" / "instances" / "4037.json"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"schemaVersion": 2}')
    before = files(place / "home")
    with Demo(place, "--speed=4", "--telemetry.stale-after=4s").begun() as demo:
        def look() -> bool:
            found.samples = demo.scrape()
            peaks = [value for (name, _), value in found.samples.items() if name == "coding_agent_context_percent_peak"]
            found.peak = max([found.peak, *peaks])
            return happened(found)

        wait_for(look, "everything to happen", every=0.5, deadline=3 * DEADLINE)
        found.checked = run(demo.home, "check", f"--config.file={demo.directory / 'demo.toml'}")
        found.code = demo.end(signal.SIGINT)
        found.text, found.errors = demo.text, "\n".join(demo.err)
        found.left = list(demo.temporary.iterdir())
        found.home = (before, files(demo.home))
    return found


def test_everything_happens(seen: Seen) -> None:
    """A peak, a compaction, a process lost, money of all kinds, a fork: `happened` waited for them."""
    assert happened(seen)
    assert {dict(labels)["source"] for (name, labels), _ in seen.samples.items() if name == COST} >= {
        "pi-coding", "omp", "opencode", "claude", "codex"}


def test_it_tells_what_happens(seen: Seen) -> None:
    """A line for each event, and nothing on standard error."""
    told = re.findall(r"^\d\d:\d\d:\d\d  (\S+) +(.*)$", seen.text, re.MULTILINE)
    whole = [f"{who}: {what}" for who, what in told]
    for event in (r"checkout: is near the limit: 9[5-9]\.\d % of 200,000 tokens", "checkout: compacted its context",
                  "payments: is killed.*", "review: is done and leaves", "catalog: its session is forked.*"):
        assert any(re.fullmatch(event, line) for line in whole), event
    assert seen.errors == ""


def test_at_the_end_metrics_are_what_was_spent(seen: Seen) -> None:
    """Both stand side by side, account by account, and are the same to the cent."""
    assert seen.code == 0
    rows = re.findall(r"^(\S+) +(\S.*?)  +(\$[\d.,]+|no price) +(\$[\d.,]+|no price)( |$)", seen.text, re.MULTILINE)
    assert len(rows) >= 9
    assert all(spent == said for _, _, spent, said, _ in rows)
    assert seen.text.endswith("Every cent arrived once.\n")


def test_nothing_is_left_and_nobody_elses_files_are_changed(seen: Seen) -> None:
    """Neither a temporary directory nor a state file in the home directory."""
    assert seen.left == []
    assert seen.home[0] == seen.home[1]


def test_other_commands_are_told_where_the_agents_are(seen: Seen) -> None:
    """The printed configuration file is one, and `check` finds no problem in the files."""
    assert seen.checked == (0, [])
    assert "coding-agent-exporter top --config.file=/" in seen.text


def test_the_printed_scrape_configuration_works(seen: Seen, tool: Callable[[str], str], tmp_path: Path) -> None:
    """promtool takes it as it stands, and its target is where the demo listened."""
    text = re.search(r"^scrape_configs:\n(?:[- ].*\n)+", seen.text, re.MULTILINE)
    assert text is not None
    file = tmp_path / "prometheus.yml"
    file.write_text(text[0])
    done = subprocess.run([tool("promtool"), "check", "config", file], capture_output=True, text=True, check=False)
    assert "SUCCESS" in done.stdout, done.stderr
    (job,) = yaml.safe_load(text[0])["scrape_configs"]
    assert f"http://{job['static_configs'][0]['targets'][0]}/metrics" in seen.text


# -- beginning and ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it(number: int, tmp_path: Path) -> None:
    """Also the one of a terminal that is closed. The account is still settled."""
    with Demo(tmp_path).begun() as demo:
        assert demo.end(number) == 0
        assert "Every cent arrived once." in demo.text
        assert list(demo.temporary.iterdir()) == []


def test_it_ends_when_its_time_is_up(tmp_path: Path) -> None:
    """With --for; --quiet leaves out what happens, and nothing else."""
    with Demo(tmp_path, "--for=1s", "--quiet", "--speed=10") as demo:
        assert demo.wait() == 0
        assert "starts with" not in demo.text
        assert "scrape_configs" in demo.text
        assert "Every cent arrived once." in demo.text


def test_it_ends_when_nobody_reads_it(tmp_path: Path) -> None:
    """As in `demo | head`."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "demo", "--web.listen-address=127.0.0.1:0"],
        env={**environment(tmp_path), "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as unread:
        try:
            assert unread.stdout is not None
            assert unread.stderr is not None
            unread.stdout.readline()
            unread.stdout.close()
            assert unread.wait(DEADLINE) == 0
            assert unread.stderr.read() == b""
        finally:
            unread.kill()
    assert list(tmp_path.glob(f"{scratch.PREFIX}*")) == []


def test_two_at_the_same_time(tmp_path: Path) -> None:
    """Each has its own files and port, and the end of one is nothing to the other."""
    with Demo(tmp_path).begun() as one:
        with Demo(tmp_path).begun() as other:
            assert len(list(one.temporary.iterdir())) == 2
            assert one.port != other.port
            assert other.end() == 0
        assert one.directory.is_dir()
        assert total(one.scrape(), "coding_agent_instances") > 0
        assert one.end() == 0
        assert list(one.temporary.iterdir()) == []


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """One line that says what to do, exit code 1, and nothing left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Demo(tmp_path, f"--web.listen-address={address}") as demo:
            assert demo.wait() == 1
            assert demo.text == ""
            (line,) = demo.err
            assert f"cannot listen on {address}" in line
            assert "--web.listen-address=" in line
            assert list(demo.temporary.iterdir()) == []


def test_no_room_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory that cannot be written is one line, and exit code 1."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(tmp_path / "missing") in err
    assert signal.getsignal(signal.SIGTERM) is before


def test_agents_that_cannot_write_end_it(tmp_path: Path) -> None:
    """A full disk, say: one line, exit code 1, nothing left."""
    with Demo(tmp_path, "--log.level=error").begun() as demo:
        for _ in range(100):
            # The agents go on meanwhile, and may make a directory anew.
            with suppress(OSError):
                shutil.rmtree(demo.directory / ".mngr")
                (demo.directory / ".mngr").write_text("")
                break
        assert demo.wait() == 1
        assert "the agents of the demo cannot go on" in demo.err[-1]
        assert list(demo.temporary.iterdir()) == []


def test_what_a_killed_one_left_the_next_removes(tmp_path: Path) -> None:
    """But not what belongs to one that lives, nor a directory without a lock, which may be anybody's."""
    with Demo(tmp_path).begun() as killed:
        left = killed.directory
        killed.end(signal.SIGKILL)
        assert left.is_dir()
    stranger = killed.temporary / f"{scratch.PREFIX}stranger"
    stranger.mkdir()
    with Demo(tmp_path).begun() as alive, Demo(tmp_path).begun() as second:
        assert not left.exists()
        assert all((demo.directory / scratch.LOCK).is_file() for demo in (alive, second))
        assert {path.name for path in alive.temporary.iterdir()} == {
            path.name for path in (stranger, alive.directory, second.directory)}
        assert (alive.end(), second.end()) == (0, 0)
    assert list(killed.temporary.iterdir()) == [stranger]


# -- what it leaves alone


AUDIT = f"""
import os, sys
home = os.environ["HOME"]
def hook(event, arguments):
    if event in {{"open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "sqlite3.connect"}}:
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(home):
            sys.stderr.write(f"touched {{event}} {{path}}\\n")
sys.addaudithook(hook)
{PROGRAM}
"""


def test_real_agents_are_neither_read_nor_told_of(tmp_path: Path) -> None:
    """Whatever variables say of agents, of this exporter and of a collector: nothing of the user's is opened."""
    home = tmp_path / "home"
    with socket.create_server(("127.0.0.1", 0)) as collector:
        collector.settimeout(0)
        theirs = {
            "PI_TELEMETRY_DIR": f"{home}/a", "MNGR_HOST_DIR": f"{home}/b", "PI_CODING_AGENT_DIR": f"{home}/c",
            "XDG_STATE_HOME": f"{home}/d", "CODING_AGENT_EXPORTER_USAGE_ROOT": f"{home}/e",
            "CODING_AGENT_EXPORTER_STATE_PATH": f"{home}/f",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.getsockname()[1]}",
        }
        with Demo(tmp_path, "--for=3s", "--speed=10", env=theirs, program=AUDIT) as demo:
            assert demo.wait() == 0
            assert demo.err == []
            assert "Every cent arrived once." in demo.text
        with pytest.raises(BlockingIOError):
            collector.accept()


@pytest.mark.parametrize("flags", [
    ["demo", "--telemetry.dir=x"], ["--usage.root=x", "demo"], ["--sessions.dir=x", "demo"], ["demo", "--state.path=x"],
    ["--state.path=x", "demo"], ["--counters.max-series=3", "demo"], ["demo", "--speed=0"], ["demo", "--for=soon"],
    ["demo", "--seed=one"],
])
def test_settings_that_it_does_not_take(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2, also where a flag stands before the command."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(flags) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert next(flag for flag in flags if flag != "demo").partition("=")[0] in err
    assert list(tmp_path.iterdir()) == []


def test_serve_does_not_load_it() -> None:
    """Nor does the command line, but for the list of what cannot be set."""
    program = "import sys, coding_agent_exporter.serve, coding_agent_exporter.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in loaded if name.startswith("coding_agent_exporter.demo.")] == []


LIAR = f"""
from coding_agent_exporter.demo import show, writers
show.PATIENCE, add = 0.5, writers.Truth.add
writers.Truth.add = lambda self, at, usage, pico, *tokens: add(self, at, usage, pico and pico + 10**10, *tokens)
{PROGRAM}
"""


def test_a_cent_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    """It is a test of the exporter by itself: exit code 1, and the account shows where."""
    with Demo(tmp_path, "--for=2s", "--speed=10", program=LIAR) as demo:
        assert demo.wait() == 1
        assert "DIFFERS" in demo.text
        assert "Every cent" not in demo.text
        assert list(demo.temporary.iterdir()) == []
