"""Gives a mount namespace a /proc of another pid namespace: a program of its own, run with the
standard library alone.

``newproc.py MNT_FD``, started in the pid namespace. In the mount namespace behind MNT_FD, /proc is
replaced by one of this program's pid namespace; what a runtime had mounted below it to hide paths
or to make them read-only is put there again.

Promises: exit status 0 only if all of it is done.
Does not: touch another mount namespace: the caller made this one for the purpose.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys

# include/uapi/linux/sched.h, mount.h, fcntl.h; the numbers of system calls since 5.2 are the same
# on every architecture.
_CLONE_NEWNS = 0x00020000
_MNT_DETACH = 2
_MS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "relatime": 1 << 21}
_MS_REMOUNT, _MS_BIND = 32, 4096
_OPEN_TREE, _MOVE_MOUNT = 428, 429
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100
_ESCAPE = re.compile(r"\\([0-7]{3})")

_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> int:
    """Do it; the exit status."""
    _check(_libc.setns(int(argv[1]), _CLONE_NEWNS), "setns")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [_parsed(line) for line in file]
    own = [flags for point, _, flags in mounts if point == "/proc"][-1:]
    # The later covers the earlier, and nothing is to be found below a file.
    below = {point: (kind, flags) for point, kind, flags in mounts if point.startswith("/proc/")}
    clones = {point: _clone(point) for point, (kind, _) in below.items() if kind != "proc"}
    _check(_libc.umount2(b"/proc", _MNT_DETACH), "unmount /proc")
    flags = own[0] if own else _MS["nosuid"] | _MS["nodev"] | _MS["noexec"]
    _check(_libc.mount(b"proc", b"/proc", b"proc", flags, None), "mount /proc")
    for point, (_, flags) in below.items():
        path = os.fsencode(point)
        if not os.path.lexists(path):
            continue
        if point in clones:
            moved = _libc.syscall(
                _MOVE_MOUNT, clones[point], b"", _AT_FDCWD, path, _MOVE_MOUNT_F_EMPTY_PATH
            )
            _check(moved, f"cover {point}")
            continue
        _check(_libc.mount(path, path, None, _MS_BIND, None), f"bind {point}")
        again = _MS_REMOUNT | _MS_BIND | flags
        _check(_libc.mount(None, path, None, again, None), f"restrict {point}")
    return 0


def _parsed(line: str) -> tuple[str, str, int]:
    # id parent major:minor root point options [optional fields] - type source super-options
    left, _, right = line.partition(" - ")
    fields = left.split(" ")
    point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4])
    flags = sum(_MS.get(option, 0) for option in fields[5].split(","))
    return point, right.split(" ", 1)[0], flags


def _clone(point: str) -> int:
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
    fd = int(_libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(point), flags))
    _check(min(fd, 0), f"clone {point}")
    return fd


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except OSError as error:
        # A traceback would quote whatever the container has at the path of this file.
        sys.exit(str(error))
