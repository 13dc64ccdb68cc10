"""Takes recorded RPC frames, or a scripted model server, gives the tests transports as drivers of pi have them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from support import CAPTURES, DATA

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PIDS = {"a": 10642, "b": 10644, "c": 10646, "d": 10648, "b2": 11056}
"""The recorded processes."""

SESSIONS = {
    "a": ("01a1fbc2-76ec-7e2c-aaf6-aac198be4902", "01a1fbc2-9d99-74fb-81fc-6e733dcd907e"),
    "b": ("01a1fbc2-772c-75f6-82f0-d211d1564a55",),
    "b2": ("01a1fbc2-74e7-70f3-8236-1cf90229f35d",),
    "c": ("01a1fbc2-7697-7ac3-94c0-c0094ed1edb3",),
    "d": ("01a1fbc2-74e7-70f3-8236-1cf90229f35d",),
}
MODELS = {"a": ("sonnet-like", 200_000), "b": ("haiku-like", 16_000), "b2": ("haiku-like", 16_000),
          "c": ("tiny-ctx", 2_600), "d": ("sonnet-like", 200_000)}
COPIED = ("new_session", "switch_session", "fork")


def recorded(name: str) -> list[dict[str, Any]]:
    """The frames that a recorded process sent. Their content is the word CONTENT."""
    return [json.loads(line)["frame"] for line in (DATA / "rpc" / f"{name}.jsonl").read_text().splitlines()]


def recorded_lines(name: str) -> bytes:
    """The same as pi wrote them."""
    return b"".join(json.dumps(frame, separators=(",", ":")).encode() + b"\n" for frame in recorded(name))


def session_file(name: str, place: int = 0) -> Path:
    """The session file of a recorded process."""
    return next((CAPTURES / "pi" / "sessions").glob(f"*/*_{SESSIONS[name][place]}.jsonl"))


def reply(tokens: int, stop: str = "stop", **message: Any) -> dict[str, Any]:
    """The end of an assistant message that used so many input tokens."""
    return {"type": "message_end", "message": {
        "role": "assistant", "provider": "p", "model": "m", "stopReason": stop, "timestamp": 1_700_000_000_000,
        "usage": {"input": tokens, "output": 0, "cost": {"total": 0.5}}, **message}}


class Replay:
    """A transport, as pidriver's, of a recorded process. What it is asked it answers as pi would.

    It stays open at the end of the recording until it is closed, or the process is said to have `died`.
    """

    def __init__(self, name: str = "c", frames: list[Any] | None = None, *, answers: bool = True) -> None:
        self.name, self.answers = name, answers
        self.frames = deque(recorded(name) if frames is None else frames)
        self.sent: list[Any] = []
        self.pid: int | None = PIDS[name]
        self.returncode: int | None = None
        self.extra = "an attribute of its own"
        self._replies: deque[Any] = deque()
        self._session = 0
        self._closed = asyncio.Event()

    async def start(self) -> None:
        pass

    async def send(self, obj: Any) -> None:
        self.sent.append(obj)
        if self.answers and obj.get("type") == "get_state":
            model, window = MODELS[self.name]
            data = {"model": {"id": model, "provider": "loopback", "contextWindow": window}, "messageCount": 0,
                    "sessionId": SESSIONS[self.name][self._session],
                    "sessionFile": str(session_file(self.name, self._session)), "pendingMessageCount": 0}
            self._replies.append({"id": obj["id"], "type": "response", "command": "get_state", "success": True,
                                  "data": data})

    async def receive(self) -> Any:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if self._replies:
            return self._replies.popleft()
        if self.frames:
            frame = self.frames.popleft()
            if isinstance(frame, dict) and frame.get("command") in COPIED:
                self._session += 1
            return frame
        await self._closed.wait()
        return None

    async def aclose(self) -> None:
        if self.returncode is None:
            self.returncode = -15
        self._closed.set()

    def died(self, code: int) -> None:
        self.returncode = code
        self._closed.set()


class PiProcess:
    """A transport of a real process, as small as can be. Made from an object with `command`, `env` and `workspace`."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def returncode(self) -> int | None:
        return self._process.returncode if self._process else None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._config.to_argv(), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env=self._config.to_env(), cwd=self._config.workspace, limit=1 << 26)

    async def send(self, obj: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(obj).encode() + b"\n")
        await self._process.stdin.drain()

    async def receive(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        return json.loads(line) if line else None

    async def aclose(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


class _Model(BaseHTTPRequestHandler):
    """Replies of a few words; a prompt that says TOOL gets a tool call first, one that says FULL a full context."""

    protocol_version = "HTTP/1.1"
    server: ModelServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        *_, last = body["messages"]
        text = json.dumps(last["content"])
        tool = last["role"] == "user" and "TOOL" in text
        used = {"prompt_tokens": 1900 if "FULL" in text else 100 + 7 * len(self.server.truth),
                "completion_tokens": 20 + len(self.server.truth), "prompt_tokens_details": {"cached_tokens": 40}}
        delta: dict[str, Any] = {"role": "assistant", "content": "done"}
        if tool:
            call = {"index": 0, "id": f"call_{len(self.server.truth)}", "type": "function",
                    "function": {"name": "bash", "arguments": json.dumps({"command": "echo hi"})}}
            delta = {"role": "assistant", "tool_calls": [call]}
        base = {"id": f"chat-{len(self.server.truth)}", "object": "chat.completion.chunk", "created": 1,
                "model": body["model"]}
        chunks = [
            {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
            {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if tool else "stop"}]},
            {**base, "choices": [], "usage": {**used, "total_tokens": sum(list(used.values())[:2])}},  # type: ignore[arg-type]
        ]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True
        self.server.truth.append(used)


class ModelServer(ThreadingHTTPServer):
    """A model server on loopback. `truth` is what each call used."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Model)
        self.truth: list[dict[str, Any]] = []

    def install(self, home: Path) -> None:
        """Tell the pi of this home directory that this is its only provider."""
        model = {"id": "tiny", "name": "Tiny", "contextWindow": 20_000, "maxTokens": 500,
                 "cost": {"input": 1, "output": 5, "cacheRead": 0.1, "cacheWrite": 1.25}}
        provider = {"baseUrl": f"http://127.0.0.1:{self.server_port}/v1", "api": "openai-completions", "apiKey": "x",
                    "compat": {"supportsDeveloperRole": False, "supportsReasoningEffort": False}, "models": [model]}
        place = home / ".pi" / "agent"
        place.mkdir(parents=True, exist_ok=True)
        (place / "models.json").write_text(json.dumps({"providers": {"loopback": provider}}))


@contextmanager
def model_server() -> Iterator[ModelServer]:
    """A server that runs until the block ends."""
    with ModelServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
