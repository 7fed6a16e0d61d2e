"""Tracking by asynchronous write protection, put in from outside (host/injection, host/pagemap).

Nothing is preloaded in the job and nothing of it changes. Each round takes on the mappings that
came since. What came to lie in a mapping before it was taken on counts as written: new and moved
mappings, those of a program that was just executed, everything of a process that was just forked.

Promises: what ``base.Tracker`` promises, for processes whose pages nobody but they themselves and
system calls on their behalf write; ``areas.escapes`` is asked before and after each round. A direct
read gets hold of its pages as a write does, which is noted, and changes them until it returns. So
what a round takes on is read when no call goes on that began before (``host/underway``); at the cut
none does, since every thread stands outside the kernel.
Does not: notice a direct I/O that began before a round looked at its page, ended after that page
was read, and whose file was opened and closed between two looks at the process's descriptors; nor
one of another process that shares the memory and is not its child by vfork. Nor know when another
process has let go that got hold of pages to write to them (process_vm_writev(2)), which is noted,
before they were taken: whoever reads must know that (``quiet``). Writes by ptrace and to
/proc/PID/mem that began before are over when a round has named its pages. Nor notice reads of
sockets that decrypt into the reader's memory (kTLS, AF_ALG), which take hold of pages, and write to
them when they have been taken and read; rounds that read what has rested leave these the time in
between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from agent import errors
from agent.engines.tracking import areas
from agent.host import clock, injection, pagemap, proc, underway
from agent.host.moves import Moves
from agent.host.pagemap import Pagemap, Ranges, WriteProtection

# What is given out at once: little enough that hardly any of it is written again before it is read.
_PIECE_BYTES = 64 << 20
# A process may move mappings while these are let go.
_TRIES = 3
# How long direct reads may take; a disk that is slow answers within some tens of milliseconds.
_DIRECT_S = 0.5
# Of who has not ended them in that time, so that many such processes do not hold up every round.
_DIRECT_AGAIN_S = 0.01


class Protected:
    """Tracks ``who``; ``moves`` reads what it moves.

    Raises:
        injection.InjectionRefused | errors.EnvironmentUnfit: it cannot be tracked.
        errors.NotFound: it has ended.
    """

    kind = "write-protect"

    def __init__(self, who: proc.Identity, moves: Moves) -> None:
        if not pagemap.scans():
            # Older than both, and nothing has been done to the process yet.
            raise errors.EnvironmentUnfit("this kernel cannot note writes to memory by itself")
        found = areas.escapes(who.pid)
        self.reason, self._direct = found.reason, found.direct
        self._who = who
        self._patience_s = _DIRECT_S
        if self._direct and not self._reads_over():
            self.reason = "its direct I/O takes long"
        if self.reason:
            raise injection.InjectionRefused(f"process {who.pid}: {self.reason}", pid=who.pid)
        self._made = injection.userfaultfd(who)
        self._protection = WriteProtection(self._made.descriptor)
        self._moves, self._closed = moves, False
        moves.add(self._made.descriptor)
        # What must be given out once more: where mappings came to lie whose pages have not been
        # given out there, and pages that a direct read may have changed after they were.
        self._arrived = pagemap.none()
        self._refused: set[tuple[int, int]] = set()

    def round(self) -> Iterator[Ranges]:
        """Pages of mappings that were not followed, and pages written since."""
        self._look_for_escapes()
        direct = self._direct
        # All is taken before any of it is read.
        pieces = list(self._taken()) if direct else self._taken()
        over = not direct or self._reads_over()
        given = [pagemap.none()]
        for piece in pieces:
            given.append(piece)
            yield piece
        self._look_for_escapes()
        if not over or self._direct != direct:
            self._arrived = pagemap.union(self._arrived, *given)

    def _taken(self) -> Iterator[Ranges]:
        # Opened anew: the process may execute other programs.
        pages = Pagemap(self._who.pid)
        try:
            chosen = areas.eligible(self._who.pid)
            untold_of = {start: pages.unguarded(start, end) for start, end in chosen.tolist()}
            spans = areas.spans(self._who.pid).tolist()
            ours = [span for span in spans if self._protection.register(*span)]
            for start, end in chosen.tolist():
                if (start, end) in self._refused:
                    continue  # given out once; it stays unknown
                pieces = pages.pieces(start, end, _PIECE_BYTES).reshape(-1, 1, 2)
                # Where the process has changed its mappings since they were listed, nothing is
                # taken on by these addresses: they could cut one that is new, and the kernel would
                # then move only a part of it.
                if not (_within(ours, start, end) and pages.guarded(start, end)):
                    self._refused.add((start, end))
                    for piece in pieces:
                        yield pages.existing(*piece[0].tolist())
                    continue
                untold = untold_of[start]
                for piece in pieces:
                    arrived = self._give_arrived(pages, piece)
                    taken = pages.take(*piece[0].tolist())
                    yield pagemap.union(taken, pagemap.clip(untold, piece), arrived)
            if ours:
                # Changes nothing but for a moment has the address space to itself, and so waits
                # for who writes to it by ptrace or /proc/PID/mem.
                self._protection.register(*ours[0])
        finally:
            pages.close()

    def cut(self, areas: Ranges) -> tuple[Ranges, Ranges]:
        """What exists, and pages of followed mappings that are not noted as written; the process
        stands still.
        """
        if self.reason:
            return pagemap.existing(self._who.pid, areas), pagemap.none()
        pages = Pagemap(self._who.pid)
        found, unchanged = [pagemap.none()], [pagemap.none()]
        try:
            for start, end in areas.tolist():
                if not self._followed(pages, start, end):
                    found.append(pages.existing(start, end))
                    continue
                existing, written = pages.existing_and_written(start, end)
                found.append(existing)
                unchanged.append(pagemap.without(existing, written))
        finally:
            pages.close()
        self._look_for_arrivals()
        return (
            np.concatenate(found),
            pagemap.without(np.concatenate(unchanged), self._arrived),
        )

    def again(self) -> bool:
        """See ``base.Tracker``. While its writes could escape nothing was named as unchanged, so
        that all of it is read once more.
        """
        self._refused.clear()
        if self.reason:
            self.reason = ""
            self._look_for_escapes()
        return not self.reason

    def close(self) -> None:
        """Drop all protection, also where a child that was forked at the wrong moment still holds
        the descriptor: nobody would read what it tells of moves, and who moves a mapping would wait
        for ever.
        """
        if not self._closed:
            self._closed = True
            try:
                self._unregister()
            finally:
                self._moves.remove(self._made.descriptor)
                self._protection.close()

    def take_back(self, pid: int) -> None:
        """See ``base.Tracker``."""
        if pid != self._who.pid and injection.inherited(self._made, pid):
            injection.take_back(proc.identity(pid), self._made)

    def _unregister(self) -> None:
        with contextlib.suppress(errors.NotFound):
            for _ in range(_TRIES):
                self._moves.arrived(self._made.descriptor)
                spans = areas.spans(self._who.pid).tolist()
                gone = [self._protection.unregister(start, end) for start, end in spans]
                if all(gone) and not len(self._moves.arrived(self._made.descriptor)):
                    break

    def _followed(self, pages: Pagemap, start: int, end: int) -> bool:
        """Whether this very descriptor protects the mapping, which cannot change now. After an exec
        it protects nothing; and what another one protects, of another capture or of the parent of a
        process that was just born by vfork and still has its memory, is not known to this one.
        """
        return pages.guarded(start, end) and self._protection.register(start, end)

    def _look_for_arrivals(self) -> None:
        self._arrived = pagemap.union(self._arrived, self._moves.arrived(self._made.descriptor))

    def _give_arrived(self, pages: Pagemap, piece: Ranges) -> Ranges:
        """Pages of ``piece`` that came by a move: what they hold was given out elsewhere."""
        self._look_for_arrivals()
        arrived = pagemap.clip(self._arrived, piece)
        self._arrived = pagemap.without(self._arrived, piece)
        return (
            pagemap.clip(pages.existing(*piece[0].tolist()), arrived) if len(arrived) else arrived
        )

    def _look_for_escapes(self) -> None:
        if not self.reason:
            found = areas.escapes(self._who.pid)
            self.reason = found.reason
            # One that was closed may still be read from.
            self._direct = self._direct or found.direct

    def _reads_over(self) -> bool:
        """Wait until no direct read goes on that goes on now; whether that was soon."""
        over = underway.over(self._who.pid, clock.Deadline.after(self._patience_s))
        self._patience_s = _DIRECT_S if over else _DIRECT_AGAIN_S
        return over


def _within(spans: list[list[int]], start: int, end: int) -> bool:
    return any(first <= start and end <= last for first, last in spans)
