"""Whether whoever had hold of a tree's pages, to write to them, has let go.

process_vm_writev(2) gets hold of up to 1024 pages of another process, which is noted as a write to
them, and writes to them afterwards, past the page table: at once, or whenever what it writes comes
from a disk. Pages that are taken on in between, and read before it has written, would be held as
they were for as long as nobody writes to them again. So what was taken is read only after an
instant at which nobody on the host had hold of any page (``host/pins``); or, where others hold
pages for good, after all have been seen outside that call who may write to the tree: its own
processes, and those of other trees that could name it and have the right.

Promises: "quiet" is proven; what is not known is not.
Does not: interrupt a process outside the tree: where one of those computes on and others hold pages
for good, nothing can be said.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection

from agent import errors
from agent.host import clock, pins, proc, underway
from agent.host.underway import Calls

# Those who hold pages for a moment only, but often, leave such an instant within this, mostly.
_PINS_S = 0.005
# How many times as long all who may write to the tree are looked at.
_LOOK_AT_ALL = 4
_CAP_SYS_PTRACE = 1 << 19  # linux/capability.h


class Quiet:
    """Asks again and again; from one thread. ``doubt`` is why the last answer was no, "" if it was
    yes.
    """

    def __init__(self) -> None:
        self._pins = pins.Pins()
        self.doubt = ""

    def since_now(self, pids: Collection[int], deadline: clock.Deadline) -> bool:
        """Wait until all who have hold of pages of ``pids``, a tree, at this moment have let go;
        whether that could be seen in time.
        """
        self.doubt, span_s = "", _PINS_S
        # In turns, and longer each time: either may be hopeless.
        while not self._pins.none(deadline.sooner(span_s)):
            writer = _writing(pids, deadline.sooner(_LOOK_AT_ALL * span_s))
            if writer is None:
                break
            if deadline.expired:
                self.doubt = f"process {writer} may be writing to the memory of others"
                break
            span_s *= 2
        return not self.doubt


def _writing(pids: Collection[int], deadline: clock.Deadline) -> int | None:
    """One that was not seen outside the call, None if there is none."""
    own = set(pids)
    may = _Rights(own)
    for pid in [*pids, *(set(proc.pids()) - own - {os.getpid()})]:
        with contextlib.suppress(errors.NotFound):
            if pid not in own and not may.write(pid):
                continue
            if not underway.over(pid, deadline, Calls.TO_OTHERS, interrupt=pid in own):
                return pid
    return None


class _Rights:
    """Who may write to the memory of ``pids``."""

    def __init__(self, pids: Collection[int]) -> None:
        self._uids, self._spaces, self._depth = set[int](), set[int](), 0
        # Whoever a user namespace belongs to has every right in it, without any capability.
        self._owned, users = False, proc.namespace(os.getpid(), "user")
        for pid in pids:
            with contextlib.suppress(errors.NotFound):
                target = proc.status(pid)
                self._uids.add(target.uid)
                self._depth = max(self._depth, len(target.ns_pids))
                self._spaces.add(proc.namespace(pid, "pid"))
                self._owned |= proc.namespace(pid, "user") != users

    def write(self, pid: int) -> bool:
        """Whether this one may: it has a number for one of them, and the right."""
        who = proc.status(pid)
        able = self._owned or who.caps_effective & _CAP_SYS_PTRACE
        if who.uid not in self._uids and not able:
            return False
        if proc.stat(pid).kernel_thread or len(who.ns_pids) > self._depth:
            return False
        try:
            return len(who.ns_pids) < self._depth or proc.namespace(pid, "pid") in self._spaces
        except errors.PrivilegeMissing:
            return True  # that is not known
