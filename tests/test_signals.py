"""A signal ends the exporter at whatever instant it comes."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from process_support import DEADLINE, environment

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import os, signal, sys, threading
from coding_agent_exporter import cli

real, sent = threading.Condition.wait, []

def wait(condition, timeout=None):
    # Here the loop holds the lock of the event that a signal sets.
    if not sent and sys._getframe(2).f_code.co_name == "_loop":
        sent.append(os.kill(os.getpid(), signal.SIGTERM))
    return real(condition, timeout)

threading.Condition.wait = wait
code = cli.main(sys.argv[1:])
assert sent, "the loop has not waited"
sys.exit(code)
"""


def test_a_signal_that_comes_while_the_loop_holds_a_lock_ends_it(tmp_path: Path) -> None:
    """A handler would wait for the lock, and the loop, which it interrupts, for the handler."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--web.listen-address=127.0.0.1:0", f"--state.path={tmp_path / 'state.db'}"],
        env=environment(tmp_path), capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, "stopped" in done.stderr) == (0, True), done.stderr
