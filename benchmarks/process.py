"""Takes flags, gives a running exporter: the real process, measured from outside."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 600.0

# What Prometheus sends.
_HEADERS = {
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
    "Accept-Encoding": "gzip",
    "X-Prometheus-Scrape-Timeout-Seconds": "10",
}


class Exporter:
    """One exporter process on a free port of the loopback interface."""

    def __init__(self, home: Path, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.state = home / "state.db"
        self.begun = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603  our own program
            [sys.executable, "-m", "coding_agent_exporter", f"--state.path={self.state}", "--log.level=error",
             f"--web.listen-address=127.0.0.1:{self.port}", *flags],
            env={"HOME": str(home), "PATH": os.environ.get("PATH", "")},
        )
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def get(self, path: str, *, plain: bool = False) -> tuple[int, bytes]:
        """The status and body as they come over the wire; raises OSError while nothing listens."""
        self._connection.request("GET", path, headers={} if plain else _HEADERS)
        reply = self._connection.getresponse()
        return reply.status, reply.read()

    def text(self) -> str:
        return self.get("/metrics", plain=True)[1].decode()

    def first(self, *, usd: float | None = None, every: float = 0.002) -> float:
        """Seconds from exec to the first scrape that is complete and, with `usd`, comes to this total."""
        while time.monotonic() - self.begun < START_SECONDS:
            if self._process.poll() is not None:
                raise RuntimeError(f"the exporter ended with exit code {self._process.returncode}")
            try:
                ready, _ = self.get("/-/ready", plain=True)
                if ready == 200 and (usd is None or abs(total(self.text()) - usd) < 1e-6):
                    return time.monotonic() - self.begun
            except (OSError, http.client.HTTPException):
                self._connection.close()
            time.sleep(every)
        raise TimeoutError("no correct scrape")

    def memory(self, field: str = "VmRSS") -> float:
        """MB (10^6 bytes); VmHWM is the highest so far. NaN where there is no /proc."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return float("nan")
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith(field))

    def cpu(self) -> float:
        """Seconds of CPU so far, NaN where there is no /proc."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._connection.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def exporter(home: Path, *flags: str) -> Iterator[Exporter]:
    running = Exporter(home, *flags)
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def agents(directory: Path, count: int) -> Iterator[None]:
    """So many agents with pi-telemetry's default heartbeat."""
    directory.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(  # noqa: S603  our own program
        [sys.executable, "-m", "benchmarks.agents", str(directory), str(count)],
        cwd=Path(__file__).parent.parent,
    )
    try:
        while len(list(directory.glob("*.json"))) < count:
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def total(exposition: str, name: str = "coding_agent_cost_usd_total") -> float:
    """The sum over all samples of a name."""
    return sum(float(line.rpartition(" ")[2]) for line in exposition.splitlines() if line.startswith(name + "{"))
