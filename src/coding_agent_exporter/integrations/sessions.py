"""Takes a message, gives the session file into which pi wrote it: which session that is, no frame says by itself.

A message that stands in a session file and in a usage log is counted once only where both name the same session.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from coding_agent_exporter.integrations.files import home_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from coding_agent_exporter.integrations.agent import Usage

_TAIL = 1 << 20
"""Bytes at the end of a session file in which the message is looked for: results of tools may follow it at once."""

_MAX_FILES = 5000


class SessionFiles:
    """Where an agent keeps its sessions, by its command line and environment."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], cwd: str) -> None:
        self._cwd = cwd
        self.kept = "--no-session" not in command
        home = home_of(environ)
        own = _option(command, "--session-dir") or environ.get("PI_CODING_AGENT_SESSION_DIR", "")
        agent = environ.get("PI_CODING_AGENT_DIR", "")
        path = _option(command, "--session")
        self._directories = [
            Path(cwd, f"{home}{place[1:]}" if place.startswith("~/") else place) for place in (
                str(Path(path).parent) if path.endswith(".jsonl") else "", own, agent and f"{agent}/sessions",
                f"{home}/.pi/agent/sessions", f"{home}/.omp/agent/sessions",
            ) if place
        ]

    def find(self, usage: Usage, *, known: str = "", everywhere: bool = False) -> str:
        """The path of the session file that holds the message, or an empty text.

        Looked at are `known`, and files that changed since the call began: those of the working directory, and
        `everywhere` those of all others.
        """
        if known and _holds(known, usage):
            return known
        since = usage.started // 1000 - 1
        return next((path for path in self._files(since, everywhere=everywhere) if _holds(path, usage)), "")

    def _files(self, since: int, *, everywhere: bool) -> Iterator[str]:
        project = re.sub(r"[/\\:]", "-", self._cwd.lstrip("/\\"))
        count = 0
        for directory in self._directories:
            names = [directory, directory / f"--{project}--", directory / f"-{project}"]
            if everywhere:
                with suppress(OSError):
                    names += [place for place in directory.iterdir() if place not in names and place.is_dir()]
            for place in names:
                with suppress(OSError), os.scandir(place) as entries:
                    for entry in entries:
                        count += 1
                        if count > _MAX_FILES:
                            return
                        if entry.name.endswith(".jsonl") and entry.is_file() and entry.stat().st_mtime >= since:
                            yield entry.path


def _holds(path: str, usage: Usage) -> bool:
    """Whether the end of a file holds this very message: when it began, and what it used."""
    needles = [b'"timestamp":%d' % usage.started, b'"output":%d' % usage.output, b'"input":%d' % usage.input]
    if usage.response.isascii() and usage.response.isprintable():
        needles.append(usage.response.encode())
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
    except OSError:
        return False
    return any(all(needle in line for needle in needles) for line in tail.split(b"\n") if needles[0] in line)


def _option(command: Sequence[str], name: str) -> str:
    for place, word in enumerate(command):
        if word == name and place + 1 < len(command):
            return command[place + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""
