"""Takes a directory and a number, writes the instance files of so many agents as pi-telemetry does, until stopped.

A process of its own, so that what it takes is not counted with anything that is measured:
`python -m benchmarks.agents DIRECTORY COUNT [INTERVAL]`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

INTERVAL = 1.5
"""pi-telemetry's own default, in seconds."""

FIRST_PID = 20_000

STARTED = 1_760_000_000_000
"""Epoch milliseconds; what tells one process from another under the same pid."""


def write(directory: Path, number: int, now: float, *, sequence: int = 0, pressure: str = "normal") -> None:
    """Write one instance file, by renaming, as of `now` (epoch seconds)."""
    pid = FIRST_PID + number
    percent = (number * 37 + sequence) % 100
    document = {
        "schemaVersion": 2,
        "source": "pi-telemetry",
        "process": {
            "pid": pid, "ppid": 1, "startedAt": STARTED, "updatedAt": int(now * 1000),
            "uptimeMs": 3_600_000, "heartbeatSeq": sequence, "heartbeatMs": int(INTERVAL * 1000),
        },
        "system": {"host": "bench", "user": "dev", "platform": "linux", "arch": "x64", "nodeVersion": "v22.0.0"},
        "workspace": {"cwd": f"/srv/project-{number}", "git": {"branch": "main", "commit": "0e405cc"}},
        "session": {"id": f"00000000-0000-7000-8000-{number:012d}", "name": f"session {number}"},
        "model": {"provider": "anthropic", "id": "claude-opus-4-8", "name": "Opus", "thinkingLevel": "high"},
        "state": {
            "activity": "working", "isIdle": False, "hasPendingMessages": False, "waitingForInput": False, "busy": True,
        },
        "context": {
            "tokens": percent * 2000, "contextWindow": 200_000, "percent": percent,
            "remainingTokens": 200_000 - percent * 2000, "remainingPercent": 100 - percent,
            "pressure": pressure, "closeToLimit": False, "nearLimit": False,
        },
        "messages": {"lastAssistantText": "All done here. " * 60, "lastAssistantUpdatedAt": int(now * 1000)},
        "lastEvent": "turn_start",
    }
    part = directory / f"{pid}.json.tmp-{pid}"
    part.write_text(json.dumps(document))
    part.rename(directory / f"{pid}.json")


def main(directory: Path, count: int, interval: float) -> None:
    """Spread the writes evenly over the interval, as processes that were not started together do."""
    begun, written = time.monotonic(), 0
    while True:
        write(directory, written % count, time.time(), sequence=written // count)
        written += 1
        time.sleep(max(0.0, begun + written * interval / count - time.monotonic()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else INTERVAL)
