"""Pid 1 of an isolated restore: a program of its own, run with the standard library alone.

``supervisor.py CRIU SWRK_FD STATUS_FD ROOT_PID LAST_PID``. The outer process makes new pid and
mount namespaces and stays only to be the tree's handle: when it is killed, the inner one (pid 1)
gets SIGKILL, and with it the whole namespace. The inner one mounts a fresh /proc, moves the pid
counter to where it cannot collide with the tree's own numbers, and starts ``criu swrk``, which
talks to the agent and makes the tree's root a child of pid 1.

Promises: reaps every orphan at once, passes signals on to the root, reports the root's exit
status (128 + N if signal N ended it) as decimal text on STATUS_FD, and ends when the last process
of the namespace has ended.
Does not: import the rest of the program; it must stay small, since it lives as long as the tree.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Collection

# include/uapi/linux/sched.h, mount.h, prctl.h
_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_PR_SET_PDEATHSIG = 1

_FORWARDED = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT),
)
# CRIU and its helpers take a handful of numbers, what the tree starts later takes more.
_ROOM = 300
# The status of a tree that never came to be.
_NOTHING_RESTORED = 125


def last_pid(numbers: Collection[int], pid_max: int) -> int:
    """Where the pid counter is to stand so that the next ``_ROOM`` numbers are not the tree's."""
    highest = max(numbers, default=1)
    if highest + 2 * _ROOM < pid_max:
        return highest + 1
    taken = sorted(n for n in numbers if n >= _ROOM)
    previous = _ROOM
    for number in taken:
        if number - previous > _ROOM:
            break
        previous = number
    return previous + 1


def main(argv: list[str]) -> int:
    """Run; the exit status is the root's."""
    criu, swrk, status, root, last = argv[1], *map(int, argv[2:6])
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS | _CLONE_NEWPID), "unshare")
    # Mounts made on the host later still arrive here; ours never reach the host.
    _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None), "mount")
    signal.pthread_sigmask(signal.SIG_BLOCK, [*_FORWARDED, signal.SIGCHLD])
    inner = os.fork()
    if inner == 0:
        _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        _check(libc.mount(b"proc", b"/proc", b"proc", flags, None), "mount /proc")
        os._exit(_init(criu, swrk, status, root, last))
    os.close(swrk)
    os.close(status)
    return _follow(inner)


def _init(criu: str, swrk: int, status: int, root: int, last: int) -> int:
    with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as counter:
        counter.write(str(last))
    os.posix_spawn(
        criu, [criu, "--no-default-config", "swrk", str(swrk)], os.environ, setsigmask=[]
    )
    os.close(swrk)
    code = _NOTHING_RESTORED
    while True:
        received = signal.sigwait([*_FORWARDED, signal.SIGCHLD])
        if received != signal.SIGCHLD:
            _send(root, received)
            continue
        for pid, ended in _reaped():
            if pid == root:
                code = _shell_status(ended)
                _report(status, code)
        if not _have_children():
            return code


def _follow(inner: int) -> int:
    while True:
        received = signal.sigwait([*_FORWARDED, signal.SIGCHLD])
        if received != signal.SIGCHLD:
            _send(inner, received)
            continue
        for _, ended in _reaped():
            return _shell_status(ended)


def _reaped() -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, status))


def _have_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _report(status: int, code: int) -> None:
    try:
        os.write(status, str(code).encode())
    except BrokenPipeError:
        return  # whoever restored the tree has gone and does not wait for it


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile; its SIGCHLD is on the way


def _shell_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
