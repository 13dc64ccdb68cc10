"""Takes the transports of a Python program that drives pi or oh-my-pi, gives them back with telemetry.

    client = PiClient(config, transport_factory=observed(SubprocessTransport))

A transport is anything with the methods of `Transport` (pidriver's are), or of `SyncTransport`.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from coding_agent_exporter.integrations.agent import SWITCHES
from coding_agent_exporter.integrations.files import Places
from coding_agent_exporter.integrations.recorder import Recorder
from coding_agent_exporter.integrations.sessions import SessionFiles

__all__ = ["SyncTransport", "Transport", "observed"]

log = logging.getLogger("coding_agent_exporter.integrations")

_P = ParamSpec("_P")
_T = TypeVar("_T")
_ASKED_BY = "coding-agent-exporter-"


class Transport(Protocol):
    """What is wrapped, in asyncio. A frame is an object of JSON, or a line; `receive` gives None at the end."""

    async def start(self) -> None: ...
    async def send(self, obj: Any, /) -> None: ...
    async def receive(self) -> Any: ...
    async def aclose(self) -> None: ...

    @property
    def pid(self) -> int | None: ...
    @property
    def returncode(self) -> int | None: ...


class SyncTransport(Protocol):
    """What is wrapped, without asyncio. `pid` and `returncode` may be missing, here as there."""

    def start(self) -> None: ...
    def send(self, obj: Any, /) -> None: ...
    def receive(self) -> Any: ...
    def close(self) -> None: ...


def observed(
    factory: Callable[_P, _T], *, telemetry_dir: str | os.PathLike[str] | None = None,
    agent_dir: str | os.PathLike[str] | None = None, heartbeat_ms: float | None = None, ask: bool = True,
) -> Callable[_P, _T]:
    """A transport factory whose transports also write an instance file and a usage log.

    `telemetry_dir`: where instance files lie (default: $PI_TELEMETRY_DIR, else ~/.pi/agent/telemetry/instances).
    `agent_dir`: the agent's directory, which gets `events/pi-coding/usage/events.jsonl` (default:
    $MNGR_AGENT_STATE_DIR, else `agents/pi-rpc` below $MNGR_HOST_DIR or ~/.mngr). `heartbeat_ms`: 250 at the least
    (default: $PI_TELEMETRY_HEARTBEAT_MS, else 1500).

    `ask`: at the start, and when the session changes, send pi a `get_state` of our own and keep its answer from the
    driver. Without it the size of the context window is known only if the driver asks.

    The transports do what they did: frames pass unchanged, errors of theirs are raised, ours are logged once.
    """

    def make(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        transport = factory(*args, **kwargs)
        try:
            recorder = Recorder(Places.of(
                os.environ, telemetry_dir=telemetry_dir, agent_dir=agent_dir, heartbeat_ms=heartbeat_ms))
            config = args[0] if args else next(iter(kwargs.values()), None)
            kind = _Observed if _is_of_asyncio(transport) else _SyncObserved
            return cast("_T", kind(cast("Any", transport), recorder, config, ask=ask))
        except Exception as error:  # noqa: BLE001 (without telemetry, but with an agent)
            log.warning("an agent runs without telemetry: %s", error)
            return transport

    return make


def _is_of_asyncio(transport: object) -> bool:
    """By any method that is a coroutine, else by what closes it: a plain function may give something to await."""
    methods = (getattr(transport, name, None) for name in ("start", "send", "receive", "aclose"))
    return any(map(inspect.iscoroutinefunction, methods)) or not hasattr(transport, "close")


class _Base(Generic[_T]):
    """What both kinds share. Attributes that are not known here are the transport's, to read and to set."""

    _OWN = frozenset({"_inner", "_recorder", "_config", "_ask", "_numbers", "_asked", "_ended", "_lock",
                      "_question_task"})

    def __init__(self, inner: Any, recorder: Recorder, config: object, *, ask: bool) -> None:
        self._inner, self._recorder, self._config, self._ask = inner, recorder, config, ask
        self._numbers = itertools.count(1)
        self._asked: set[str] = set()
        self._ended = False
        # A transport that is dropped without being closed must not leave a heartbeat behind.
        weakref.finalize(self, recorder.close)

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:
            raise AttributeError(name)  # not initialized: `copy` looks before it fills
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._inner, name, value)

    @property
    def pid(self) -> int | None:
        return cast("int | None", getattr(self._inner, "pid", None))

    @property
    def returncode(self) -> int | None:
        return cast("int | None", getattr(self._inner, "returncode", None))

    def _begin(self) -> None:
        try:
            command, environ, cwd = _surroundings(self._config)
            inner = self._inner
            self._recorder.start(self.pid, cwd, SessionFiles(command, environ, cwd),
                                 lambda: getattr(inner, "returncode", None))
        except Exception as error:  # noqa: BLE001 (see `observed`)
            log.warning("an agent runs without telemetry: %s", error)

    def _question(self) -> dict[str, Any]:
        name = f"{_ASKED_BY}{next(self._numbers)}"
        self._asked.add(name)
        return {"id": name, "type": "get_state"}

    def _seen(self, frame: object) -> tuple[bool, bool]:
        """Note a frame that came: is it the driver's, and has the session changed?"""
        self._ended = frame is None
        if frame is None:
            return True, False
        self._recorder.frame(frame)
        response = _as_object(frame) if self._asked else frame
        if not isinstance(response, Mapping) or response.get("type") != "response":
            return True, False
        command, name = response.get("command"), response.get("id")
        if self._asked and (name in self._asked if isinstance(name, str) else _is_refusal(response)):
            self._asked.discard(name if isinstance(name, str) else next(iter(self._asked)))
            return False, False
        return True, command in SWITCHES

    def _state(self) -> tuple[int | None, bool]:
        """The exit code as far as it is known, and whether the output has ended."""
        return self.returncode, self._ended

    def _end(self, before: tuple[int | None, bool]) -> None:
        """`before`: the state before the transport was closed. What ended only then was asked to go."""
        code, ended = before
        if code is None and ended and (code := self.returncode) == -15:
            code = None  # it had closed its output, and was then told to go
        self._recorder.close(code)


class _Observed(_Base[_T]):
    """A transport of asyncio."""

    def __init__(self, inner: Any, recorder: Recorder, config: object, *, ask: bool) -> None:
        super().__init__(inner, recorder, config, ask=ask)
        self._lock = asyncio.Lock()
        self._question_task: asyncio.Task[None] | None = None

    async def start(self, *args: Any, **kwargs: Any) -> Any:
        result = await self._inner.start(*args, **kwargs)
        self._begin()
        self._inquire()
        return result

    async def send(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        async with self._lock:
            result = await self._inner.send(obj, *args, **kwargs)
        self._recorder.frame(obj, sent=True)
        return result

    async def receive(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                frame = await self._inner.receive(*args, **kwargs)
            except Exception:
                self._ended = True
                raise
            is_drivers, moved = self._seen(frame)
            if moved:
                self._inquire()
            if is_drivers:
                return frame

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        while (frame := await self.receive()) is not None:
            yield frame

    async def aclose(self, *args: Any, **kwargs: Any) -> Any:
        before = self._state()
        if self._question_task is not None:
            self._question_task.cancel()
        try:
            return await self._inner.aclose(*args, **kwargs)
        finally:
            self._end(before)

    def _inquire(self) -> None:
        # A task: whoever receives must not wait for a pipe that is full because nobody receives.
        if self._ask:
            question = self._put_question()
            try:
                self._question_task = asyncio.get_running_loop().create_task(question)
            except RuntimeError:
                question.close()

    async def _put_question(self) -> None:
        with suppress(Exception):
            async with self._lock:
                await self._inner.send(self._question())


class _SyncObserved(_Base[_T]):
    """A transport without asyncio."""

    def __init__(self, inner: Any, recorder: Recorder, config: object, *, ask: bool) -> None:
        super().__init__(inner, recorder, config, ask=ask)
        self._lock = threading.Lock()

    def start(self, *args: Any, **kwargs: Any) -> Any:
        result = self._inner.start(*args, **kwargs)
        self._begin()
        self._inquire()
        return result

    def send(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            result = self._inner.send(obj, *args, **kwargs)
        self._recorder.frame(obj, sent=True)
        return result

    def receive(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                frame = self._inner.receive(*args, **kwargs)
            except Exception:
                self._ended = True
                raise
            is_drivers, moved = self._seen(frame)
            if moved:
                self._inquire()
            if is_drivers:
                return frame

    def __iter__(self) -> Iterator[Any]:
        while (frame := self.receive()) is not None:
            yield frame

    def close(self, *args: Any, **kwargs: Any) -> Any:
        before = self._state()
        try:
            return self._inner.close(*args, **kwargs)
        finally:
            self._end(before)

    def _inquire(self) -> None:
        # A thread, for the reason that asyncio has a task.
        if self._ask:
            with suppress(RuntimeError):  # no more threads, or the interpreter ends
                threading.Thread(target=self._put_question, daemon=True).start()

    def _put_question(self) -> None:
        with suppress(Exception), self._lock:
            self._inner.send(self._question())


def _as_object(frame: object) -> object:
    """A frame that may be an answer to a question of ours: decoded if it came as a line."""
    if isinstance(frame, str | bytes | bytearray) and (
            (_ASKED_BY if isinstance(frame, str) else _ASKED_BY.encode()) in frame):  # type: ignore[operator]
        with suppress(ValueError, RecursionError):
            return json.loads(frame)
    return frame


def _is_refusal(response: Mapping[str, Any]) -> bool:
    """A pi that does not know the command says so without an id."""
    return (response.get("id") is None and response.get("command") == "get_state"
            and response.get("success") is False)


def _surroundings(config: Any) -> tuple[list[str], Mapping[str, str], str]:
    """Command line, environment and working directory of the process, as pidriver's PiConfig tells them."""
    command: list[str] = []
    environ: Mapping[str, str] = os.environ
    with suppress(Exception):
        command = [str(word) for word in config.to_argv()]
    with suppress(Exception):
        environ = {str(name): str(value) for name, value in config.to_env().items()}
    cwd = getattr(config, "workspace", None) or getattr(config, "cwd", None)
    return command, environ, str(Path(cwd).absolute() if isinstance(cwd, str | os.PathLike) else Path.cwd())
