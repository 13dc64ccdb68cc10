"""Takes a directory, and orders as lines of JSON; writes there what an agent with this process's own pid would.

Orders: ["beat", percent], ["session", model, pico-USD], ["usage", model, pico-USD], each answered with the pid. Between
them the heartbeat goes on, as that of a real agent does. At the end of the orders it takes its heartbeat away.
"""

from __future__ import annotations

import json
import os
import select
import sys
from pathlib import Path

from agents_support import PiInstance, PiLog, PiSession

HEARTBEAT = 0.1
"""Seconds."""


def main(volume: Path) -> None:
    instance = PiInstance(volume / "telemetry", os.getpid())
    log, session = PiLog(volume / "mngr", f"agent-{os.getpid()}"), PiSession(volume / "sessions")
    percent: float | None = None
    while True:
        if percent is not None:
            instance.write(percent)
        if not select.select([sys.stdin], [], [], HEARTBEAT)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        match json.loads(line):
            case ["beat", percent]:
                instance.write(percent)
            case ["session", model, pico]:
                session.message("anthropic", model, pico)
            case ["usage", model, pico]:
                log.message(f"anthropic/{model}", pico)
        print(os.getpid(), flush=True)
    if percent is not None:
        instance.remove()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
