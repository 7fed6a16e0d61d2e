"""How a tree whose memory is not complete is ended, and how one is known.

Promises: when ``end_tree`` returns, nothing of the tree runs that could take a missing page for
zero. The standard library alone is used: ``keeper``, which runs by itself, needs this.
Does not: decide that a tree is to end; close any descriptor.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal

from agent.engines.criu import uffd

# Between two looks at what still has to end.
_MOMENT_MS = 20


def end_tree(namespace: str, spared: set[int]) -> None:
    """Kill the processes whose pidfds are held, and all that descend from them in their pid
    namespace; return when no address space is left whose userfaultfd is held.
    """
    first = True
    while True:
        held = [(int(name), _link(f"self/fd/{name}")) for name in _listed("self/fd")]
        doomed = {pid for fd, link in held if "[pidfd]" in link and (pid := _pid_of(fd)) > 0}
        left = [fd for fd, link in held if "[userfaultfd]" in link and not uffd.gone(fd)]
        if not first:
            doomed |= _orphans(namespace, left)
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


def _orphans(namespace: str, held: list[int]) -> set[int]:
    """Processes that were forked since and whose parents have ended: they wait to be filled where
    one of the userfaultfds has mappings.
    """
    found = set()
    for name in _listed(""):
        if not name.isdigit() or _began(int(name)) < _began(os.getpid()):
            continue
        ranges = missing(name) if _link(f"{name}/ns/pid") == namespace else []
        if ranges and any(
            all(
                not uffd.call(fd, uffd.UFFDIO_REGISTER, *each, uffd.MODE_MISSING, 0)[0]
                for each in ranges
            )
            for fd in held
        ):
            found.add(int(name))
    return found


def missing(name: str) -> list[tuple[int, int]]:
    """The mappings of a process whose missing pages somebody is asked for: start and length."""
    found = []
    start = end = 0
    with contextlib.suppress(OSError), open(f"/proc/{name}/smaps", "rb") as file:
        for line in file:
            if line.startswith(b"VmFlags:"):
                if b" um" in line:
                    found.append((start, end - start))
            elif line[:1].islower() or line[:1].isdigit():
                start, end = (int(each, 16) for each in line.split()[0].split(b"-"))
    return found


def _began(pid: int) -> int:
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
