"""Takes the settings of process 1 of its container, gives exit code 0 while the exporter answers.

Any answer is one: with a web configuration it is 401, or a connection closed, as this client has neither password
nor certificate. 503 is what `/-/healthy` says of an exporter that is about to end.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from coding_agent_exporter import config

PATIENCE = 4.0
"""Seconds; under the timeout that the Dockerfile gives."""
LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (connects, does not bind)


def flags(command: Path) -> list[str]:
    """The settings among the arguments of a process. Variables and the TOML file are the same for this one."""
    words = command.read_text().split("\0")
    start = next((number for number, word in enumerate(words) if word.endswith("/coding-agent-exporter")), len(words))
    return [word for word in words[start + 1:] if word not in ("", "serve")]


def main() -> int:
    settings = config.load(flags(Path("/proc/1/cmdline")), os.environ, home=Path.home(), cwd=Path.cwd())
    host, port = settings.web_listen_address[0]
    try:
        with socket.create_connection((LOOPBACK.get(host, host), port), timeout=PATIENCE) as connection:
            connection.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            status = connection.recv(64).split(b"\r\n")[0].decode("latin-1")
    except ConnectionResetError:
        # TLS that was spoken to in plain text: somebody was there to hang up.
        status = "closed"
    except OSError as error:
        print(f"no answer: {error}")  # noqa: T201 (kept by the container engine with the result)
        return 1
    print(status.strip() if status.isprintable() else "answers")  # noqa: T201
    return int(" 503" in status)


if __name__ == "__main__":
    sys.exit(main())
