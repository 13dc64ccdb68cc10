"""`top` as a person sees it: the program in a pseudo-terminal, its screen, its keys, and what it leaves behind."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Self

import pyte
import pytest

from agents_support import PiInstance, PiLog
from coding_agent_exporter import cli
from process_support import DEADLINE, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

COMMAND = [sys.executable, "-m", "coding_agent_exporter", "top"]
WITHOUT_RICH = [sys.executable, "-c", (
    "import sys, importlib.util as util; find = util.find_spec\n"
    "util.find_spec = lambda name, *rest: None if name == 'rich' else find(name, *rest)\n"
    "sys.modules['rich'] = None\n"
    "from coding_agent_exporter.cli import main\nsys.exit(main(['top', *sys.argv[1:]]))")]
"""The program where the extra is not installed."""


def flags(home: Path) -> list[str]:
    return [f"--telemetry.dir=pi={home / 'telemetry'}", f"--usage.root=mngr={home / 'mngr'}",
            f"--sessions.dir=pi={home / 'sessions'}"]


class Terminal:
    """The program in a terminal of its own. `raw` is all that it has written."""

    def __init__(self, home: Path, *argv: str, width: int = 80, height: int = 24,
                 env: Mapping[str, str] | None = None, command: list[str] | None = None) -> None:
        self.raw = b""
        self.screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        self._size(width, height)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.process = subprocess.Popen(
            [*(command or COMMAND), *flags(home), *argv], cwd=home, stdin=slave, stdout=slave, stderr=slave,
            env=environment(home, {"TERM": "xterm-256color", "PYTHONUTF8": "1", "TMPDIR": str(home), **(env or {})}),
            start_new_session=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE)
        os.close(self._master)
        os.close(self._slave)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def see(self, condition: Callable[[str], object], what: str) -> str:
        """The text of the screen once the condition holds."""
        end = time.monotonic() + DEADLINE
        while not condition(self.text):
            assert time.monotonic() < end, f"still waiting for {what} on:\n{self.text}"
            self._read(0.1)
        return self.text

    def shows(self, *texts: str) -> str:
        return self.see(lambda text: all(one in text for one in texts), repr(texts))

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, width: int, height: int) -> None:
        self.screen.resize(height, width)
        self._size(width, height)
        self.process.send_signal(signal.SIGWINCH)  # the kernel's is for the foreground group of a session's terminal

    def ends(self) -> int:
        """The exit code, once the program has ended; what it wrote until then is on the screen."""
        end = time.monotonic() + DEADLINE
        while self.process.poll() is None:
            assert time.monotonic() < end, f"does not end:\n{self.text}"
            self._read(0.05)
        while self._read(0.0):
            pass
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """Whether the terminal is as it was: the main screen, a cursor, and the mode of its lines."""
        assert self.raw.count(b"\x1b[?1049h") == self.raw.count(b"\x1b[?1049l")
        assert self.raw.rfind(b"\x1b[?25h") > self.raw.rfind(b"\x1b[?25l")
        return termios.tcgetattr(self._slave) == self.before

    def _size(self, width: int, height: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def _read(self, patience: float) -> bool:
        if not select.select([self._master], [], [], patience)[0]:
            return False
        data = os.read(self._master, 1 << 16)
        self.raw += data
        self._stream.feed(data)
        return bool(data)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two agents; a session that cost 1.25 dollars today."""
    for pid, percent in ((4242, 96.0), (4243, 41.0)):
        PiInstance(tmp_path / "telemetry", pid).write(percent)
    PiLog(tmp_path / "mngr", "a").message("anthropic/claude-haiku-4-5", 1_250_000_000_000)
    return tmp_path


def run(home: Path, *argv: str, command: list[str] | None = None,
        env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The program without a terminal."""
    return subprocess.run([*(command or COMMAND), *flags(home), *argv], cwd=home, stdin=subprocess.DEVNULL, text=True,
                          capture_output=True, env=environment(home, env), timeout=DEADLINE, check=False)


# -- live


def test_live_screen(home: Path) -> None:
    """It shows who is there and what was spent, follows what happens, and q leaves the terminal as it was."""
    with Terminal(home) as terminal:
        terminal.shows("2 working", "1.25 USD billed", "4242", "96!!", "q quit")
        PiInstance(home / "telemetry", 4244).write(12.0, activity="waiting_input")
        terminal.shows("1 waiting", "4244")
        PiLog(home / "mngr", "b").message("anthropic/opus", 750_000_000_000)
        terminal.shows("2.00 USD billed")
        (home / "telemetry" / "4243.json").unlink()
        terminal.see(lambda text: "4243" not in text, "the end of 4243")
        terminal.press("q")
        assert terminal.ends() == 0
        assert terminal.restored
    assert not list(home.glob("coding-agent-exporter-*"))
    assert not (home / ".local").exists()


def test_keys(home: Path) -> None:
    """Sorting, filtering and help, by keys that are answered at once, not with the next frame."""
    with Terminal(home, "--interval=1h") as terminal:
        terminal.shows("by state", "4242", "4243", "1.25 USD")
        terminal.press("s")
        terminal.shows("by context")
        terminal.press("/4243")
        terminal.see(lambda text: "filter: 4243" in text and "\n 4242" not in text, "the filter")
        terminal.press("\r")
        terminal.shows("/4243", "q quit")
        terminal.press("\x1b")
        terminal.see(lambda text: "\n 4242" in text and "/4243" not in text, "all agents, after Esc alone")
        terminal.press("?")
        terminal.shows("reverse the order", "imputed")
        terminal.press("x")
        terminal.see(lambda text: "reverse the order" not in text and "\n 4242" in text, "the table")
        terminal.press("q")
        assert terminal.ends() == 0


def test_scrolling(home: Path) -> None:
    """A list that is longer than the screen scrolls by arrow keys and pages."""
    for pid in range(5000, 5030):
        PiInstance(home / "telemetry", pid).write(10.0)
    with Terminal(home, "--sort=pid", height=12) as terminal:
        terminal.shows("1-6 of 33", "\n 4242")
        terminal.press("\x1b[B")
        terminal.see(lambda text: "2-7 of 33" in text and "\n 4242" not in text, "the second line")
        terminal.press("\x1b[6~")
        terminal.shows("8-13 of 33")
        terminal.press("\x1b[F")
        terminal.shows("28-33 of 33", "5029")
        terminal.press("\x1b[A")
        terminal.shows("27-32 of 33")


def test_resizing(home: Path) -> None:
    """The frame fills the new size at once: more columns where there is room, none too many where there is none."""
    with Terminal(home, "--interval=1h") as terminal:
        terminal.shows("q quit", "1.25 USD", "4243")
        terminal.resize(120, 30)
        text = terminal.see(lambda text: text.count("\n") == 29 and "q quit" in text.splitlines()[-1], "30 lines")
        assert "session-of-4242" in text
        terminal.resize(40, 8)
        text = terminal.see(lambda text: text.splitlines()[-1].startswith("q quit"), "8 lines")
        assert "TOK/M" not in text
        terminal.press("q")
        assert terminal.ends() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals(home: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C is a way to quit; others say by which signal it ended. The terminal is restored, nothing is left."""
    with Terminal(home) as terminal:
        terminal.shows("4242")
        terminal.process.send_signal(number)
        assert terminal.ends() == code
        assert terminal.restored
    assert not list(home.glob("coding-agent-exporter-*"))


def test_suspending(home: Path) -> None:
    """Ctrl-Z gives the terminal back while the program is stopped; then the screen is there again."""
    with Terminal(home) as terminal:
        terminal.shows("4242", "q quit")
        # Without a shell that does so the kernel would not stop it: its process group is orphaned.
        terminal.process.send_signal(signal.SIGTSTP)
        terminal.see(lambda _: b"\x1b[?1049l" in terminal.raw, "the main screen")
        terminal.screen.reset()
        terminal.process.send_signal(signal.SIGCONT)
        terminal.shows("4242", "q quit")
        terminal.press("q")
        assert terminal.ends() == 0
        assert terminal.restored


def test_an_exception_restores_the_terminal(home: Path) -> None:
    """When the collector fails, the reason stands on the main screen, in a terminal that works."""
    broken = ("import sys\nfrom coding_agent_exporter import cli\nfrom coding_agent_exporter.top import collect\n"
              "steps = iter('12')\n"
              "real = collect.Collector.step\n"
              "def step(self, changes=None):\n"
              "    if next(steps, None) is None: raise OSError('no room')\n"
              "    return real(self, changes)\n"
              "collect.Collector.step = step\n"
              "sys.exit(cli.main(['top', *sys.argv[1:]]))")
    with Terminal(home, command=[sys.executable, "-c", broken]) as terminal:
        assert terminal.ends() == 1
        assert terminal.restored
        after = terminal.raw.rpartition(b"\x1b[?1049l")[2]
        assert after.decode().strip().splitlines()[-1] == "coding-agent-exporter: error: no room"
        assert b"Traceback" not in terminal.raw


def test_hostile_names(home: Path) -> None:
    """A session's name cannot move the cursor, set the title or turn the text around: other lines stay as they are."""
    evil = "\\u001b[2J\\u001b]0;owned\\u0007\\u202eevil"
    path = home / "telemetry" / "4243.json"
    path.write_text(path.read_text().replace('"id": "session-of-4243"', f'"id": "s", "name": "{evil}"'))
    with Terminal(home, width=120) as terminal:
        text = terminal.shows("evil", "4242", "agents 2 working", "q quit")
        assert "\\x1b[2J" in text
        assert "\u202e" not in text
        assert terminal.screen.title == ""
        assert b"owned\x07" not in terminal.raw


# -- colours


def colours(terminal: Terminal) -> set[str]:
    """Those of all cells."""
    screen = terminal.screen
    return {screen.buffer[line][column].fg for line in range(screen.lines) for column in range(screen.columns)}


def test_colours(home: Path) -> None:
    """Near the limit is red, an agent that works green, in the terminal's own palette."""
    with Terminal(home) as terminal:
        text = terminal.shows("96!!", "q quit", "1.25")
        line = next(number for number, row in enumerate(text.splitlines()) if row.lstrip().startswith("4242"))
        row = terminal.screen.buffer[line]
        place = text.splitlines()[line].index("96!!")
        assert (row[place].fg, row[place].bold) == ("red", True)
        assert row[text.splitlines()[line].index("working")].fg == "green"


def test_no_color(home: Path) -> None:
    """NO_COLOR leaves bold and reverse, and no colours; the marks say the same."""
    with Terminal(home, env={"NO_COLOR": "1"}) as terminal:
        terminal.shows("96!!", "q quit", "1.25")
        assert colours(terminal) == {"default"}


def test_a_terminal_without_unicode(home: Path) -> None:
    """Where the encoding is ASCII the screen is too."""
    with Terminal(home, env={"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0",
                             "PYTHONIOENCODING": "ascii"}) as terminal:
        terminal.shows("######", "96!!")
        assert terminal.raw.isascii()


# -- one frame


@pytest.mark.parametrize("argv", [[], ["--once"]])
def test_piped(home: Path, argv: list[str]) -> None:
    """Without a terminal one frame is printed: plain text, all agents, nothing of a footer."""
    result = run(home, *argv)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("agents 2 working  1 recent ")
    assert lines[1] == "today  1.25 USD billed  26 tokens"
    assert lines[4].split() == ["PID", "STATE", "FOR", "CONTEXT", "PEAK", "MODEL", "SESSION", "TODAY", "TOK/M", "LAST"]
    assert len(lines) == 8
    assert "\x1b" not in result.stdout


def test_once_on_a_terminal(home: Path) -> None:
    """One frame where the cursor is, in colour, and the prompt after it."""
    with Terminal(home, "--once") as terminal:
        assert terminal.ends() == 0
        assert b"\x1b[?1049h" not in terminal.raw
        assert "agents 2 working" in terminal.text
        assert colours(terminal) > {"default", "green"}


def test_a_dumb_terminal(home: Path) -> None:
    """It cannot place a cursor: one plain frame, as on a pipe."""
    with Terminal(home, env={"TERM": "dumb"}) as terminal:
        assert terminal.ends() == 0
        assert b"\x1b" not in terminal.raw
        assert "agents 2 working" in terminal.text


def test_sort_and_filter_by_flags(home: Path) -> None:
    """For a frame in a script."""
    result = run(home, "--once", "--sort=context", "--filter=working")
    assert [line.split()[0] for line in result.stdout.splitlines()[5:]] == ["4242", "4243"]
    assert "by context" in result.stdout


def test_width_of_a_pipe(home: Path) -> None:
    """COLUMNS says how wide a frame may be where there is no terminal to ask."""
    lines = run(home, "--once", env={"COLUMNS": "120"}).stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert "session-of-4242" in "\n".join(lines)


def test_without_the_extra(home: Path) -> None:
    """The live screen needs it and says how to get it; one frame does without, on a terminal too."""
    with Terminal(home, command=WITHOUT_RICH) as terminal:
        assert terminal.ends() == 2
        assert terminal.raw.decode().replace("\r\n", "\n") == (
            "coding-agent-exporter: error: top: the live screen needs more: "
            "pip install 'coding-agent-exporter[tui]' (--once does without)\n")
    with Terminal(home, "--once", command=WITHOUT_RICH) as terminal:
        assert terminal.ends() == 0
        assert "agents 2 working" in terminal.text
    assert run(home, command=WITHOUT_RICH).returncode == 0


def test_a_frame_in_a_pipe_does_not_load_the_library(home: Path) -> None:
    """Nor does anything else but the live screen: it costs memory and time."""
    program = ("import sys\nfrom coding_agent_exporter.cli import main\nmain(['top', *sys.argv[1:]])\n"
               "sys.exit('rich' in sys.modules)")
    assert run(home, "--once", command=[sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("value", ["0", "50ms", "soon", "2h"])
def test_bad_interval(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that names the flag."""
    assert cli.main(["top", f"--interval={value}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coding-agent-exporter: error: --interval: ")
    assert error.count("\n") == 1
