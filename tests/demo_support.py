"""Takes flags, gives the tests `demo` as a process of its own, which is watched by what it writes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from process_support import DEADLINE, environment, get, wait_for
from support import parse

if TYPE_CHECKING:
    from support import Samples

PROGRAM = "import sys; from coding_agent_exporter.cli import main; sys.exit(main(sys.argv[1:]))"


def files(directory: Path) -> dict[str, bytes]:
    """Path below the directory -> content, of every file."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Demo:
    """A demo as a process, on a free port, with a home and a directory for temporary files of its own."""

    def __init__(self, place: Path, *flags: str, env: dict[str, str] | None = None, program: str = PROGRAM) -> None:
        self.home, self.temporary = place / "home", place / "tmp"
        for directory in (self.home, self.temporary):
            directory.mkdir(parents=True, exist_ok=True)
        self.out: list[str] = []
        self.err: list[str] = []
        address = [] if any("listen-address" in flag for flag in flags) else ["--web.listen-address=127.0.0.1:0"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "demo", *address, *flags], cwd=place, text=True,
            env={**environment(self.home, env), "TMPDIR": str(self.temporary)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        self._readers = [
            threading.Thread(target=_read, args=pair, daemon=True)
            for pair in ((self.process.stderr, self.err), (self.process.stdout, self.out))
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait()
        print("\n".join([*self.out, *self.err]))  # pytest shows it with a test that failed

    def begun(self) -> Self:
        """Once it serves and has told of its first agent."""
        wait_for(lambda: "starts with" in self.text or self.process.poll() is not None, "the demo to begin")
        assert "starts with" in self.text, self.err
        return self

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in list(self.out))

    @property
    def port(self) -> int:
        found = re.search(r"^metrics +http://127\.0\.0\.1:(\d+)/metrics$", self.text, re.MULTILINE)
        assert found is not None
        return int(found[1])

    @property
    def directory(self) -> Path:
        found = re.search(r" --config\.file=(\S+)/demo\.toml$", self.text, re.MULTILINE)
        assert found is not None
        return Path(found[1])

    def scrape(self) -> Samples:
        return parse(get(self.port).text)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Exit code; fails the test when it does not end."""
        code = self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.join(DEADLINE)
        return code


def _read(pipe: IO[str], lines: list[str]) -> None:
    with pipe:
        for line in pipe:
            lines.append(line.rstrip("\n"))  # noqa: PERF401  each as it comes
