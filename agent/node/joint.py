"""What the steps of an epoch do to the containers of one pod: capture them with an engine, write
their part of the epoch.

Promises: until ``let_go`` or RESUME the processes stand still where a step left them; ``let_go``
always ends with processes that run; a part that was written is kept or dropped as ``close`` says,
and neither if that is not known: then the store's own rules keep it until it is.
Does not: decide; ``participant`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from agent import errors
from agent.engines.base import CaptureOptions, CaptureReport, Engine
from agent.host import clock
from agent.model import ids
from agent.model.cut import End
from agent.model.hooks import Outcome
from agent.model.protocol import EVACUATE, Course, Decision, Step
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink, PageRun
from agent.node.contribution import Contribution, Stop
from agent.node.dump import Member
from agent.node.podhooks import Around
from agent.node.steppedcut import Stage, SteppedCut
from agent.store.repository import JointWriter, Store

_log = logging.getLogger(__name__)

_STAGES = {
    Step.FREEZE: Stage.FROZEN,
    Step.HOLD: Stage.HELD,
    Step.CAPTURE: Stage.CAPTURED,
    Step.RELEASE: Stage.RELEASED,
    Step.RESUME: Stage.RUNNING,
}


class JointDump:
    """The actions of a pod that is dumped as ``members`` of an epoch."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        group: ids.GroupName,
        epoch: ids.EpochId,
        course: Course,
        members: Sequence[Member],
        options: CaptureOptions,
        place: str,
        owned: contextlib.ExitStack | None = None,
        short_stop_failed: Callable[[], None] = lambda: None,
        about: Mapping[str, Any] | None = None,
        hooks: Around | None = None,
        ended: Callable[[Decision, str], None] = lambda decision, note: None,
    ) -> None:
        """``place`` names the pod, ``owned`` is what the operation holds as long as it lasts,
        ``about`` goes with the contribution, ``hooks`` are those of the pod; ``short_stop_failed``
        hears that the epoch is given up for having copied memory ahead, ``ended`` what became of it
        in the end, with a text for the pod's people.
        """
        self._store, self._engine = store, engine
        self._group, self._epoch = group, epoch
        self._members = tuple(members)
        shared_bytes = options.held_bytes // max(1, len(self._members))
        self._options = dataclasses.replace(options, held_bytes=shared_bytes)
        self._ends = course is EVACUATE
        self._deadline = clock.Deadline.after(options.deadline_s)
        self._cut = SteppedCut(len(self._members))
        self._place, self._about = place, about or {}
        self._owned = owned or contextlib.ExitStack()
        self._short_stop_failed = short_stop_failed
        self._hooks, self._told_end = hooks, ended
        self._failed = ""
        self._lock = threading.Lock()
        self._writer: JointWriter | None = None
        self._captures: list[Future[CaptureReport]] = []
        self._sinks: dict[ids.MemberName, _Noted] = {}
        self._freezing_s = self._frozen_s = self._running_s = 0.0
        self._over = self._given = self._ended = False

    def do(self, step: Step) -> bytes:
        """See ``session.Actions``."""
        try:
            return self._do(step)
        except errors.CkptError as exc:
            self._failed = self._failed or f"{exc.message} ({exc.code})"
            raise

    def _do(self, step: Step) -> bytes:
        if step is Step.PREPARE:
            self._begin()
            self._cut.reach(Stage.READY, self._deadline)
        elif step is Step.QUIESCE:
            if self._hooks is not None:
                self._hooks.before(self._cut.check)
            # What is written meanwhile is copied before the word to freeze: the stop is short, and
            # all members stand still at nearly the same time.
            self._cut.reach(Stage.POISED, self._deadline)
        elif step in _STAGES:
            self._go(step)
        elif step is Step.PERSIST:
            return self._persist()
        elif step is Step.END:
            self._end()
        return b""

    def let_go(self, *, committed: bool) -> bool:
        """See ``session.Actions``."""
        del committed
        with self._lock:
            self._over = True
        self._cut.give_up()
        for each in self._captures:
            # Why it failed was told by the step; the engine has let the processes go on.
            each.exception()
        if self._hooks is not None and self._given:
            # It may be long until it is known what became of the epoch.
            self._hooks.running()
        return True

    def settle(self) -> Decision:
        """See ``session.Actions``."""
        return self._store.abandon(self._group, self._epoch)

    def close(self, decision: Decision) -> None:
        """See ``session.Actions``."""
        with contextlib.ExitStack() as owned:
            owned.enter_context(self._owned.pop_all())
            if self._writer is not None:
                try:
                    self._settle_part(self._writer, decision)
                except (errors.VolumeError, errors.DataError) as exc:
                    _log.warning(
                        "leftovers of the epoch stay on the volume until a prune: %s", exc.message
                    )
            self._told_end(decision, self._note(decision))
            if self._hooks is not None and self._hooks.give_up() and not self._ended:
                # Nobody waits for them, but nothing else is done to the pod meanwhile.
                rest = owned.pop_all(), self._hooks, decision
                threading.Thread(target=_tell, args=rest, name="post hooks").start()

    def _note(self, decision: Decision) -> str:
        image = ids.image_name(self._group, self._epoch)
        if decision is Decision.ABANDONED:
            why = self._failed or "not by this pod; its coordinator's answer says why"
            return f"Image {image} was given up, the pod goes on: {why}"
        stop_s = (self._running_s or clock.monotonic_s()) - self._freezing_s
        end = "then ended" if self._ended else f"stopped for {stop_s:.3f} s"
        return f"Image {image}, with the other pods of the group at one instant, {end}"

    def _settle_part(self, writer: JointWriter, decision: Decision) -> None:
        if decision is Decision.ABANDONED:
            try:
                writer.drop()
            except errors.Conflict:
                _log.warning("epoch %s of %s is committed after all", self._epoch, self._group)
            else:
                return
        writer.keep()

    def _go(self, step: Step) -> None:
        began_s = clock.monotonic_s()
        self._cut.reach(_STAGES[step], self._deadline)
        if step is Step.FREEZE:
            self._freezing_s, self._frozen_s = began_s, clock.monotonic_s()
        elif step is Step.RESUME:
            self._running_s = clock.monotonic_s()
            if self._hooks is not None:
                self._hooks.running()

    def _begin(self) -> None:
        with self._lock:
            if self._over:
                raise errors.DumpFailed("the epoch was given up", hint="the job goes on")
            self._writer = self._owned.enter_context(
                self._store.join(self._group, self._epoch, now_s=clock.wall_s())
            )
            pool = ThreadPoolExecutor(len(self._members), thread_name_prefix="member")
            self._owned.callback(pool.shutdown)
            self._captures = [
                pool.submit(self._capture, self._writer, member) for member in self._members
            ]

    def _capture(self, writer: JointWriter, member: Member) -> CaptureReport:
        try:
            sink = _Noted(writer.member(member.name), self._cut)
            self._sinks[member.name] = sink
            return self._engine.capture(member.pid, sink, self._cut, self._options)
        except errors.ShortStopFailed as exc:
            self._short_stop_failed()
            told = errors.ShortStopFailed(
                exc.message,
                hint="ask for it again: the next time no memory is copied ahead",
                **exc.facts,
            )
            self._cut.fail(told)
            raise told from exc
        except BaseException as exc:
            self._cut.fail(exc)
            raise

    def _persist(self) -> bytes:
        if self._writer is None:
            raise errors.DumpFailed("nothing was captured")
        if not self._ends:
            # An engine may pass the rest on to the store when the processes run again.
            self._cut.store()
            self._await_captures()
        self._given = True
        part = self._writer.finish().encode()
        problems = self._hooks.problems if self._hooks is not None else ()
        return Contribution(
            part, tuple(self._connections()), tuple(self._stops()), dict(self._about), problems
        ).encode()

    def _connections(self) -> Iterator[End]:
        for sink in self._sinks.values():
            for each in sink.known.get("tcp_ends", ()):
                yield End(**each | {"place": self._place})

    def _stops(self) -> Iterator[Stop]:
        stop_s = (self._running_s or clock.monotonic_s()) - self._freezing_s
        for name, sink in self._sinks.items():
            processes = len(sink.known.get("processes", ()))
            freeze_s = self._frozen_s - self._freezing_s
            yield Stop(name, stop_s, freeze_s, sink.raw_bytes, processes)

    def _end(self) -> None:
        """The processes are ended if the store itself says that their image is committed."""
        found = self._store.decision(self._group, self._epoch)
        if found is not Decision.COMMITTED:
            raise errors.DumpFailed(
                f"epoch {self._epoch} is not committed: nothing was ended",
                hint="this is a defect of the coordinator: report it",
            )
        self._cut.end(self._deadline)
        self._await_captures()
        self._ended = True

    def _await_captures(self) -> None:
        """Wait until the engine is through; raise what a member failed with."""
        for each in self._captures:
            try:
                each.result(self._deadline.remaining_s)
            except TimeoutError as exc:
                raise errors.DeadlineExceeded(
                    "what was captured could not be stored in time",
                    hint="allow more time, or find what is slow",
                ) from exc


def _tell(owned: contextlib.ExitStack, hooks: Around, decision: Decision) -> None:
    """Run the post hooks that are left, and give back what the operation holds."""
    with owned:
        committed = decision is Decision.COMMITTED
        hooks.after(Outcome.COMMITTED if committed else Outcome.ABORTED)


class _Noted:
    """A member's sink that remembers the facts, counts memory, and is where a capture that is
    under way notices that it is to be given up.
    """

    def __init__(self, sink: MemberSink, cut: SteppedCut) -> None:
        self._sink = sink
        self._cut = cut
        self.known: dict[str, Any] = {}
        self.raw_bytes = 0
        self.metadata, self.file, self.recall = sink.metadata, sink.file, sink.recall

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        self._cut.check()
        self._sink.draft(space, runs, data)

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        self._cut.check()
        self.raw_bytes += len(data)
        self._sink.pages(space, run, data)

    def settle(self, space: AddressSpace, runs: Sequence[PageRun]) -> None:
        self.raw_bytes += sum(run.pages for run in runs) * PAGE_BYTES
        self._sink.settle(space, runs)

    def facts(self, facts: dict[str, Any]) -> None:
        self.known.update(facts)
        self._sink.facts(facts)
