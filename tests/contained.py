"""Takes a JSON description of a process, gives that process in namespaces of its own, without any privilege.

What a container runtime does, as far as a sidecar can notice: a root file system that is read-only, mounts, processes
that nobody outside can name, another user, no capabilities. Run as a program, by root: `contained.py DESCRIPTION`
writes the outer pid of the process to standard output, waits for it, and ends as it ended (128 + signal if killed).
Needs only the kernel, as runtimes differ in what they ask of control groups.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET = 0x0002_0000, 0x0400_0000, 0x0800_0000, 0x2000_0000, 0x4000_0000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Description:
    """What to run. Paths of `binds` are (outside, inside, read-only)."""

    argv: list[str]
    env: dict[str, str]
    at: str
    """An empty directory: where the root is put together. The mounts are gone when the process is."""
    uid: int
    gid: int
    groups: list[int] = field(default_factory=list)
    root: str | None = None
    """The root file system, holding all directories to mount on; None: one made of `binds` and nothing else."""
    binds: list[tuple[str, str, bool]] = field(default_factory=list)
    tmpfs: list[str] = field(default_factory=list)
    cwd: str = "/"
    umask: int = 0o022
    pid: int = 1
    """Which one the process has inside. Beyond 1 there is an init above it, as with a shared process namespace."""
    network: bool = True
    """Whether it shares the network of the outside, as containers of a pod do; else it has a loopback of its own."""

    def dump(self) -> str:
        return json.dumps(asdict(self))


def main(description: str) -> int:
    """Runs outside; the exit code."""
    wanted = Description(**json.loads(description))
    _die_with_parent()
    _check(libc.unshare(NEWNS | NEWUTS | NEWIPC | NEWPID | (0 if wanted.network else NEWNET)), "unshare")
    # The one who started this speaks to the process itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        _become(wanted)
    print(child, flush=True)
    return _ended(child)


def _ended(child: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def _become(wanted: Description) -> None:
    """Runs as pid 1 of the new namespace; never returns."""
    try:
        _die_with_parent()
        # Directories that are made to mount on are for the process to pass through.
        os.umask(0o022)
        _mount(None, "/", None, REC | PRIVATE)
        if not wanted.network:
            _loopback_up()
        _root(wanted)
        if wanted.pid != 1:
            Path(wanted.at, "proc/sys/kernel/ns_last_pid").write_text(str(wanted.pid - 1))
            if (child := os.fork()) != 0:
                os._exit(_ended(child))
        os.chroot(wanted.at)
        _drop(wanted)
        os.chdir(wanted.cwd)
        os.umask(wanted.umask)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.execve(wanted.argv[0], wanted.argv, wanted.env)
    except BaseException as error:  # noqa: BLE001 (a fork of a test must not go on as a second one)
        os.write(2, f"contained: {error!r}\n".encode())
        os._exit(125)


def _root(wanted: Description) -> None:
    at = wanted.at
    if wanted.root is None:
        _mount("tmpfs", wanted.at, "tmpfs", NOSUID | NODEV)
    else:
        _mount(wanted.root, wanted.at, None, BIND)
    # These first: a Python that is bound may lie below /tmp.
    for inside in wanted.tmpfs:
        _directory(wanted, inside)
        _mount("tmpfs", f"{at}{inside}", "tmpfs", NOSUID | NODEV, "mode=1777")
    for outside, inside, read_only in wanted.binds:
        _directory(wanted, inside)
        _mount(outside, f"{at}{inside}", None, BIND | REC)
        if read_only:
            _mount(None, f"{at}{inside}", None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
    _directory(wanted, "/proc")
    _mount("proc", f"{at}/proc", "proc", NOSUID | NODEV | NOEXEC)
    _mount(None, wanted.at, None, BIND | REMOUNT | RDONLY | NOSUID | NODEV)


def _directory(wanted: Description, inside: str) -> None:
    if wanted.root is None:
        Path(f"{wanted.at}{inside}").mkdir(parents=True, exist_ok=True)


def _drop(wanted: Description) -> None:
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        _check(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "prctl")
    os.setgroups(wanted.groups)
    os.setresgid(wanted.gid, wanted.gid, wanted.gid)
    os.setresuid(wanted.uid, wanted.uid, wanted.uid)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _die_with_parent()  # again, as the change of user takes it back


def _die_with_parent() -> None:
    """Nothing is left behind when the tests are killed."""
    _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _loopback_up() -> None:
    with socket.socket() as any_socket:
        request = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", request)[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    _check(libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]), f"mount on {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
