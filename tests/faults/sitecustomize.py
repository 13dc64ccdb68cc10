"""Takes rules from the file that FAULTS names, lets calls of the system fail or hang, and sets the clock wrong.

The interpreter imports it by itself where its directory is in PYTHONPATH: the program under test is the real one. A
change of the file counts at once. A rule: {"call": name, "path": prefix} with "errno", or "delay" in seconds, or
"hang". "clock" is added to the time of day.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_stat, _open, _scandir, _readlink, _time = os.stat, os.open, os.scandir, os.readlink, time.time
_file = os.environ.get("FAULTS", "")
_state: dict[str, Any] = {"version": None, "rules": {"rules": [], "clock": 0}}


def _current() -> dict[str, Any]:
    try:
        status = _stat(_file)
    except OSError:
        return {"rules": [], "clock": 0}
    version = (status.st_mtime_ns, status.st_ino)
    if version != _state["version"]:
        handle = _open(_file, os.O_RDONLY)
        try:
            _state.update(version=version, rules=json.loads(os.read(handle, 1 << 20)))
        finally:
            os.close(handle)
    found: dict[str, Any] = _state["rules"]
    return found


def _meet(call: str, path: Any, dir_fd: int | None = None) -> None:
    rules = [rule for rule in _current()["rules"] if rule["call"] == call]
    if not rules:
        return
    if isinstance(path, int):
        path = _readlink(f"/proc/self/fd/{path}")
    path = os.fsdecode(path)
    if dir_fd is not None:
        path = f"{_readlink(f'/proc/self/fd/{dir_fd}')}/{path}"
    for rule in rules:
        if not path.startswith(rule["path"]):
            continue
        time.sleep(rule.get("delay", 0))
        while rule.get("hang") and rule in _current()["rules"]:
            time.sleep(0.01)
        if "errno" in rule:
            raise OSError(rule["errno"], os.strerror(rule["errno"]), path)


def _faulty(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def made(path: Any = ".", *arguments: Any, **options: Any) -> Any:
        _meet(call, path, options.get("dir_fd"))
        return real(path, *arguments, **options)
    return made


if _file:
    for _name in ("stat", "lstat", "open", "scandir", "pread"):
        setattr(os, _name, _faulty(_name, getattr(os, _name)))
    time.time = lambda: _time() + _current()["clock"]
