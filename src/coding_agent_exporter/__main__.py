"""Takes `python -m coding_agent_exporter`, gives the process the command's exit code."""

from __future__ import annotations

import sys

from coding_agent_exporter.cli import main

if __name__ == "__main__":
    sys.exit(main())
