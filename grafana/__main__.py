"""Takes the four dashboards, gives their JSON below `dashboards`: `python -m grafana [--check]`.

With `--check` nothing is written: files that differ from what would be are named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grafana import exporter, fleet, spend, turns

DASHBOARDS = Path(__file__).parent / "dashboards"


def rendered() -> dict[str, str]:
    """File name -> the JSON of one dashboard: always the same text for the same code."""
    boards = {"fleet": fleet.board(), "spend": spend.board(), "turns": turns.board(), "exporter": exporter.board()}
    return {f"{name}.json": board.json() for name, board in boards.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grafana", description="Write the Grafana dashboards.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    parser.add_argument("--dir", type=Path, default=DASHBOARDS, help="where the files are (grafana/dashboards)")
    arguments = parser.parse_args(argv)
    wanted = rendered()
    found = {path.name: path.read_text(encoding="utf-8") for path in arguments.dir.glob("*.json")}
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if arguments.check:
        for name in differing:
            sys.stderr.write(f"{arguments.dir / name} is not what `python -m grafana` writes\n")
        return 1 if differing else 0
    for name, text in wanted.items():
        (arguments.dir / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
