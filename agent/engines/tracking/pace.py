"""How quickly a running tree's memory is copied: so that the job keeps its speed.

Copying takes processor time from the job even where a core is idle: cores share caches, the way to
memory and often their units with a sibling. So the copier gets a part of the cores, measured as the
processor time of this whole program, and the volume at most a number of bytes a second. Where no
core is idle, that part is of one core only: threads that wait for each other at each step, as those
of a training do, all lose what one of them loses. A low priority would not do: it counts among
processes of one control group or session, and the job is in another.

Promises: a tree that hardly computes is not made to wait for; nothing is held back after
``PATIENCE`` of the deadline that the copying was given, so that it ends in time.
Does not: hold back what is read while the tree stands still.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time

from agent import errors
from agent.host import clock, proc, system

# Of the whole deadline; the rest is for what comes after.
PATIENCE = 0.25
# What may be taken at once before anything is held back: trees of a few hundred MiB are copied
# within it, which a job notices less than that it takes long.
_BURST_S = 0.5
# The most that is owed, since other work of this program counts as well.
_DEBT_S = 0.1
# A tree that takes less than this part of one core has nothing to lose.
_IDLE = 0.1
# The kernel counts in hundredths of a second.
_LOOK_S = 0.5
# Of what is idle; the rest is for who else looks how much that is.
_OF_IDLE = 0.5


@dataclasses.dataclass(frozen=True)
class Limits:
    """``cpu_percent`` of the cores that this program may use, as far as half of what is idle goes,
    and in any case of one; 100 for no limit. ``bytes_per_s`` of memory read, None for no limit.
    """

    cpu_percent: int = 100
    bytes_per_s: int | None = None

    @property
    def none(self) -> bool:
        """Whether they limit nothing."""
        return self.cpu_percent >= 100 and self.bytes_per_s is None


UNLIMITED = Limits()


class Pace:
    """Of one copy of the tree below ``root``. ``held_back_s`` is how long the copier waited."""

    def __init__(self, root: int, limits: Limits, deadline: clock.Deadline) -> None:
        self._root = root
        self._limits = limits
        self._patience = clock.Deadline.after(deadline.remaining_s * PATIENCE)
        self._on = os.sched_getaffinity(0)
        self._limited = limits.cpu_percent < 100
        # How many cores it may take now: this at least.
        self._cores = self._least = limits.cpu_percent / 100
        self._idle_s = system.idle_s(self._on)
        self._from_s = self._looked_s = clock.monotonic_s()
        self._took_s = time.process_time()
        # Below zero: what may be taken before anything is held back.
        self._owed_s = -_BURST_S
        self._owed_bytes = 0.0
        self._computed: dict[int, float] = {}
        self._idle = False
        self.held_back_s = 0.0

    @property
    def hurried(self) -> bool:
        """Whether the limits did not count any more, since time was short."""
        return not self._limits.none and self._patience.expired

    def wait(self, size_bytes: int) -> None:
        """Wait until so much more may be read."""
        if self._limits.none or self._patience.expired:
            return
        began_s = clock.monotonic_s()
        self._owed_bytes += size_bytes
        self._count()
        while (wait_s := min(self._due_s(), self._patience.remaining_s, _LOOK_S)) > 0:
            clock.wait_until(lambda: False, clock.Deadline.after(wait_s), every_s=_LOOK_S)
            self._count()
        self.held_back_s += clock.monotonic_s() - began_s

    def _count(self) -> None:
        """Take up what was taken, and what time has paid back."""
        now_s = clock.monotonic_s()
        passed_s, self._from_s = now_s - self._from_s, now_s
        took_s = time.process_time()
        if self._limited:
            self._look(now_s)
            owed_s = self._owed_s + took_s - self._took_s - passed_s * self._cores
            self._owed_s = -_BURST_S if self._idle else max(-_BURST_S, min(_DEBT_S, owed_s))
        self._took_s = took_s
        if self._limits.bytes_per_s is not None:
            self._owed_bytes = max(0.0, self._owed_bytes - passed_s * self._limits.bytes_per_s)

    def _due_s(self) -> float:
        """Until nothing is owed."""
        of_cpu_s = self._owed_s / self._cores if self._limited else 0.0
        rate = self._limits.bytes_per_s
        return max(of_cpu_s, self._owed_bytes / rate if rate else 0.0)

    def _look(self, now_s: float) -> None:
        """Look whether the tree computes, and on how many cores nothing does."""
        passed_s = now_s - self._looked_s
        if self._computed and passed_s < _LOOK_S:
            return
        before, self._computed, self._looked_s = self._computed, {}, now_s
        idle_s, self._idle_s = self._idle_s, system.idle_s(self._on)
        with contextlib.suppress(errors.NotFound):
            for pid in proc.tree(self._root):
                with contextlib.suppress(errors.NotFound):
                    self._computed[pid] = proc.stat(pid).cpu_s
        if before:
            # A process that came meanwhile counts for nothing yet.
            took_s = sum(now - before.get(pid, now) for pid, now in self._computed.items())
            self._idle = took_s < _IDLE * passed_s
            spare = (self._idle_s - idle_s) / passed_s * _OF_IDLE
            self._cores = min(len(self._on) * self._least, max(self._least, spare))
