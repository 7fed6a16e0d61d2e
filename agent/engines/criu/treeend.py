"""How a tree whose memory is not complete is ended, and how one is known.

Promises: when ``end_tree`` returns, nothing of the tree runs that could take a missing page for
zero. The standard library alone is used: ``keeper``, which runs by itself, needs this.
Does not: decide that a tree is to end; close any descriptor.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import signal

from agent.engines.criu import uffd

# Between two looks at what still has to end.
_MOMENT_MS = 20
_LOOKS = 3


def end_tree(since: int, spared: set[int]) -> None:
    """Kill the processes whose pidfds are held, all that descend from them, and whatever else
    (``began`` since this moment) has an address space whose userfaultfd is held; return when none
    of these is left.
    """
    first = True
    looks: collections.Counter[tuple[int, int]] = collections.Counter()
    while True:
        held = [(int(name), _link(f"self/fd/{name}")) for name in _listed("self/fd")]
        doomed = {pid for fd, link in held if "[pidfd]" in link and (pid := _pid_of(fd)) > 0}
        left = [fd for fd, link in held if "[userfaultfd]" in link and not uffd.gone(fd)]
        if not first:
            doomed |= _orphans(since, left, looks)
        _kill(doomed - spared)
        if not left:
            return
        first = False
        wait(_MOMENT_MS)


def _kill(pids: set[int]) -> None:
    """Stop each before its children are looked for, so that it cannot make more meanwhile."""
    queue = list(pids)
    found: list[int] = []
    while queue:
        pid = queue.pop()
        if not _send(pid, signal.SIGSTOP):
            continue
        found.append(pid)
        for task in _listed(f"{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                queue.extend(set(map(int, file.read().split())) - set(found))
    for pid in found:
        _send(pid, signal.SIGKILL)


def _orphans(since: int, held: list[int], looks: collections.Counter[tuple[int, int]]) -> set[int]:
    """Processes that were forked since and whose parents have ended. Who has nothing that is
    missing never will have: it is looked at a few times, for a mapping may move meanwhile.
    """
    found = set()
    left = sorted(held)
    # In order: forked one after the other, most then meet their own userfaultfd first.
    for pid in sorted(int(name) for name in _listed("") if name.isdigit()):
        who = (pid, began(pid))
        if who[1] < since or looks[who] >= _LOOKS:
            continue
        if not missing(str(pid)):
            looks[who] += 1
            continue
        owned = next((fd for fd in left if _owns(fd, str(pid))), None)
        if owned is not None:
            left.remove(owned)
            found.add(pid)
    return found


def _owns(fd: int, name: str) -> bool:
    """Whether this process's address space is that of a userfaultfd: what is registered by the one
    is seen in the other. Whoever's it is, it is to be ended.
    """
    for start, length, registered, fit in _mappings(name):
        if fit and not registered:
            problem, _ = uffd.call(fd, uffd.UFFDIO_REGISTER, start, length, uffd.MODE_MISSING, 0)
            if not problem:
                return any(low <= start < low + size for low, size in missing(name))
    return False


def missing(name: str) -> list[tuple[int, int]]:
    """The mappings of a process whose missing pages somebody is asked for: start and length."""
    return [(start, length) for start, length, registered, _ in _mappings(name) if registered]


def _mappings(name: str) -> list[tuple[int, int, bool, bool]]:
    """The mappings of a process: start, length, whether somebody is asked for missing pages, and
    whether it is private memory of no file, for which that can be so.
    """
    found = []
    start = end = 0
    private = False
    with contextlib.suppress(OSError), open(f"/proc/{name}/smaps", "rb") as file:
        for line in file:
            if line.startswith(b"VmFlags:"):
                fit = private and b" mw" in line
                found.append((start, end - start, b" um" in line, fit))
            elif line[:1].islower() or line[:1].isdigit():
                place, rights, _, _, inode, *_ = line.split()
                start, end = (int(each, 16) for each in place.split(b"-"))
                private = rights.endswith(b"p") and inode == b"0"
    return found


def began(pid: int) -> int:
    """When a process was started, in ticks; -1 if there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
    return -1


def _pid_of(fd: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{fd}") as file:
        for line in file:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return -1


def _link(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{name}")
    return ""


def _listed(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(f"/proc/{folder}")
    return []


def _send(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
        return True
    return False


def wait(span_ms: int) -> None:
    """Pass this time."""
    select.poll().poll(span_ms)
