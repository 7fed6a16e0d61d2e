"""Copying a tree's memory into a sink while it runs, and the rest while it stands still.

Rounds of drafts bring the sink close to what the processes hold; at the cut, only what the trackers
are not sure of is read again, and everything that exists is settled. What a process writes all the
time is left for the cut: a copy of it made ahead would be stored for nothing, and what several
processes write alike is alike only when all of them stand still.

Promises: at the cut, every page of the mappings that ``cut`` names is settled with the content that
it has then, whatever happened in the rounds: processes that came or executed another program are
read whole. What is held beyond the sink is one buffer (``reading``) and ranges of pages.
Does not: read other mappings; decide what becomes of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from agent import errors
from agent.engines.tracking import areas, reading
from agent.engines.tracking.copies import ComparedCopy, Copy, Standing
from agent.engines.tracking.pace import Pace
from agent.engines.tracking.protected import Protected
from agent.engines.tracking.quiet import Quiet
from agent.engines.tracking.shared import Found, SharedCopies
from agent.engines.tracking.softdirty import SoftDirty
from agent.engines.tracking.untracked import Untracked
from agent.host import clock, injection, pagemap, proc
from agent.host.fingerprints import Fingerprinter
from agent.host.moves import Moves
from agent.host.pagemap import Ranges
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink, PageRun

log = logging.getLogger(__name__)

# A round that leaves so little is the last: it is read within a millisecond or two.
_ENOUGH_BYTES = 4 << 20
# Rounds that do not get on any more only cost the job time.
_SHRINKS_TO = 0.8
# Of what was written in one look, how much was in the one before, if it is all the time.
_AGAIN = 0.5
# The last rounds catch up with who writes no more than this, and what they read can be held.
_MOST_WRITTEN_PER_S = 128 << 20
# What is written within this is taken for written all the time: some steps of common trainings.
LOOK_S = 0.25
# What was written while a round took longer than this many of them cannot be compared.
_COMPARABLE = 2.0
_MOST_ROUNDS = 8
# Between CRIU's start and the freeze: the first takes up what was written meanwhile.
_LAST_ROUNDS = 4
# What the last rounds take and CRIU takes to start.
_UNTIL_CUT_S = 0.5
# Of memory whose writes are not noted, each of which reads all of it.
_MOST_LOOKS = 3
# How long whoever has hold of pages may write to them; longer, and they are read later.
_LET_GO_S, _LET_GO_QUICKLY_S = 0.5, 0.1
# Of the other processes in a round in which that was in vain: who hinders it is often the same.
_LET_GO_AGAIN_S = 0.01
# Runs settled in one call.
_SETTLED_RUNS = 4096


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round read, and how long it took."""

    read_bytes: int
    took_s: float


class Precopy:
    """The copies of a tree's processes, in ``sink``."""

    def __init__(
        self, sink: MemberSink, deadline: clock.Deadline, pace: Pace | None = None
    ) -> None:
        self._sink = sink
        self._deadline = deadline
        self._pace = pace
        self._moves, self._quiet = Moves(), Quiet()
        self._copies: dict[proc.Identity, Copy] = {}
        self._fingerprinter = Fingerprinter()
        # What is read goes through here; whoever reads meanwhile takes another.
        self.room = reading.room()
        self._shared = SharedCopies(self._fingerprinter)
        # Processes that hold nothing of ours: only who is forked later can.
        self._clean: set[proc.Identity] = set()
        self._settled: dict[AddressSpace, Ranges] = {}
        self._root: int | None = None
        self.rounds: list[Round] = []
        # Whether more rounds leave less; they are stored, whether or not they are written again.
        self.shrinks = True
        self.cut_bytes = self.shared_bytes = 0
        # Why pages were left for the cut though nobody wrote to them, as far as is known.
        self.unread_because = ""
        # By the last round but these: how quickly the tree writes, and since when it may have.
        self._written_per_s = self._looked_s = 0.0

    @property
    def kinds(self) -> dict[str, int]:
        """How many processes are tracked in which way."""
        found: dict[str, int] = {}
        for copy in self._copies.values():
            found[copy.tracker.kind] = found.get(copy.tracker.kind, 0) + 1
        return found

    @property
    def processes(self) -> int:
        """How many are copied."""
        return len(self._copies)

    @property
    def pace(self) -> Pace | None:
        """What it is held back by."""
        return self._pace

    @property
    def reasons(self) -> list[str]:
        """Why processes are not tracked."""
        return sorted({copy.tracker.reason for copy in self._copies.values()} - {""})

    def begin(
        self, sink: MemberSink, deadline: clock.Deadline, epoch: str, pace: Pace | None = None
    ) -> None:
        """Begin another copy of the tree, in ``sink``, after the last one became ``epoch``."""
        self._sink, self._deadline, self._pace = sink, deadline, pace
        self._settled = {}
        self.rounds, self.shrinks = [], True
        self.cut_bytes = self.shared_bytes = 0
        self.unread_because = ""
        for who, copy in list(self._copies.items()):
            again = False
            with contextlib.suppress(errors.NotFound):
                again = proc.alive(who) and copy.tracker.again()
            if again:
                copy.recall(sink, epoch)
            else:
                del self._copies[who]
                copy.tracker.close()
        self._clean = {who for who in self._clean if proc.alive(who)}
        self._shared.begin(sink, epoch)

    def run(self, root: int) -> None:
        """Copy the tree below ``root``, not quicker than ``pace`` allows, until little is left or
        it does not get less.

        Raises:
            errors.NotFound: the root has ended.
            errors.VolumeError: from the sink.
        """
        self._compare(root)
        left_bytes, looked_s = None, 0.0
        for _ in range(_MOST_ROUNDS):
            looked = clock.Deadline.after(LOOK_S)
            span_s, looked_s = clock.monotonic_s() - looked_s, clock.monotonic_s()
            self.round(root, rested=True)
            before, left_bytes = left_bytes, sum(each.left_bytes for each in self._copies.values())
            self._written_per_s = left_bytes / span_s
            self._looked_s = looked_s
            if left_bytes <= _ENOUGH_BYTES:
                break
            if span_s > _COMPARABLE * LOOK_S:
                before = None
            if before is not None and left_bytes > _SHRINKS_TO * before:
                # Who writes here and there leaves less to a round that comes sooner.
                wanders = self._again < _AGAIN
                self.shrinks = wanders and self._written_per_s < _MOST_WRITTEN_PER_S
                break
            rest = self._deadline.sooner(looked.remaining_s)
            clock.wait_until(lambda: False, rest, every_s=LOOK_S)

    @property
    def _again(self) -> float:
        """Of what was written by the last round, how much had been by the one before."""
        given_bytes = sum(each.given_bytes for each in self._copies.values())
        return sum(each.again_bytes for each in self._copies.values()) / max(given_bytes, 1)

    def _compare(self, root: int) -> None:
        before = None
        for _ in range(_MOST_LOOKS):
            drafted_bytes = self.look(root, self._pace)
            if drafted_bytes <= _ENOUGH_BYTES:
                break
            if before is not None and drafted_bytes > _SHRINKS_TO * before:
                break
            before = drafted_bytes

    def last_rounds(self, root: int, sink: MemberSink, between: Callable[[], object]) -> None:
        """Copy what was written meanwhile into ``sink``, which is quick, again and again while that
        leaves less; ``between`` is called before the round that is the last if little is left then.
        Raises as ``run``.
        """
        before = None
        for number in range(_LAST_ROUNDS if self.shrinks else 0):
            read_bytes = self.round(root, into=sink)
            if not number:
                between()
            elif read_bytes <= _ENOUGH_BYTES or read_bytes > _SHRINKS_TO * (before or read_bytes):
                break
            before = read_bytes
        if not self.shrinks:
            between()

    def round(self, root: int, *, rested: bool = False, into: MemberSink | None = None) -> int:
        """Copy once what the trackers ask for, or with ``rested`` only what has not been written
        since the round before, at the pace; quickly ``into`` another sink than the own one, which
        passes on to that. Say how many bytes. Raises as ``run``.
        """
        began_s = clock.monotonic_s()
        self._root = root
        copies = []
        for pid in proc.tree(root):
            with contextlib.suppress(errors.NotFound):
                self._take_back(pid)
                copies.append(self._copy(proc.identity(pid)))
        total, soon_s = 0, _LET_GO_S if rested else _LET_GO_QUICKLY_S
        # Where reading takes long, each is taken only just before it is read.
        for each in [[copy] for copy in copies] if rested else [copies]:
            taken, known = self._taken(root, each, soon_s, rested=rested)
            soon_s = soon_s if known else _LET_GO_AGAIN_S
            total += self._read(taken, rested=rested, into=into)
        self.rounds.append(Round(total, clock.monotonic_s() - began_s))
        return total

    def _taken(
        self, root: int, copies: Sequence[Copy], soon_s: float, *, rested: bool
    ) -> tuple[list[Copy], bool]:
        """Those of ``copies`` that could be taken, and whether nobody has hold any more of what is
        to be read of them, as far as that is known within ``soon_s``.
        """
        taken = []
        for copy in copies:
            with contextlib.suppress(errors.NotFound):
                copy.take(self._deadline)
                taken.append(copy)
        if not any(copy.waits(rested=rested) for copy in taken):
            return taken, True
        known = self._quiet.since_now(proc.tree(root), self._deadline.sooner(soon_s))
        for copy in taken if known else ():
            copy.let_go()
        return taken, known

    def _read(self, copies: Sequence[Copy], *, rested: bool, into: MemberSink | None) -> int:
        total = 0
        for copy in copies:
            with contextlib.suppress(errors.NotFound):
                total += copy.read(
                    into or self._sink,
                    self._pace if rested else None,
                    rested=rested,
                    quick=into is not None,
                )
        return total

    def cut(
        self, pids: Sequence[int], maps: Callable[[int], Sequence[proc.Mapping]] = proc.maps
    ) -> list[Standing]:
        """What is copied of processes that stand still, as their mappings are now, which ``maps``
        tells.
        """
        found = []
        for pid in pids:
            with contextlib.suppress(errors.NotFound):
                space = AddressSpace("process", areas.private_id(pid))
                found.append(Standing(proc.identity(pid), space, areas.eligible_of(maps(pid))))
        return found

    def look(self, root: int, pace: Pace | None = None) -> int:
        """Copy once what was written to memory whose writes are not noted, and say how many bytes;
        little is left then for the cut. Raises as ``run``.
        """
        pids = proc.tree(root)
        total = self._shared.round(pids, self._sink, self._deadline, pace)
        for pid in pids:
            with contextlib.suppress(errors.NotFound):
                copy = self._copy(proc.identity(pid))
                if isinstance(copy, ComparedCopy):
                    total += copy.look(self._sink, self._deadline, pace)
        return total

    @property
    def expected_bytes(self) -> int:
        """How much is likely to be left for the last rounds and the cut, a guess."""
        compared = [each for each in self._copies.values() if isinstance(each, ComparedCopy)]
        changed_bytes = self._shared.changed_bytes + sum(each.changed_bytes for each in compared)
        since_s = clock.monotonic_s() - self._looked_s + _UNTIL_CUT_S
        written_bytes = int(self._written_per_s * since_s)
        left_bytes = sum(each.left_bytes for each in self._copies.values())
        return 2 * changed_bytes + left_bytes + written_bytes

    def forget_shared(self) -> None:
        """What is begun next builds on an epoch that somebody else read. Of shared memory only its
        content at the last cut is known, which says nothing of what that epoch has.
        """
        self._shared = SharedCopies(self._fingerprinter)

    def cut_shared(self, pids: Sequence[int]) -> list[Found]:
        """Which shared memory of theirs is copied."""
        return self._shared.cut(pids)

    def finish_shared(self, found: Sequence[Found], sink: MemberSink) -> None:
        """As ``finish``, of shared memory."""
        for each in found:
            self._settled[each.space], size_bytes = self._shared.finish(each, sink)
            self.shared_bytes += size_bytes

    def finish(self, standing: Sequence[Standing], sink: MemberSink) -> None:
        """Read what the copies lack into ``sink``, which may be another; they still stand still.

        Raises:
            errors.ShortStopFailed: memory that exists cannot be read.
            errors.VolumeError: from the sink.
        """
        for each in standing:
            if not len(each.areas):
                continue  # it has ended, or is small
            copy = self._copies.get(each.who)
            if copy is not None and copy.space == each.space:
                if copy.held:
                    self.unread_because = self._quiet.doubt
                existing, read_bytes = copy.finish(each, sink)
            else:
                existing = pagemap.existing(each.who.pid, each.areas)
                read_bytes = reading.whole(each.who, each.space, existing, sink, self.room)
            self.cut_bytes += read_bytes
            self._settled[each.space] = existing

    def settle(
        self, spaces: Sequence[AddressSpace], others: dict[AddressSpace, list[PageRun]], flags: int
    ) -> int:
        """Settle what was copied here, with ``flags``, together with ``others``, runs that somebody
        else drafted, ascending; they go first. Say how many bytes were copied here.
        """
        total = 0
        for space in spaces:
            own = self._settled.get(space, pagemap.none())
            theirs = others.get(space, [])
            rows = [(run.address, run.address + run.pages * PAGE_BYTES) for run in theirs]
            taken = np.array(rows, dtype=np.int64).reshape(-1, 2)
            own = pagemap.without(own, taken)
            total += pagemap.size_bytes(own)
            runs = theirs + [
                PageRun(start, (end - start) // PAGE_BYTES, flags) for start, end in own.tolist()
            ]
            runs.sort(key=lambda run: run.address)
            for at in range(0, len(runs), _SETTLED_RUNS):
                self._sink.settle(space, runs[at : at + _SETTLED_RUNS])
        return total

    def close(self) -> None:
        """Let go of all processes, whatever fails; safe to repeat."""
        root, self._root = self._root, None
        with contextlib.ExitStack() as stack:
            stack.callback(self._moves.close)
            for copy in self._copies.values():
                stack.callback(copy.tracker.close)
            pids: list[int] = []
            with contextlib.suppress(errors.NotFound):
                pids = [] if root is None else proc.tree(root)
            for pid in pids:
                with contextlib.suppress(errors.NotFound):
                    self._take_back(pid)

    def _take_back(self, pid: int) -> None:
        """Leave nothing in a process that another one forked while it was being taken on. Who
        cannot be reached is asked again the next time; what it holds does no harm but to a dump of
        it, once the trackers are closed.
        """
        who = proc.identity(pid)
        if who in self._clean:
            return
        try:
            for copy in self._copies.values():
                copy.tracker.take_back(pid)
        except injection.InjectionRefused as exc:
            log.warning("a descriptor of ours stays in process %d: %s", pid, exc.message)
        else:
            self._clean.add(who)

    def _copy(self, who: proc.Identity) -> Copy:
        found = self._copies.get(who)
        if found is None:
            try:
                found = Copy(who, Protected(who, self._moves), self.room)
            except (injection.InjectionRefused, errors.EnvironmentUnfit) as exc:
                found = self._otherwise(who, exc.message)
            self._copies[who] = found
        return found

    def _otherwise(self, who: proc.Identity, reason: str) -> Copy:
        # Who cannot be followed where that is to be had is a case of its own, and compared.
        if not pagemap.scans():
            try:
                return Copy(who, SoftDirty(who, reason), self.room)
            except errors.EnvironmentUnfit as exc:
                reason = f"{reason}; {exc.message}"
        return ComparedCopy(who, Untracked(who.pid, reason), self.room, self._fingerprinter)
