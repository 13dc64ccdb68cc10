"""`wrap`: a command behind it behaves as without it; what is observed is a copy."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.integrations.files import Places
from coding_agent_exporter.integrations.recorder import MAX_BYTES, Recorder
from coding_agent_exporter.integrations.sessions import SessionFiles
from process_support import DEADLINE, environment, wait_for
from rpc_support import recorded_lines, session_file
from support import CAPTURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Start = Callable[..., subprocess.Popen[bytes]]

LOG = ".mngr/agents/pi-rpc/events/pi-coding/usage/events.jsonl"
EXPORTER = [sys.executable, "-m", "coding_agent_exporter"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `wrap` with a Python program as its command, in a process group of its own, without a terminal."""
    running = []

    def begin(program: str, *flags: str, **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*EXPORTER, "wrap", *flags, "--", sys.executable, "-c", program],
            env=environment(tmp_path), start_new_session=True,
            **{"cwd": tmp_path, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **options})
        watchdog = threading.Timer(DEADLINE, process.kill)
        watchdog.start()
        running.append((process, watchdog))
        return process

    yield begin
    for process, watchdog in running:
        watchdog.cancel()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


CAT = "import os\nwhile data := os.read(0, 65536):\n    while data: data = data[os.write(1, data):]"


def instances(home: Path) -> list[Path]:
    return sorted((home / ".pi/agent/telemetry/instances").glob("*.json"))


@pytest.mark.parametrize("data", [
    b"", b"\n", b"no newline", bytes(range(256)) * 100, b'{"type":"message_end"}\n' * 3 + b'{"torn', b"\n" * 70_000,
    b'{"type":"x","text":"' + "\u2028\U0001f600".encode() * 2_000_000 + b'"}\n',
], ids=["nothing", "empty line", "no newline", "binary", "frames", "lines", "16 MB frame"])
def test_bytes_pass_untouched(data: bytes, start: Start) -> None:
    """Both ways, whatever they are; the end of the input is the end of the command's input."""
    process = start(CAT)
    out, _ = process.communicate(data, timeout=DEADLINE)
    assert out == data
    assert process.returncode == 0


def test_frames_pass_while_both_sides_are_open(start: Start) -> None:
    """Unbuffered: an answer comes before the next question."""
    process = start(CAT)
    assert process.stdin is not None
    assert process.stdout is not None
    for number in range(50):
        process.stdin.write(b"%d" % number)
        process.stdin.flush()
        assert os.read(process.stdout.fileno(), 100) == b"%d" % number


def test_a_command_that_speaks_on_after_its_input_has_ended(start: Start) -> None:
    """Half of the connection is closed, the other is not."""
    process = start("import sys; text = sys.stdin.read(); print(text * 3, end='')")
    assert process.communicate(b"abc", timeout=DEADLINE)[0] == b"abcabcabc"


def test_a_command_that_closes_its_output_goes_on(start: Start, tmp_path: Path) -> None:
    """Its reader sees the end at once; its input still arrives."""
    process = start("import os, sys\nos.close(1)\nopen('got', 'w').write(sys.stdin.read())")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.read() == b""
    process.stdin.write(b"more")
    process.stdin.close()
    assert process.wait(DEADLINE) == 0
    assert (tmp_path / "got").read_text() == "more"


def test_a_command_that_closes_its_input_is_not_written_to(start: Start) -> None:
    """The writer learns it, as it would without us."""
    process = start("import os, sys\nos.close(0)\nprint('closed', flush=True)\nimport time\ntime.sleep(60)")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"closed\n"
    with pytest.raises(BrokenPipeError):
        _write_for_ever(process.stdin.fileno())
    assert process.poll() is None
    process.terminate()


def _write_for_ever(descriptor: int) -> None:
    while True:
        os.write(descriptor, b"x" * 1000)


def test_a_reader_that_goes_away_is_known_to_the_command(start: Start) -> None:
    """It gets SIGPIPE, or an error, as it would without us."""
    process = start(
        "import os, signal\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\nwhile True: os.write(1, b'x' * 9)")
    assert process.stdout is not None
    process.stdout.read(9)
    process.stdout.close()
    assert process.wait(DEADLINE) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(("program", "code"), [
    ("raise SystemExit(0)", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137),
    ("import os; os.abort()", 134),
])
def test_the_exit_code_is_the_commands(program: str, code: int, start: Start) -> None:
    """128 + n where signal n ended it, as shells say it."""
    process = start(program, stderr=subprocess.DEVNULL)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == code


@pytest.mark.parametrize(("command", "code"), [(["/nowhere/pi"], 127), (["/"], 126)])
def test_a_command_that_cannot_be_started(command: list[str], code: int, tmp_path: Path) -> None:
    """One line, and the exit code that a shell has for it."""
    done = subprocess.run([*EXPORTER, "wrap", "--", *command], env=environment(tmp_path), capture_output=True,
                          check=False, timeout=DEADLINE)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (code, b"", 1)


def test_flags_after_the_dashes_are_the_commands(tmp_path: Path) -> None:
    """Also those that we have ourselves; without a command there is nothing to run."""
    done = subprocess.run([*EXPORTER, "wrap", "--", "echo", "--telemetry-dir=x", "--", "--mode", "rpc"],
                          env=environment(tmp_path), capture_output=True, check=False, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (0, b"--telemetry-dir=x -- --mode rpc\n")
    for arguments in ([], ["--"]):
        done = subprocess.run([*EXPORTER, "wrap", *arguments], env=environment(tmp_path), capture_output=True,
                              check=False, timeout=DEADLINE)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
def test_signals_reach_the_command(number: signal.Signals, start: Start) -> None:
    """It handles them as it likes, and we stay until it has ended."""
    process = start(
        "import os, signal\ndef got(n, f):\n    os.write(1, b'got %d\\n' % n)\n    os._exit(40 + n)\n"
        f"signal.signal({int(number)}, got)\nprint('ready', flush=True)\nwhile True: signal.pause()")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.stdout.read() == b"got %d\n" % number
    assert process.wait(DEADLINE) == 40 + number


def test_a_grandchild_with_our_output_does_not_keep_us(start: Start) -> None:
    """What the command wrote arrives; what it left running is not waited for."""
    process = start("import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'])\n"
                    "print('done', flush=True)")
    assert process.communicate(timeout=DEADLINE)[0] == b"done\n"
    assert process.returncode == 0


def test_a_reader_that_is_stuck_does_not_keep_us_from_going(start: Start, tmp_path: Path) -> None:
    """The command has ended, and what it wrote does not fit anywhere: we wait, but not against a signal."""
    process = start("import os\nopen('pid', 'w').write(str(os.getpid()))\nos.write(1, b'x' * 150_000)")
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text() and not _runs(int(pid.read_text())), "its end")
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_we_were_given_is_given_to_the_command(start: Start, tmp_path: Path) -> None:
    """Open descriptors beyond the standard ones, and signals to be ignored (nohup)."""
    with (tmp_path / "third").open("wb") as file:
        process = start(
            f"import os, signal\nos.kill(os.getpid(), signal.SIGHUP)\nos.write({file.fileno()}, b'alive')",
            pass_fds=[file.fileno()], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        assert process.wait(DEADLINE) == 0
    assert (tmp_path / "third").read_bytes() == b"alive"


def test_pipes_that_do_not_block(start: Start) -> None:
    """Somebody who shares them has made them so: what does not fit is waited for."""
    (our_input, source), (sink, our_output) = os.pipe(), os.pipe()
    os.set_blocking(our_input, False)
    os.set_blocking(our_output, False)
    process = start("import os, sys\nos.write(1, b'x' * 300_000)\nos.write(1, sys.stdin.buffer.read())",
                    stdin=our_input, stdout=our_output)
    os.close(our_input)
    os.close(our_output)
    with os.fdopen(sink, "rb") as reader:
        assert reader.read(300_000) == b"x" * 300_000
        os.write(source, b"late")
        os.close(source)
        assert reader.read() == b"late"
    assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize(("first", "end"), [(0, 1), (1, 2), (0, 2)])
def test_standard_streams_that_are_closed(first: int, end: int, tmp_path: Path) -> None:
    """Their numbers are not given to pipes and files of ours, into which the command's output would then go."""
    program = ("import os, sys\nfrom coding_agent_exporter.wrap import _occupy\n_occupy()\n"
               "sys.stderr.write(' '.join(map(str, os.pipe())))")
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, check=True, timeout=DEADLINE,
                          env=environment(tmp_path), preexec_fn=partial(os.closerange, first, end))
    assert min(map(int, done.stderr.split())) > 2


def test_a_working_directory_that_is_gone(start: Start, tmp_path: Path) -> None:
    """The command runs in it, as it would without us."""
    (tmp_path / "gone").mkdir()
    process = start("import os, sys; print(sys.stdin.read())", cwd=tmp_path / "gone",
                    preexec_fn=(tmp_path / "gone").rmdir)
    assert process.communicate(b"x", timeout=DEADLINE)[0] == b"x\n"
    assert process.returncode == 0


SAY = """
import sys
for line in open({path!r}, 'rb'):
    sys.stdout.buffer.write(line)
sys.stdout.flush()
sys.stdin.read()"""


def test_frames_become_files(start: Start, tmp_path: Path) -> None:
    """With the command's own pid, where an exporter of this user looks; the instance goes when it has ended."""
    place = tmp_path / ".pi/agent/sessions/any"
    place.mkdir(parents=True)
    copy = place / session_file("c").name
    copy.write_bytes(session_file("c").read_bytes())
    os.utime(copy, (2e9, 2e9))
    said = tmp_path / "said"
    said.write_bytes(recorded_lines("c"))
    process = start(SAY.format(path=str(said)) + "\nimport os; open('pid', 'w').write(str(os.getpid()))")
    log = tmp_path / LOG
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") == 2, "the usage")
    wait_for(lambda: b'"session_compact"' in instances(tmp_path)[0].read_bytes(), "the last state")
    [path] = instances(tmp_path)
    document = json.loads(path.read_bytes())
    assert "CONTENT" not in path.read_text() + log.read_text()
    assert process.communicate(timeout=DEADLINE)[0] == said.read_bytes()
    assert document["process"]["pid"] == int((tmp_path / "pid").read_text()) != process.pid
    assert document["session"]["id"] == copy.stem.rpartition("_")[2]
    assert instances(tmp_path) == []
    wanted = (CAPTURES / "pi/agents/agent-c/events/pi-coding/usage/events.jsonl").read_text().splitlines()
    keys = ("timestamp", "session_id", "tokens", "cost", "model", "type", "source")
    assert [[json.loads(line)[key] for key in keys] for line in log.read_text().splitlines()] == [
        [json.loads(line)[key] for key in keys] for line in wanted]


def test_a_command_that_is_killed_leaves_its_instance(start: Start, tmp_path: Path) -> None:
    """As any agent that was: the exporter counts it as lost."""
    process = start("import os, sys; sys.stdin.read(1); os.kill(os.getpid(), 9)")
    wait_for(lambda: instances(tmp_path), "the instance")
    process.communicate(b"x", timeout=DEADLINE)
    assert process.returncode == 137
    assert len(instances(tmp_path)) == 1


def test_files_that_cannot_be_written_are_reported_once(start: Start, tmp_path: Path) -> None:
    """On standard error, beside the command's own; the bytes pass."""
    (tmp_path / "file").write_text("")
    process = start(CAT, f"--telemetry-dir={tmp_path}/file/x", f"--agent-dir={tmp_path}/file/y", stderr=subprocess.PIPE)
    out, err = process.communicate(recorded_lines("a"), timeout=DEADLINE)
    assert out == recorded_lines("a")
    assert process.returncode == 0
    lines = err.decode().splitlines()
    assert [sum(kind in line for line in lines) for kind in ("instance file", "usage log")] == [1, 1]


def test_what_cannot_be_observed_in_time_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bounded: a piece that does not fit is dropped with the line it belongs to; what comes later is read again."""
    recorder = Recorder(Places.of({"HOME": str(tmp_path)}))
    first, second = recorded_lines("c"), recorded_lines("b2")
    # Without its middle this would be a whole frame, of a message that never was.
    begin, end = b'{"type":"message_end","message":{"role":"assistant","usage":{"input":1', b'}}}\n'
    recorder.chunk(first + begin)
    recorder.chunk(b"2" * MAX_BYTES)
    recorder.chunk(end + second)
    recorder.start(1, str(tmp_path), SessionFiles(["--no-session"], {}, str(tmp_path)))
    recorder.close()
    recorder.join()
    assert (tmp_path / LOG).read_bytes().count(b"\n") == 4
    assert len(caplog.messages) == 1


def test_any_mix_of_pieces_gives_the_same(tmp_path: Path) -> None:
    """However the stream is cut, the log is the same."""
    logs = set()
    for seed in range(3):
        chance, home = random.Random(seed), tmp_path / str(seed)
        recorder = Recorder(Places.of({"HOME": str(home)}))
        recorder.start(1, str(home), SessionFiles(["--no-session"], {}, str(home)))
        raw = recorded_lines("a")
        while raw:
            size = chance.randrange(1, 3000)
            recorder.chunk(raw[:size])
            raw = raw[size:]
        recorder.close()
        recorder.join()
        lines = [json.loads(line) for line in (home / LOG).read_text().splitlines()]
        logs.add(json.dumps([[line["timestamp"], line["tokens"], line["cost"]] for line in lines]))
        assert len(lines) == 11
    assert len(logs) == 1
