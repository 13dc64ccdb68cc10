"""Takes what a container shall be, gives it as a process in namespaces of its own; and agents that live in one."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

import coding_agent_exporter
import contained
from contained import Description
from process_support import DEADLINE, Reply, get, wait_for
from support import Samples, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

EXPORTER_UID = 65532
AGENT_UID = 1000
SHARED_GID = 2000
"""What `fsGroup` of a pod is: the group of shared volumes, which all containers are in."""

_LISTENING = re.compile(r"address=\S*:(\d+)")
_TESTS = Path(__file__).parent


def require_namespaces(at: Path) -> None:
    """Skip the test where this user may not make namespaces; fail it where the CI's root may not."""
    if os.geteuid() != 0:
        pytest.skip("namespaces with several users in them need root")
    done = Container(at, ["/bin/true"]).start()
    if done.wait() != 0:
        if os.environ.get("REQUIRE_TOOLS") == "1":
            pytest.fail("no namespaces can be made here, and REQUIRE_TOOLS=1 says that they must\n" + done.log)
        pytest.skip("no namespaces can be made here: " + done.log)


def python_binds() -> list[tuple[str, str, bool]]:
    """This Python, the exporter and these tests, at their own places, read-only, for a root of binds alone."""
    package = Path(coding_agent_exporter.__file__ or "").parent.parent
    wanted = {Path(path) for path in ("/usr", "/bin", "/lib", "/lib64", "/etc", sys.prefix, sys.base_prefix)}
    wanted |= {package, _TESTS}
    return [
        (str(path), str(path), True) for path in sorted(wanted)
        if path.is_dir() and not any(parent in wanted for parent in path.parents)
    ]


class Container:
    """A process in PID, mount, IPC and UTS namespaces of its own, without capabilities, on a read-only root.

    `shared` directories are (outside, inside, read-only); `members` are those of `Description`. `log` is what it wrote
    to standard error.
    """

    def __init__(self, at: Path, argv: list[str], *, uid: int = EXPORTER_UID, env: Mapping[str, str] | None = None,
                 shared: list[tuple[Path, str, bool]] | None = None, **members: Any) -> None:
        at.mkdir(parents=True, exist_ok=True)
        binds = [(str(outside), inside, read_only) for outside, inside, read_only in shared or []]
        description = Description(argv, dict(env or {}), str(at), uid, uid, binds=python_binds() + binds)
        self._description = replace(description, **members)
        if self._description.root is not None:
            self._description.binds = binds
        self._lines: list[str] = []
        self.pid = 0
        """Of its first process, as seen from outside."""
        self.port = 0

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.pid and not self.ended:
            self.signal(signal.SIGKILL)
        self.wait()
        print(self.log)  # pytest shows it with a test that failed

    def start(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-I", contained.__file__, self._description.dump()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        self.pid = int(first) if first.strip() else 0
        return self

    @property
    def log(self) -> str:
        return "\n".join(self._lines)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def signal(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit code, 128 + signal if killed; fails the test when it does not end."""
        try:
            code = self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError("the container does not end:\n" + self.log) from None
        self._reader.join(DEADLINE)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        return code

    def kill(self) -> None:
        """SIGKILL to its first process, and with that to all."""
        self.signal(signal.SIGKILL)
        self.wait()

    def ask(self, *words: object) -> str:
        """One line to its standard input, and the line it answers with."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the container has ended:\n" + self.log
        return answer.strip()

    def finish(self) -> int:
        """Close its standard input, upon which an agent ends in order; its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait()

    def status(self) -> dict[str, str]:
        """What the kernel says of its first process: /proc/<pid>/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @contextmanager
    def network(self) -> Iterator[None]:
        """This thread's new sockets are in the container's network."""
        with Path("/proc/thread-self/ns/net").open() as own, Path(f"/proc/{self.pid}/ns/net").open() as its:
            _enter(its.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())

    def listens(self) -> Self:
        """Wait until its log says where the exporter listens."""
        wait_for(lambda: self.ended or _LISTENING.search(self.log), "the exporter to listen")
        found = _LISTENING.search(self.log)
        assert found is not None, self.log
        self.port = int(found[1])
        return self

    def get(self, path: str = "/metrics") -> Reply:
        with self.network():
            return get(self.port, path)

    def scrape(self) -> Samples:
        """One delivered scrape in the classic text format."""
        reply = self.get()
        assert reply.status == 200, reply.text
        return parse(reply.text)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line.rstrip("\n"))


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, contained.NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def exporter(at: Path, volume: Path, *flags: str, **members: Any) -> Container:
    """The exporter as a sidecar that reads `volume`, mounted read-only at /agent, with its state in /state.

    It has no /tmp to write to, as in the chart.
    """
    state = at.with_name("state")
    state.mkdir(exist_ok=True)
    os.chown(state, EXPORTER_UID, EXPORTER_UID)
    package = Path(coding_agent_exporter.__file__ or "").parent.parent
    given: dict[str, Any] = {"groups": [SHARED_GID], **members}
    return Container(
        at,
        [sys.executable, "-m", "coding_agent_exporter", "--web.listen-address=127.0.0.1:0",
         "--state.path=/state/state.db", "--telemetry.dir=pi=/agent/telemetry", "--sessions.dir=pi=/agent/sessions",
         "--usage.root=mngr=/agent/mngr", *flags],
        env={"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"},
        shared=[(volume, "/agent", True), (state, "/state", False)], **given,
    )


def agent(at: Path, volume: Path, **members: Any) -> Container:
    """An agent that writes what it is asked to: see `agent_process`. Its pid inside is `pid=`, 1 by default."""
    package = Path(coding_agent_exporter.__file__ or "").parent.parent
    given: dict[str, Any] = {"groups": [SHARED_GID], "umask": 0o027, "uid": AGENT_UID, **members}
    return Container(
        at, [sys.executable, str(_TESTS / "agent_process.py"), "/agent"],
        env={"PYTHONPATH": f"{package}:{_TESTS}", "PYTHONDONTWRITEBYTECODE": "1"},
        shared=[(volume, "/agent", False)], **given,
    )
