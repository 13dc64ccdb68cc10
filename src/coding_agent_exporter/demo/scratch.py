"""Takes nothing, gives a temporary directory that does not outlive the demo.

It is removed at the end. One whose demo was killed with SIGKILL is removed by the next: a demo holds a lock on a file
in its directory for as long as it lives, so a directory whose lock is free has nobody.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "coding-agent-exporter-demo-"
LOCK = "lock"


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory below `$TMPDIR` or /tmp that is there for the block. Raises OSError where none can be made."""
    parent = Path(tempfile.gettempdir()).resolve()
    _sweep(parent)
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = -1
    try:
        lock = _take(made)
        yield made
    finally:
        shutil.rmtree(made)
        if lock >= 0:
            os.close(lock)


def _take(directory: Path) -> int:
    """The handle of a lock that was never seen without being held: it has its name only once it is."""
    new = directory / f"{LOCK}.new"
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(directory / LOCK)
    return handle


def _sweep(parent: Path) -> None:
    """Remove what demos of the same user left behind. What cannot be removed is left alone."""
    for left in parent.glob(f"{PREFIX}*"):
        try:
            if left.is_symlink() or left.stat().st_uid != os.getuid():
                continue
            handle = os.open(left / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue  # somebody's, who is alive
        finally:
            os.close(handle)
