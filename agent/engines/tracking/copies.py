"""The copy of one process, whose memory is read in rounds and at the cut.

Promises: the pages that it has (``have``) were read when nobody had hold of them any more, and have
not been written since, as far as its tracker was asked.
Does not: know other processes, or when a round is.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from agent import errors
from agent.engines.tracking import areas, reading
from agent.engines.tracking.base import Tracker
from agent.engines.tracking.compared import Compared, piecewise
from agent.engines.tracking.pace import Pace
from agent.engines.tracking.reading import Drafts
from agent.host import clock, pagemap, proc
from agent.host.fingerprints import Fingerprinter
from agent.host.pagemap import Ranges
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink


@dataclasses.dataclass(frozen=True)
class Standing:
    """A process at the cut. ``areas`` are the mappings that are copied here, a row each."""

    who: proc.Identity
    space: AddressSpace
    areas: Ranges


class Copy:
    """The copy of one process."""

    def __init__(self, who: proc.Identity, tracker: Tracker, room: memoryview) -> None:
        self.who = who
        self.tracker = tracker
        self._room = room
        self.space = AddressSpace("process", areas.private_id(who.pid))
        self.have = pagemap.none()
        # To be read, whatever the tracker says: given out and not read so far, or known of the
        # cut before and not sure to be as it was.
        self._left = pagemap.none()
        # What the last ``take`` gave out; and pages given out that somebody may have had hold of
        # since before then, and may still write to, without a trace.
        self._given = self._held = pagemap.none()
        # How much the last ``take`` gave out, and how much of that the one before had given out.
        self.given_bytes = self.again_bytes = 0

    @property
    def left_bytes(self) -> int:
        """How much was given out and has not been read."""
        return pagemap.size_bytes(self._left)

    def recall(self, sink: MemberSink, epoch: str) -> None:
        """Begin another copy, in ``sink``, with what it takes over of ``epoch``, which the last one
        became.
        """
        # The tracker may not give it out again, and who had hold of it may have it still.
        self._held = pagemap.union(self._held, self._left)
        runs = sink.recall(epoch, self.space)
        there = np.array(
            [(run.address, run.address + run.pages * PAGE_BYTES) for run in runs], dtype=np.int64
        ).reshape(-1, 2)
        self._left = pagemap.union(self._left, pagemap.without(self.have, there))
        self.have = pagemap.clip(self.have, there)

    def finish(self, standing: Standing, sink: MemberSink) -> tuple[Ranges, int]:
        """Read those of the pages that exist at the cut that are not had as they are; all that
        exist, and how many bytes were read. All of them are had afterwards, and in the next copy
        those that are sure to be unchanged. Raises errors.ShortStopFailed.
        """
        existing, unchanged = self.tracker.cut(standing.areas)
        missing = pagemap.without(existing, pagemap.clip(self.have, unchanged))
        self.have = pagemap.without(pagemap.clip(existing, unchanged), self._held)
        self._left = pagemap.without(existing, self.have)
        return existing, reading.whole(standing.who, standing.space, missing, sink, self._room)

    def take(self, deadline: clock.Deadline) -> None:
        """Ask the tracker what to read. Raises errors.NotFound if it has ended."""
        had, self.have = self.have, pagemap.none()  # until it went well
        left, self._left = self._left, pagemap.none()
        given = [pagemap.none()]
        for piece in self.tracker.round():
            given.append(piece)
            deadline.check("copying memory ahead")
        before, self._given = self._given, pagemap.union(*given)
        self.given_bytes = pagemap.size_bytes(self._given)
        self.again_bytes = pagemap.size_bytes(pagemap.clip(self._given, before))
        self.have = pagemap.without(had, self._given)
        self._left = pagemap.union(left, self._given)
        self._held = pagemap.union(self._held, self._given)

    def waits(self, *, rested: bool) -> bool:
        """Whether there is something to ``read`` that somebody may have hold of."""
        return len(pagemap.clip(self._held, self._wanted(rested=rested))) > 0

    @property
    def held(self) -> bool:
        """Whether there is something that somebody may have hold of."""
        return len(self._held) > 0

    def let_go(self) -> None:
        """Nobody has hold of pages any more who had when they were taken."""
        self._held = pagemap.none()

    def read(self, sink: Drafts, pace: Pace | None, *, rested: bool, quick: bool) -> int:
        """Read what is left and nobody may have hold of; say how many bytes. ``rested``: only what
        the last ``take`` did not give out, so has not been written for a while. ``quick``: many
        pages by each system call. Raises errors.NotFound if it has ended.
        """
        wanted = pagemap.without(self._wanted(rested=rested), self._held)
        had, self.have = self.have, pagemap.none()  # until it went well
        with reading.opened(self.who) as memory:
            done = reading.draft(
                *(sink, self.space, memory, wanted, pace), standing=quick, into=self._room
            )
        # Quick reading goes by the number: it was its memory if the process still has that number.
        if quick and not proc.alive(self.who):
            raise errors.NotFound(f"process {self.who.pid} has ended", pid=self.who.pid)
        self.have = pagemap.union(had, done)
        self._left = pagemap.without(self._left, wanted)
        return pagemap.size_bytes(done)

    def _wanted(self, *, rested: bool) -> Ranges:
        return pagemap.without(self._left, self._given) if rested else self._left


class ComparedCopy(Copy):
    """The copy of a process whose writes are not noted."""

    def __init__(
        self, who: proc.Identity, tracker: Tracker, room: memoryview, fingerprinter: Fingerprinter
    ) -> None:
        super().__init__(who, tracker, room)
        self._compared = Compared(self.space, fingerprinter)

    def recall(self, sink: MemberSink, epoch: str) -> None:
        """See ``Copy``."""
        self._compared.recall(sink, epoch)

    def finish(self, standing: Standing, sink: MemberSink) -> tuple[Ranges, int]:
        """See ``Copy``: all of it is read."""
        existing, _ = self.tracker.cut(standing.areas)
        with reading.opened(self.who) as memory:
            self._compared.finish(existing, piecewise(memory.read_standing), sink)
        return existing, pagemap.size_bytes(existing)

    def take(self, deadline: clock.Deadline) -> None:
        """See ``Copy``: nothing, since only a look at all of it tells what was written."""

    def read(self, sink: Drafts, pace: Pace | None, *, rested: bool, quick: bool) -> int:
        """See ``Copy``: nothing."""
        return 0

    def look(self, sink: MemberSink, deadline: clock.Deadline, pace: Pace | None) -> int:
        """Draft what is not as it was drafted; say how many bytes that were."""
        existing = np.concatenate([pagemap.none(), *self.tracker.round()])
        with reading.opened(self.who) as memory:
            return self._compared.round(existing, piecewise(memory.read), sink, deadline, pace)

    @property
    def changed_bytes(self) -> int:
        """What the last look found changed."""
        return self._compared.changed_bytes
