"""The real pi in RPC mode against a scripted model server: driven by us, by pidriver where it is, and wrapped."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coding_agent_exporter.integrations.pidriver import observed
from process_support import DEADLINE, Exporter, environment, wait_for
from rpc_support import ModelServer, PiProcess, model_server
from support import total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND = ["--mode", "rpc", "--provider", "loopback", "--model", "tiny", "--no-extensions"]
COST = {"prompt": 1e-6, "cached": 1e-7, "completion": 5e-6}
"""USD per token of the scripted model."""


@dataclass
class Config:
    """What the transport asks of a configuration, by pidriver's names."""

    program: str
    workspace: Path
    home: Path

    def to_argv(self) -> list[str]:
        return [self.program, *COMMAND]

    def to_env(self) -> dict[str, str]:
        return environment(self.home, {"PI_OFFLINE": "1"})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """A model server that the pi of this home directory knows; the driver is of the same user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("PI_TELEMETRY_DIR", "MNGR_HOST_DIR", "MNGR_AGENT_STATE_DIR", "PI_CODING_AGENT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PI_TELEMETRY_HEARTBEAT_MS", "250")
    (tmp_path / "project").mkdir()
    with model_server() as running:
        running.install(tmp_path)
        yield running


async def until(transport: Any, kind: str) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE):
        while True:
            frame = await transport.receive()
            assert frame is not None, "pi has ended"
            assert not str(frame.get("id", "")).startswith("coding-agent-exporter")
            if frame["type"] == kind or frame.get("command") == kind:
                return dict(frame)


def usd(server: ModelServer) -> float:
    """What the calls have cost."""
    return sum(  # type: ignore[no-any-return] # of JSON(
        (used["prompt_tokens"] - used["prompt_tokens_details"]["cached_tokens"]) * COST["prompt"]
        + used["prompt_tokens_details"]["cached_tokens"] * COST["cached"]
        + used["completion_tokens"] * COST["completion"] for used in server.truth)


def spent(exporter: Exporter) -> float:
    return total(exporter.scrape(), "coding_agent_cost_usd_total")


def instances(home: Path) -> list[Path]:
    return sorted((home / ".pi/agent/telemetry/instances").glob("*.json"))


def log(home: Path) -> list[dict[str, Any]]:
    path = home / ".mngr/agents/pi-rpc/events/pi-coding/usage/events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("sessions", [True, False], ids=["sessions read", "log alone"])
def test_a_driven_pi_is_seen_as_any_other(
    sessions: bool, tmp_path: Path, server: ModelServer, tool: Callable[[str], str]
) -> None:
    """Activity, context, cost, a new session: from the driver's files, also where pi's session files are read too."""
    config = Config(tool("pi"), tmp_path / "project", tmp_path)
    flags = [] if sessions else [f"--sessions.dir={tmp_path / 'none'}"]
    with Exporter(tmp_path, *flags) as exporter:
        async def steps() -> None:
            transport = observed(PiProcess)(config)
            await transport.start()
            await transport.send({"type": "prompt", "message": "TOOL SECRET", "id": "1"})
            await until(transport, "agent_end")
            await asyncio.to_thread(wait_for, lambda: abs(spent(exporter) - usd(server)) < 1e-9, "the first run")
            await transport.send({"type": "new_session", "id": "2"})
            await until(transport, "new_session")
            await transport.send({"type": "prompt", "message": "FULL", "id": "3"})
            await until(transport, "agent_end")
            await transport.send({"type": "get_session_stats", "id": "4"})
            stats = (await until(transport, "get_session_stats"))["data"]
            await asyncio.to_thread(wait_for, lambda: abs(spent(exporter) - usd(server)) < 1e-9, "the second run")
            percent = stats["contextUsage"]["percent"]
            await asyncio.to_thread(wait_for, lambda: total(
                exporter.scrape(), "coding_agent_context_percent") == pytest.approx(percent, rel=0.02), "the context")
            samples = await asyncio.to_thread(exporter.scrape)
            assert total(samples, "coding_agent_context_window_tokens") == 20_000
            assert total(samples, "coding_agent_activity", activity="waiting_input") == 1
            assert total(samples, "coding_agent_sessions_total") == 2
            assert total(samples, "coding_agent_messages_total") == len(server.truth) == 3
            assert log(tmp_path)[-1]["session_id"] == Path(stats["sessionFile"]).stem
            assert "SECRET" not in instances(tmp_path)[0].read_text()
            await transport.aclose()
            await asyncio.to_thread(transport.__dict__["_recorder"].join)

        asyncio.run(steps())
        assert instances(tmp_path) == []
        assert spent(exporter) == pytest.approx(usd(server), abs=1e-9)
        assert "SECRET" not in json.dumps(log(tmp_path))


def test_pidriver_with_one_line(tmp_path: Path, server: ModelServer, tool: Callable[[str], str]) -> None:
    """pidriver's own client and transport: what it counts is what the log says."""
    if importlib.util.find_spec("pidriver") is None:
        pytest.skip("pidriver is not installed (it needs Python 3.12)")
    pidriver = importlib.import_module("pidriver")
    config = pidriver.PiConfig(
        binary=tool("pi"), provider="loopback", model="tiny", workspace=tmp_path / "project", home_dir=tmp_path,
        offline=True)

    async def run() -> Any:
        client = pidriver.PiClient(config, transport_factory=observed(pidriver.SubprocessTransport))
        session = await client.start("TOOL")
        async with asyncio.timeout(DEADLINE):
            async for event in session:
                if isinstance(event, pidriver.AgentEnd):
                    break
        assert isinstance(session._transport, pidriver.PiTransport)
        assert [path.stem for path in instances(tmp_path)] == [str(session._transport.pid)]
        await session.aclose()
        await asyncio.to_thread(session._transport._recorder.join)
        return session.usage

    totals = asyncio.run(run())
    lines = log(tmp_path)
    assert len(lines) == len(server.truth) == 2
    assert totals.cost_usd == pytest.approx(sum(line["cost"]["total_cost_usd"] for line in lines))
    for name, kind in (("input_tokens", "input"), ("output_tokens", "output"), ("cache_read_tokens", "cache_read"),
                       ("cache_write_tokens", "cache_creation")):
        assert getattr(totals, name) == sum(line["tokens"][kind] for line in lines)
    assert instances(tmp_path) == []


@contextmanager
def wrapped(program: str, home: Path) -> Iterator[Wrapped]:
    """`wrap -- pi --mode rpc`, killed when it takes far too long."""
    command = [sys.executable, "-m", "coding_agent_exporter", "wrap", "--", program, *COMMAND]
    env = environment(home, {"PI_OFFLINE": "1", "PI_TELEMETRY_HEARTBEAT_MS": "250"})
    with subprocess.Popen(
        command, env=env, cwd=home / "project", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        watchdog = threading.Timer(2 * DEADLINE, process.kill)
        watchdog.start()
        try:
            yield Wrapped(process)
        finally:
            watchdog.cancel()
            process.kill()


class Wrapped:
    """A driver of a wrapped pi; `frames` are all that came."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.frames: list[dict[str, Any]] = []

    def send(self, *frames: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        for frame in frames:
            self.process.stdin.write(json.dumps(frame).encode() + b"\n")
        self.process.stdin.flush()

    def until(self, kind: str) -> None:
        """Read up to an event, or an answer to a command."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.frames.append(json.loads(line))
            if kind in {self.frames[-1]["type"], self.frames[-1].get("command")}:
                return
        pytest.fail(f"pi has ended before {kind}")

    def end(self) -> int:
        """Close its input; its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(DEADLINE)


def test_a_wrapped_pi(tmp_path: Path, server: ModelServer, tool: Callable[[str], str]) -> None:
    """`wrap -- pi --mode rpc`: nothing but the driver's own frames, and each message counted once."""
    with Exporter(tmp_path) as exporter, wrapped(tool("pi"), tmp_path) as driver:
        driver.send({"type": "get_state", "id": "1"}, {"type": "prompt", "message": "TOOL", "id": "2"})
        driver.until("agent_end")
        wait_for(lambda: abs(spent(exporter) - usd(server)) < 1e-9, "the run")
        wait_for(lambda: total(exporter.scrape(), "coding_agent_activity", activity="waiting_input") == 1, "the state")
        samples = exporter.scrape()
        assert total(samples, "coding_agent_messages_total") == len(server.truth) == 2
        assert total(samples, "coding_agent_context_percent") > 0
        [path] = instances(tmp_path)
        assert path.stem != str(driver.process.pid)
        assert driver.end() == 0
        assert instances(tmp_path) == []
    assert [one["id"] for one in driver.frames if one["type"] == "response"] == ["1", "2"]
    assert len({line["session_id"] for line in log(tmp_path)}) == 1


def test_a_wrapped_pi_whose_driver_asks_nothing(
    tmp_path: Path, server: ModelServer, tool: Callable[[str], str]
) -> None:
    """The session is then known from pi's session file, so that the message in both counts once."""
    with Exporter(tmp_path) as exporter:
        with wrapped(tool("pi"), tmp_path) as driver:
            driver.send({"type": "prompt", "message": "a"})
            driver.until("agent_end")
            driver.send({"type": "new_session"})
            driver.until("new_session")
            driver.send({"type": "prompt", "message": "b"})
            driver.until("agent_end")
            assert driver.end() == 0
        wait_for(lambda: abs(spent(exporter) - usd(server)) < 1e-9, "the runs")
        samples = exporter.scrape()
        assert total(samples, "coding_agent_messages_total") == len(server.truth) == 2
        assert total(samples, "coding_agent_sessions_total") == 2
    files = {path.stem for path in (tmp_path / ".pi/agent/sessions").rglob("*.jsonl")}
    assert {line["session_id"] for line in log(tmp_path)} == files
