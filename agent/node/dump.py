"""This host's half of a dump: capture every member of the epoch at one cut, persist, commit.

Promises: all members stand still together before the first is read, and none goes on before the
last was read; either the epoch is committed and restorable or nothing of it is; a dump that fails
or is cancelled leaves every member running. With ``stop`` nothing is killed before the commit.
Does not: find out who belongs to the group, or print.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Protocol

from agent import errors
from agent.engines.base import CaptureOptions, CaptureReport, Disposition, Engine
from agent.host import clock, threads
from agent.model import ids
from agent.model.streams import PAGE_BYTES, AddressSpace, FileEntry, MemberSink, PageRun
from agent.store.repository import EpochSummary, EpochWriter, Store

log = logging.getLogger(__name__)

# A program accepts what comes in within milliseconds, unless it is at something else; the random
# part keeps the next stop from meeting the same moment of something that comes again and again.
UNACCEPTED_AGAIN = 2
_UNACCEPTED_WAIT_S = (0.05, 0.25)


@dataclasses.dataclass(frozen=True)
class Member:
    """A process tree that takes part, by the pid of its root."""

    name: ids.MemberName
    pid: int


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a dump has come. ``phase`` is capture, persist or done."""

    phase: str
    raw_bytes: int


@dataclasses.dataclass(frozen=True)
class DumpOutcome:
    """A committed epoch. ``stop_s`` is from the first member frozen to the last one running (or
    killed), with an engine without a cut the longest stop of a member; ``durable_s`` from the
    request to the commit.
    """

    epoch: EpochSummary
    members: tuple[tuple[ids.MemberName, CaptureReport], ...]
    stop_s: float
    durable_s: float
    stopped: bool


class Around(Protocol):
    """What is done around the stop (``podhooks``)."""

    def before(self, check: Callable[[], None]) -> None:
        """All members run and are stopped next, also where an earlier try was given up; ``check``
        may raise in the middle. Raising gives the dump up.
        """

    def running(self) -> None:
        """All members run again; returns at once."""


class _Nothing:
    def before(self, check: Callable[[], None]) -> None:
        pass

    def running(self) -> None:
        pass


class Cancel:
    """Asks an operation to give up at its next step; safe to set from a signal handler.
    ``given_up`` is what then is told of it.
    """

    def __init__(self, given_up: str = "the dump was given up, the job goes on") -> None:
        self._event = threading.Event()
        self._given_up = given_up

    def set(self) -> None:
        """Ask; asking again changes nothing."""
        self._event.set()

    def pause(self, span_s: float) -> None:
        """Let so much time pass; as ``check``, at once when asked."""
        self._event.wait(span_s)
        self.check()

    def check(self) -> None:
        """Raise ``errors.Interrupted`` if asked."""
        if self._event.is_set():
            raise errors.Interrupted(f"interrupted: {self._given_up}", hint="ask for it again")


def dump(
    store: Store,
    engine: Engine,
    group: ids.GroupName,
    members: Sequence[Member],
    options: CaptureOptions,
    *,
    stop: bool = False,
    facts: Mapping[str, Any] | None = None,
    cancel: Cancel | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    around: Around | None = None,
) -> DumpOutcome:
    """Dump ``members`` as one epoch of ``group``; ``facts`` are kept with the epoch. ``around`` is
    not told of members that were ended.

    A capture that copied memory ahead and failed is made once more without. One that would lose a
    connection between members that was not accepted yet is made up to twice more; then an engine
    that can leaves it out.

    Raises:
        errors.Refused: before anything was touched.
        errors.Failed | errors.VolumeError: given up; every member is as it was before. It is
            ``errors.ConnectionUnaccepted`` if the engine cannot leave one out.
        errors.Corrupt: likewise, what an engine without a cut gave or what was stored is damaged.
    """
    cancel = cancel or Cancel()
    shared_bytes = options.held_bytes // max(1, len(members))
    options = dataclasses.replace(options, kill=stop, held_bytes=shared_bytes)
    began_s, deadline = clock.monotonic_s(), clock.Deadline.after(options.deadline_s)

    def attempt(options: CaptureOptions) -> DumpOutcome:
        return _dump(
            store,
            engine,
            group,
            members,
            options,
            began_s,
            facts or {},
            cancel,
            progress,
            around or _Nothing(),
        )

    again = 0
    while True:
        try:
            return attempt(options)
        except errors.ShortStopFailed as exc:
            if not options.precopy:
                raise
            # All members again: they have run on since.
            log.warning(
                "a dump that copied memory ahead failed; the plain way is taken",
                extra={"group": group, "reason": exc.message},
            )
            options = dataclasses.replace(options, precopy=False)
        except errors.ConnectionUnaccepted as exc:
            if again == UNACCEPTED_AGAIN:
                raise
            again += 1
            log.warning(
                "a connection was not accepted yet; the dump is tried again",
                extra={"group": group, "reason": exc.message},
            )
            if again == UNACCEPTED_AGAIN:
                options = dataclasses.replace(options, within=frozenset())
            if options.kept is not None:
                options.kept.forget()
            cancel.pause(secrets.SystemRandom().uniform(*_UNACCEPTED_WAIT_S))
            deadline.check("the dump")
            options = dataclasses.replace(options, deadline_s=deadline.remaining_s)


def _dump(
    store: Store,
    engine: Engine,
    group: ids.GroupName,
    members: Sequence[Member],
    options: CaptureOptions,
    began_s: float,
    facts: Mapping[str, Any],
    cancel: Cancel,
    progress: Callable[[Progress], None],
    around: Around,
) -> DumpOutcome:
    stop = options.kill
    with store.begin(group, now_s=clock.wall_s()) as writer:
        cut = _GroupCut(len(members), options.deadline_s, cancel, around)
        known = {**facts, "engine": engine.name, "stop": stop}
        if stop:
            cut.before_kill = lambda: cut.note_committed(_commit(writer, known, cancel))
        meter = _Meter(progress, cancel)
        if not engine.promises.cuts:
            around.before(cancel.check)
        reports = _capture_all(engine, members, writer, cut, meter, options)
        if not engine.promises.cuts:
            around.running()
        progress(Progress("persist", meter.raw_bytes))
        epoch = cut.committed or _commit(writer, known, cancel)
    if not engine.promises.cuts:
        _read_back(store, epoch)
    progress(Progress("done", meter.raw_bytes))
    return DumpOutcome(
        epoch=epoch,
        members=tuple(zip((m.name for m in members), reports, strict=True)),
        stop_s=cut.stop_s() if engine.promises.cuts else max(each.stop_s for each in reports),
        durable_s=cut.committed_at_s - began_s if stop else clock.monotonic_s() - began_s,
        stopped=stop,
    )


def _commit(writer: EpochWriter, facts: dict[str, Any], cancel: Cancel) -> EpochSummary:
    cancel.check()
    return writer.commit(facts)


def _read_back(store: Store, epoch: EpochSummary) -> None:
    """Verify an epoch whose source was somebody else's file and is gone, so that what is stored is
    the only copy.

    Raises:
        errors.Corrupt: it is damaged; it was removed.
    """
    report = store.verify(epoch.group, epoch.epoch)
    if report.good:
        return
    store.delete(epoch.group, epoch.epoch)
    first = report.damaged[0]
    raise errors.Corrupt(
        f"what was just stored reads back damaged: {first.part}: {first.problem}",
        hint="look at the volume; nothing was kept, the job goes on",
        part=first.part,
    )


def _capture_all(
    engine: Engine,
    members: Sequence[Member],
    writer: EpochWriter,
    cut: _GroupCut,
    meter: _Meter,
    options: CaptureOptions,
) -> list[CaptureReport]:
    """Capture all members at once; the first error is raised when every member is out of the
    engine, so that none is left behind in a capture.
    """

    def one(member: Member) -> CaptureReport:
        try:
            sink = _MeteredSink(writer.member(member.name), meter)
            return engine.capture(member.pid, sink, cut, options)
        except BaseException:
            cut.abort()
            raise

    with ThreadPoolExecutor(len(members), thread_name_prefix="member") as pool:
        try:
            futures = [pool.submit(one, member) for member in members]
        except RuntimeError as refused:
            # Those that have begun would wait for who never comes.
            cut.abort()
            pool.shutdown(wait=False, cancel_futures=True)
            raise threads.none_left() from refused
    failures = [exc for future in futures if (exc := future.exception())]
    if failures:
        # A member that was only told to give up says less than the one that caused it.
        raise next((e for e in failures if not isinstance(e, _TornCut)), failures[0])
    return [future.result() for future in futures]


class _TornCut(errors.DumpFailed):
    """Another member of the group failed."""


class _GroupCut:
    """The barriers of a group: nobody is read before all stand still, nobody goes on before all
    were read. One broken member breaks it for all.
    """

    def __init__(self, parties: int, deadline_s: float, cancel: Cancel, around: Around) -> None:
        self._parties = parties
        self._deadline_s = deadline_s
        self._cancel = cancel
        self._around = around
        self._ready = threading.Barrier(parties, action=lambda: around.before(cancel.check))
        self._poised = threading.Barrier(parties)
        self._frozen = threading.Barrier(parties)
        self._held = threading.Barrier(parties)
        self._captured = threading.Barrier(parties, action=self._all_captured)
        self._released = threading.Barrier(parties)
        self._lock = threading.Lock()
        self._first_frozen_s: float | None = None
        self._last_running_s = 0.0
        self._running = 0
        self.before_kill: Callable[[], None] | None = None
        self.committed: EpochSummary | None = None
        self.committed_at_s = 0.0

    def check(self) -> None:
        self._cancel.check()

    def fail(self, failure: BaseException) -> None:
        del failure  # told when the capture ends
        self.abort()

    def ready(self) -> None:
        # Who has copied more ahead must not stand still for the others.
        self._cancel.check()
        self._wait(self._ready)

    def poised(self, wait_s: float) -> bool:
        # The others come as soon as they have copied what they wrote: nobody runs hooks any more.
        del wait_s
        self._cancel.check()
        self._wait(self._poised)
        return True

    def frozen(self) -> None:
        with self._lock:
            if self._first_frozen_s is None:
                self._first_frozen_s = clock.monotonic_s()
        self._cancel.check()
        self._wait(self._frozen)

    def held(self) -> None:
        self._wait(self._held)

    def captured(self) -> Disposition:
        self._cancel.check()
        self._wait(self._captured)
        return Disposition.KILL if self.committed else Disposition.RESUME

    def released(self) -> None:
        self._wait(self._released)

    def abort(self) -> None:
        stages = (
            *(self._ready, self._poised, self._frozen),
            *(self._held, self._captured, self._released),
        )
        for barrier in stages:
            barrier.abort()

    def note_committed(self, epoch: EpochSummary) -> None:
        self.committed = epoch
        self.committed_at_s = clock.monotonic_s()

    def running(self) -> None:
        with self._lock:
            self._last_running_s = clock.monotonic_s()
            self._running += 1
            all_run = self._running == self._parties and self.committed is None
        if all_run:
            self._around.running()

    def stop_s(self) -> float:
        return self._last_running_s - (self._first_frozen_s or self._last_running_s)

    def _all_captured(self) -> None:
        if self.before_kill:
            self.before_kill()

    def _wait(self, barrier: threading.Barrier) -> None:
        try:
            barrier.wait(self._deadline_s)
        except threading.BrokenBarrierError as exc:
            raise _TornCut(
                "another member of the group could not be captured",
                hint="the other member's error says why",
            ) from exc


class _Meter:
    """Counts what passes, reports it, and is where a cancelled dump notices."""

    def __init__(self, progress: Callable[[Progress], None], cancel: Cancel) -> None:
        self._progress = progress
        self._cancel = cancel
        self.raw_bytes = 0

    def add(self, count_bytes: int) -> None:
        self._cancel.check()
        self.raw_bytes += count_bytes
        self._progress(Progress("capture", self.raw_bytes))


class _MeteredSink:
    """A member's sink that counts and can be cancelled."""

    def __init__(self, sink: MemberSink, meter: _Meter) -> None:
        self._sink = sink
        self._meter = meter

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        self._meter.add(len(data))
        self._sink.pages(space, run, data)

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        self._meter.add(0)
        self._sink.draft(space, runs, data)

    def recall(self, epoch: str, space: AddressSpace) -> list[PageRun]:
        self._meter.add(0)
        return self._sink.recall(epoch, space)

    def settle(self, space: AddressSpace, runs: Sequence[PageRun]) -> None:
        self._meter.add(sum(run.pages for run in runs) * PAGE_BYTES)
        self._sink.settle(space, runs)

    def metadata(self, name: str, content: BinaryIO) -> None:
        self._meter.add(0)
        self._sink.metadata(name, content)

    def file(self, entry: FileEntry, content: BinaryIO | None) -> None:
        self._meter.add(entry.size_bytes)
        self._sink.file(entry, content)

    def facts(self, facts: dict[str, Any]) -> None:
        self._sink.facts(facts)
