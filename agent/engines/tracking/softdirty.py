"""Tracking by soft-dirty bits: for kernels that cannot protect memory asynchronously (before 6.7),
and for processes into which nothing can be put.

The bits cannot be read and reset in one step. So they are reset only where no write can come in
between: before everything is read, and at the cut, where the process stands still. All that was
written since then is left for the next cut.

A page is unchanged if its bit is not set, it is the same page of memory as then, and its mapping
begins and ends where it did: where another one was moved or put there the frame differs, or a write
to it has set its bit; and of mappings that were joined Linux before 6.19 could forget that all of
one counts as written (mm: propagate VM_SOFTDIRTY on merge), for which it then sets no bits.

Promises: what ``base.Tracker`` promises, for processes whose pages nobody but they themselves and
system calls on their behalf write. A reset by somebody else is noticed by a page that was marked.
Does not: notice that where the process itself writes to the marked page afterwards (its arguments
or environment); notice that whole page tables were moved away (mremap) after a round looked, and
back after what lay there was read; that a page was being migrated at a reset and was not after
all; that somebody wrote by ptrace to who stands still; bring what is left for the cut down by more
rounds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.engines.tracking import areas
from agent.host import clock, pageentries, pagemap, pins, proc, softdirty
from agent.host.pagemap import Ranges

_WINDOW_BYTES = 64 << 20
_PAGE_BYTES = pageentries.PAGE_BYTES
# Asked in the stop; some milliseconds, where a processor is busy.
_PINS_S = 0.05

Entries = pageentries.Entries


class SoftDirty:
    """Tracks ``who``; ``better`` is why not in a better way.

    Raises:
        errors.EnvironmentUnfit: it cannot be tracked.
        errors.NotFound: it has ended.
    """

    kind = "soft-dirty"

    def __init__(self, who: proc.Identity, better: str) -> None:
        if unusable := softdirty.unusable():
            raise errors.EnvironmentUnfit(unusable)
        # Asked before anything is reset: Linux before 5.19 gives who writes to a page that is both
        # protected and being read into another one, and what is read is lost.
        if apart := _escape(who.pid) or _shared(who.pid):
            raise errors.EnvironmentUnfit(f"process {who.pid}: {apart}", pid=who.pid)
        self._who = who
        self._better = self.reason = better
        # By what writes may have escaped the bits since the last reset; and whether some may have
        # been forgotten by it.
        self._escape, self._doubted = "", False
        self._pins = pins.Pins()
        # Which page of memory each page was at the last reset, by windows of addresses; 0: unknown.
        self._frames: dict[int, Entries] = {}
        # The mappings at the last reset.
        self._mappings: frozenset[tuple[int, int]] = frozenset()
        self._marked = 0
        self._claim = softdirty.Claim(who.pid)
        if not proc.alive(who):
            self.close()
            raise errors.NotFound(f"there is no process {who.pid} any more", pid=who.pid)

    def round(self) -> Iterator[Ranges]:
        """See ``base.Tracker``; from the second one on, what was written since the last reset."""
        self._look_for_escapes()
        with _entries_of(self._who.pid) as descriptor:
            if self._undisturbed(descriptor):
                for start, end, known in self._pieces(areas.eligible(self._who.pid)):
                    entries = _read(descriptor, start, end)
                    yield _ranges(start, self._written(start, entries, known))
            else:
                yield from self._anew(descriptor)
        self._look_for_escapes()

    def _anew(self, descriptor: int) -> Iterator[Ranges]:
        mappings = areas.eligible(self._who.pid)
        before = {}
        for start, end, _ in self._pieces(mappings):
            frames = _frames(_read(descriptor, start, end))
            if frames.any():
                before[start, end] = frames
        self._reset(mappings)
        for start, end, _ in self._pieces(areas.eligible(self._who.pid)):
            entries = _read(descriptor, start, end)
            if (start, end) in before:
                # Who was being moved to another frame (compaction) escaped the reset.
                frames = _frames(entries)
                self._note(start, np.where(frames == before[start, end], frames, np.uint64(0)))
            yield _ranges(start, _there(entries))

    def cut(self, areas: Ranges) -> tuple[Ranges, Ranges]:
        """See ``base.Tracker``; the bits are reset, which is safe now only."""
        existing = pagemap.existing(self._who.pid, areas)
        self._look_for_escapes()
        if self._escape:
            return existing, pagemap.none()
        found, now = [pagemap.none()], []
        held = self._pins.acquired(clock.Deadline.after(_PINS_S))
        with _entries_of(self._who.pid) as descriptor:
            for start, end, known in self._pieces(areas):
                entries = _read(descriptor, start, end)
                unchanged = _there(entries) & ~self._written(start, entries, known)
                found.append(_ranges(start, unchanged))
                frames = _frames(entries)
                if frames.any():
                    now.append((start, frames))
            # Afterwards: a reset is of all pages at once, as seen by whoever reads the bits.
            undisturbed = self._undisturbed(descriptor)
        self._reset(areas)
        for start, frames in now:
            self._note(start, frames)
        # Others may write to who stands still (process_vm_writev), and the reset forgot it.
        self._doubted = held is None or held != self._pins.acquired(clock.Deadline.after(_PINS_S))
        return existing, np.concatenate(found) if undisturbed else pagemap.none()

    def again(self) -> bool:
        """See ``base.Tracker``."""
        if self._escape:
            self._escaped(_escape(self._who.pid))
        return not self._escape and not self._doubted

    def take_back(self, pid: int) -> None:
        """Nothing was put there."""

    def close(self) -> None:
        """Let go of the process, in which nothing is."""
        self._claim.close()

    def _reset(self, mappings: Ranges) -> None:
        """From now on the bits tell what is written. What anybody resets before the page is marked
        does no harm: nothing has been read yet, or the process stands still.
        """
        self._frames.clear()
        self._mappings = frozenset((start, end) for start, end in mappings.tolist())
        self._claim.reset()
        self._marked = _last_of_stack(self._who.pid)
        if not self._marked or not softdirty.mark(self._who.pid, self._marked):
            self._marked = 0
        with _entries_of(self._who.pid) as descriptor:
            if not self._undisturbed(descriptor):
                self._escaped("a reset of its soft-dirty bits could not be noticed")

    def _undisturbed(self, descriptor: int) -> bool:
        """Whether nobody else has reset the bits since we did."""
        if not self._marked:
            return False
        try:
            (entry,) = pageentries.read(descriptor, self._marked, self._marked + _PAGE_BYTES)
        except ProcessLookupError as exc:
            raise errors.NotFound("the process has ended", pid=self._who.pid) from exc
        return bool(entry & pageentries.SOFT_DIRTY)

    def _note(self, start: int, now: Entries) -> None:
        window, first = divmod(start, _WINDOW_BYTES)
        frames = self._frames.get(window)
        if frames is None:
            pages = _WINDOW_BYTES // _PAGE_BYTES
            frames = self._frames[window] = np.zeros(pages, dtype=np.uint64)
        first //= _PAGE_BYTES
        frames[first : first + len(now)] = now

    def _written(self, start: int, entries: Entries, known: bool) -> npt.NDArray[np.bool_]:
        """Which pages are there and not known to be as at the last reset."""
        there = _there(entries)
        window, first = divmod(start, _WINDOW_BYTES)
        frames = self._frames.get(window)
        if frames is None or not known:
            return there
        first //= _PAGE_BYTES
        then, now = frames[first : first + len(entries)], _frames(entries)
        clean = entries & pageentries.SOFT_DIRTY == 0
        written: npt.NDArray[np.bool_] = there & ~((now == then) & (now != 0) & clean)
        return written

    def _pieces(self, mappings: Ranges) -> Iterator[tuple[int, int, bool]]:
        """Each within one window, and whether its mapping is one of those at the last reset."""
        for start, end in mappings.tolist():
            known = (start, end) in self._mappings
            at = start
            while at < end:
                stop = min(end, at - at % _WINDOW_BYTES + _WINDOW_BYTES)
                yield at, stop, known
                at = stop

    def _look_for_escapes(self) -> None:
        if not self._escape:
            self._escaped(_escape(self._who.pid))

    def _escaped(self, by: str) -> None:
        self._escape, self.reason = by, by or self._better


def _frames(entries: Entries) -> Entries:
    present = entries & pageentries.PRESENT != 0
    return np.where(present, entries & pageentries.FRAME, np.uint64(0))


def _there(entries: Entries) -> npt.NDArray[np.bool_]:
    there: npt.NDArray[np.bool_] = entries & (pageentries.PRESENT | pageentries.SWAPPED) != 0
    return there


def _ranges(start: int, pages: npt.NDArray[np.bool_]) -> Ranges:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], pages, [False]))))
    return (start + edges.astype(np.int64) * _PAGE_BYTES).reshape(-1, 2)


def _read(descriptor: int, start: int, end: int) -> Entries:
    try:
        return pageentries.read(descriptor, start, end)
    except ProcessLookupError as exc:
        raise errors.NotFound("the process has ended") from exc


@contextlib.contextmanager
def _entries_of(pid: int) -> Iterator[int]:
    try:
        descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise errors.NotFound(f"there is no process {pid}", pid=pid) from exc
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _last_of_stack(pid: int) -> int:
    """The page with the arguments and the environment; 0 if there is none."""
    for each in proc.maps(pid):
        if each.path == "[stack]":
            return each.end - _PAGE_BYTES
    return 0


def _escape(pid: int) -> str:
    found = areas.escapes(pid)
    if found.reason or found.direct:
        return found.reason or "it reads files past the page cache"
    return "equal pages are merged on this host (KSM)" if softdirty.merging() else ""


def _shared(pid: int) -> str:
    """A reset for one is a reset for all who have the same memory, as a child of posix_spawn has
    its parent's for a moment.
    """
    if softdirty.same_memory(pid, (other for other in proc.pids() if other != pid)):
        return "it shares its memory with another process"
    return ""
