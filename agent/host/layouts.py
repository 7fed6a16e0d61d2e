"""The mappings of processes that stand still, in full but without the walk through their pages.

The kernel tells the flags of a mapping (VmFlags) only in /proc/PID/smaps, where it counts all pages
first: 20 ms a GiB, while everything waits. So they are read while the process still runs, and taken
for those of a mapping whose line in /proc/PID/maps is the same when it stands still. What changes
nothing in this line, and happens just then (madvise, mlock), is noticed afterwards.

Promises: ``Layouts.now`` is what /proc/PID/smaps would say of mappings at that moment, unless
``changed`` names the process later.
Does not: tell how many pages a mapping has; notice the change of a mapping that has gone, or has
been split or joined, by the time of ``changed``; nor flags that were changed between ``note`` and
``now`` and had been changed back by then: only the walk would tell, and ``now`` says what they were
some milliseconds before.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence

from agent import errors
from agent.host import proc

# In smaps, the lines that maps has too begin with an address, all others with a capital letter.
_HEX, _FLAGS = b"0123456789abcdef", b"VmFlags:"
# What changes when writes to a mapping begin or cease to be noted (Documentation/filesystems/proc):
# userfaultfd's three kinds and soft-dirty.
_NOTED = frozenset((b"um", b"uw", b"ui", b"sd"))
# Somebody is asked for what is not there: the kernel tells of userfaultfds in this way only.
FILLED = frozenset((b"um", b"ui"))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mappings of a process; ``smaps`` has of each its line and its flags, and is None if they
    are not known; ``flags`` are all that occur, or, where ``smaps`` is None, occurred a moment
    before, but in the kernel's own mappings.
    """

    mappings: Sequence[proc.Mapping]
    smaps: bytes | None
    flags: frozenset[bytes]


class Layouts:
    """What is known of some processes, by their numbers."""

    def __init__(self) -> None:
        self._known: dict[int, dict[bytes, bytes]] = {}
        self._before: dict[int, tuple[bytes, Layout]] = {}
        self._told: dict[int, list[bytes]] = {}

    def note(self, pids: Iterable[int]) -> None:
        """Look at processes that run; those that have ended are left out."""
        for pid in pids:
            with contextlib.suppress(errors.NotFound):
                self._known[pid] = _flags(pid)
                raw = proc.text(pid, "maps")
                self._before[pid] = raw, self._layout(pid, raw)

    def noted(self, pid: int) -> Layout | None:
        """Of a process as it was noted; None if it was not."""
        return self._before[pid][1] if pid in self._before else None

    def now(self, pid: int) -> Layout:
        """Of a process that stands still; what was noted itself, where nothing has changed.

        Raises:
            errors.NotFound: there is no such process.
        """
        raw = proc.text(pid, "maps")
        before, layout = self._before.get(pid, (b"", None))
        if layout is None or raw != before:
            layout = self._layout(pid, raw)
        if layout.smaps is not None:
            self._told[pid] = raw.splitlines(keepends=True)
        return layout

    def _layout(self, pid: int, raw: bytes) -> Layout:
        mappings = proc.mappings(pid, raw)
        known = self._known.get(pid, {})
        lines = raw.splitlines(keepends=True)
        # Who has ended has none.
        whole = bool(lines) and all(line in known for line in lines)
        flags = frozenset().union(
            *(known[line].split()[1:] for line in (lines if whole else known) if not _kernels(line))
        )
        if not whole:
            return Layout(mappings, None, flags)
        return Layout(mappings, b"".join(line + known[line] for line in lines), flags)

    def changed(self) -> list[int]:
        """Processes of which ``now`` may have said something else than the kernel would have. They
        run again.
        """
        return [pid for pid, lines in self._told.items() if not self._same(pid, lines)]

    def _same(self, pid: int, lines: Iterable[bytes]) -> bool:
        known = self._known[pid]
        try:
            found = _flags(pid)
        except errors.NotFound:
            return True  # nobody can tell any more, and nothing happened in all the time before
        return all(_kept(known[line]) == _kept(found.get(line, known[line])) for line in lines)


def flags(pid: int) -> frozenset[bytes]:
    """All that occur in the process's mappings now; a walk through its pages.

    Raises:
        errors.NotFound: there is no such process.
    """
    return frozenset().union(*(line.split()[1:] for line in _flags(pid).values()))


def first_executable(pid: int) -> int | None:
    """Where the first executable mapping begins: quicker than to take all of them apart.

    Raises:
        errors.NotFound: there is no such process.
    """
    for line in proc.lines(pid, "maps"):
        addresses, perms, _ = line.split(b" ", 2)
        if b"x" in perms:
            return int(addresses.partition(b"-")[0], 16)
    return None


def _flags(pid: int) -> dict[bytes, bytes]:
    """Lines of maps, and their lines of flags."""
    found, line = {}, b""
    for each in proc.text(pid, "smaps").splitlines(keepends=True):
        if each.startswith(_FLAGS):
            found[line] = each
        elif each[:1] in _HEX:
            line = each
    return found


def _kept(flags: bytes) -> set[bytes]:
    return set(flags.split()) - _NOTED


def _kernels(line: bytes) -> bool:
    return line.rstrip().endswith((b"[vvar]", b"[vvar_vclock]", b"[vdso]", b"[vsyscall]"))
