"""The dump half: one tree is frozen, streamed into a sink, and runs on (or is killed after the
commit).

CRIU's notifications give the stages: ``pre-dump`` (still running), ``query-ext-files`` (frozen,
nothing read), ``post-dump`` (all metadata written, memory streamed, still frozen). The answer to
``post-dump`` is the point of no return: "yes" completes CRIU's work, "no" makes it thaw the tree.

What is particular to where the tree lives is its ``subject.Subject``'s.

Promises: whatever fails before the cut answered ``KILL``, the tree goes on as it was, and the
error is the cause, not what followed from it; nothing is left on the host.
Does not: know where the bytes go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any, BinaryIO, cast

from pycriu import rpc_pb2

from agent import errors
from agent.engines.base import CaptureOptions, CaptureReport, Cut, Disposition
from agent.engines.criu import (
    codepages,
    held,
    hosttree,
    journal,
    lazy,
    log,
    pageserver,
    preflight,
    recovery,
    rpc,
    shortstop,
    tcpends,
)
from agent.engines.criu.beside import Beside
from agent.engines.criu.probe import Criu
from agent.engines.criu.subject import Subject
from agent.host import clock, deadman, layouts, proc
from agent.model.streams import AddressSpace, MemberSink, PageRun

LOG = "dump.log"
# Files that are beside the images and that no restore reads.
_NOT_IMAGES = (LOG, "stats-dump", "criu.kdat", "criu.kdat.tmp")
# Processes that CRIU killed are gone when the kernel has taken their memory apart.
_DEATH_S = 30.0
_REAPED_S = 2.0
# For so long a job writes little in comparison to what it wrote in the rounds before.
_POISED_S = 1.0
# The word to freeze waits for the end of a copy that was begun meanwhile, and so do members that
# stand still by then: so many times longer than the last one took is the wait before the next.
_POISED_TIMES = 10


def capture(
    criu: Criu,
    places: journal.Places,
    pid: int,
    sink: MemberSink,
    cut: Cut,
    options: CaptureOptions,
) -> CaptureReport:
    """Capture the tree of this host below ``pid``; see ``agent.engines.base.Engine.capture``."""
    places.prepare()
    recovery.recover(places)
    return run(places, hosttree.HostTree(criu, preflight.target(pid)), sink, cut, options)


def run(
    places: journal.Places,
    subject: Subject,
    sink: MemberSink,
    cut: Cut,
    options: CaptureOptions,
) -> CaptureReport:
    """Capture ``subject``; as ``capture``, of which everything that may refuse has passed."""
    deadline = clock.Deadline.after(options.deadline_s)
    tree = subject.tree
    with (
        places.locked(tree),
        places.operation("dump", tree, about=subject.entry()) as operation,
        contextlib.closing(
            _Capture(places, operation, subject, sink, cut, options, deadline)
        ) as running,
    ):
        lazy.refuse_unfilled(places, tree)
        try:
            running.run()
        except BaseException as exc:
            recovery.undo_dump(places, operation.entry)
            explained = running.explained(exc)
            if explained is exc:
                raise
            raise explained from exc
        return running.persist()


class _Resume(Exception):
    """The cut wants the tree to run on though it might have killed it."""


@dataclasses.dataclass
class _Times:
    freeze_from_s: float = 0.0
    frozen_s: float = 0.0
    running_s: float = 0.0


class _Capture:
    """One capture, from the request to the reply."""

    def __init__(
        self,
        places: journal.Places,
        operation: journal.Operation,
        subject: Subject,
        sink: MemberSink,
        cut: Cut,
        options: CaptureOptions,
        deadline: clock.Deadline,
    ) -> None:
        self._places = places
        self._operation = operation
        self._subject = subject
        self._root = subject.tree[0]
        self._tree = subject.tree
        self._sink = sink
        # Who is to end waits for the store in any case.
        folder = None if options.kill else operation.scratch
        self._held = held.HeldSink(sink, options.held_bytes, folder)
        self._code = codepages.CodePages()
        self._short: shortstop.ShortStop | None = None
        self._plain_because = ""
        self._cut = cut
        self._options = options
        self._deadline = deadline
        self._images = operation.folder("images")
        self._server = pageserver.PageServer(self._on_pages, deadline)
        self._gatherer: Beside[dict[str, Any]] | None = None
        self._noting: Beside[None] | None = None
        self._times = _Times()
        self._image_names: list[str] = []
        self._metadata_bytes = 0
        self._copied_bytes = 0
        self._pids: list[int] = [who.pid for who in subject.tree]
        self._states: dict[int, str] = {}
        self._facts: dict[str, Any] = {}
        self._killed = False
        self._criu_status: int | None = None

    def run(self) -> None:
        """Do it, until the tree runs again or was killed."""
        with contextlib.ExitStack() as stack:
            # Nobody else can let go of the tree, or of who waits for it, while we stand still.
            stack.enter_context(deadman.armed())
            stack.callback(self._join_threads)
            stack.callback(self._server.close)
            descriptors, under = [self._server.for_criu.fileno()], []
            self._choose()
            if self._short is not None:
                stack.callback(self._short.close)
                # Before that: its reader would read all that is left, and the store take it.
                stack.callback(self._held.refuse)
            self._refuse_filled()
            if self._short is not None:
                self._short.copy_ahead()
                descriptors.append(self._short.descriptor)
                under = self._short.under
            self._held.prepare(self._expected_bytes, lambda: self._deadline.check("the dump"))
            worker, folder = stack.enter_context(
                self._subject.started(self._images, descriptors, under)
            )
            # Left in the order written: the stream first, so that a CRIU that is blocked writing
            # to it fails and thaws the tree, then CRIU's connection and process.
            stack.callback(self._note_status, worker)
            stack.callback(self._server.close)
            self._operation.note_criu(worker.child.pid)
            request = self._request(folder)
            self._server.release()
            if self._short is not None:
                self._short.started()
            self._server.start()
            try:
                response = worker.connection.request(request, self._on_stage, self._deadline)
                rpc.checked("dump", response, self._log_path)
            except _Resume:
                pass
            except errors.CriuFailed:
                # The committed and killed tree may take its namespaces, and CRIU in them, along, or
                # be gone before CRIU has let go of it. A namespace's first process ends only when
                # everybody in there was reaped, CRIU as well.
                if self._killed:
                    self._note_status(worker)
                if not (self._killed and self._subject.ends_with_root and self._root_ended()):
                    raise
            self._times.running_s = clock.monotonic_s()
            if self._short is not None and not self._killed:
                self._short.done()
            self._cut.running()
        if self._killed:
            self._settle_killed()

    def close(self) -> None:
        """Let go of what is held back."""
        self._held.close()

    def persist(self) -> CaptureReport:
        """Pass on what was held back while the tree stood still."""
        if not self._options.kill:
            if self._short is not None:
                self._short.confirm()
            self._store_all()
        return self._report()

    def explained(self, exc: BaseException) -> BaseException:
        """The error to show for ``exc``: its cause where it is only a consequence, and that it was
        not the plain way that failed.
        """
        found = self._explained(exc)
        if self._short is None or self._killed or not isinstance(found, errors.CriuFailed):
            return found
        return errors.ShortStopFailed(found.message, hint=found.hint, **found.facts)

    def _explained(self, exc: BaseException) -> BaseException:
        sink_error = self._server.failure
        if isinstance(exc, errors.CriuFailed):
            if sink_error is not None and not isinstance(sink_error, errors.CriuFailed):
                return sink_error
            if not proc.alive(self._root):
                return errors.TargetExited(
                    f"process {self._root.pid} ended while it was being dumped",
                    hint="nothing was kept; dump it earlier",
                    pid=self._root.pid,
                )
        if isinstance(exc, rpc.Gone):
            return log.died("dump", self._criu_status, self._log_path, "the job goes on; try again")
        if isinstance(exc, errors.NotFound):
            ended = exc.facts.get("pid")
            if ended in self._pids or not proc.alive(self._root):
                return errors.TargetExited(
                    f"process {ended or self._root.pid} ended while it was being dumped",
                    hint="try again",
                    pid=ended or self._root.pid,
                )
        return exc

    def _choose(self) -> None:
        if self._options.precopy:
            self._plain_because = shortstop.unsuited(self._subject.criu, self._pids)
        else:
            self._plain_because = "it was not asked for, or failed before"
        if self._plain_because:
            shortstop.passed_over(self._options.kept, self._root.pid)
        else:
            self._short = shortstop.ShortStop(
                self._root.pid, self._sink, self._held, self._deadline, self._options
            )

    def _refuse_filled(self) -> None:
        if self._short is None or not self._short.knows_flags:
            for pid in self._pids:
                with contextlib.suppress(errors.NotFound):
                    preflight.refuse_filled(pid, layouts.flags(pid))

    @property
    def _expected_bytes(self) -> int:
        """Of memory, while the tree stands still."""
        if self._short is not None:
            return self._short.expected_bytes
        return shortstop.resident_bytes(self._pids)

    @property
    def _log_path(self) -> str:
        return os.path.join(self._images, LOG)

    def _note_status(self, worker: rpc.Worker) -> None:
        self._criu_status = worker.end()

    def _join_threads(self) -> None:
        for thread in (self._gatherer, self._noting):
            if thread is not None:
                thread.join()

    def _request(self, folder: str) -> rpc.Request:
        request = rpc_pb2.criu_req(type=rpc_pb2.DUMP)
        opts = request.opts
        # -1 means: see images_dir. Log and statistics go there too.
        opts.images_dir_fd = -1
        opts.images_dir = folder
        opts.log_file = LOG
        opts.log_level = self._options.log_level
        opts.notify_scripts = True
        opts.leave_running = not (self._options.kill and self._subject.criu_kills)
        opts.ps.fd = self._server.for_criu.fileno()
        opts.ext_unix_sk = True
        opts.file_locks = True
        opts.link_remap = True
        opts.ghost_limit = self._options.ghost_limit_bytes
        opts.tcp_established = self._options.tcp_established
        opts.manage_cgroups = True
        opts.manage_cgroups_mode = rpc_pb2.IGNORE
        # CRIU knows numbers only up to 32 bits of seconds, and no "no limit".
        opts.timeout = max(1, min(60, int(self._deadline.remaining_s)))
        self._subject.configure(opts)
        return request

    def _on_stage(self, stage: str, pid: int, descriptor: int | None) -> None:
        del pid
        if descriptor is not None:
            os.close(descriptor)
        if stage == "pre-dump":
            self._subject.about_to_freeze(self._operation)
            self._cut.ready()
            self._poise()
            self._held.hold()
            self._states = {each: _state(each) for each in proc.tree(self._root.pid)}
            self._times.freeze_from_s = clock.monotonic_s()
        elif stage == "query-ext-files":
            self._times.frozen_s = clock.monotonic_s()
            self._pids = proc.tree(self._root.pid)
            self._cut.frozen()
            self._subject.frozen(self._pids, self._operation)
            self._cut.held()
            self._code.note(self._pids)
            if self._short is not None:
                self._short.frozen(self._pids, self._code)
            pids, states = self._pids, self._states
            maps = proc.maps if self._short is None else self._short.mappings
            self._gatherer = Beside("facts", lambda: self._subject.gather(pids, states, maps))
        elif stage == "post-dump":
            self._on_captured()

    def _poise(self) -> None:
        """Copy what was written meanwhile, until the tree is to be frozen."""
        wait_s = _POISED_S
        while True:
            began_s = clock.monotonic_s()
            if self._short is not None:
                self._short.about_to_freeze()
            wait_s = max(wait_s, _POISED_TIMES * (clock.monotonic_s() - began_s))
            if self._cut.poised(wait_s):
                return
            self._deadline.check("the wait for the other members")
            # Who waits long copies more and more seldom: what is copied twice is stored twice.
            wait_s *= 2

    def _on_pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        if self._noting is None:
            self._noting = Beside("note", lambda: self._subject.memory_flows(self._operation))
        self._code.put_back(space, run, data)
        if self._short is not None:
            self._short.pages(space, run, data)
        else:
            self._held.pages(space, run, data)

    def _on_captured(self) -> None:
        """All metadata is written and all memory streamed; the tree still stands still."""
        self._server.finish()
        if self._short is not None:
            self._short.finish()
        if self._gatherer is None:
            raise errors.DumpFailed("CRIU did not say when the tree stood still")
        if self._noting is not None:
            self._noting.result()
        # What CRIU writes there after this is no image.
        self._image_names = sorted(set(os.listdir(self._images)) - set(_NOT_IMAGES))
        more = self._subject.collect(self._images, self._pids, self._options, self._held)
        self._facts = {
            **self._gatherer.result(),
            "spaces": [[space.kind, space.id] for space in self._server.spaces],
            "stop": self._how(),
            "tcp_ends": [dataclasses.asdict(end) for end in tcpends.read(self._images)],
            **more,
        }
        self._held.facts(self._facts)
        if self._options.kill:
            self._store_all()
        self._deadline.check("the capture")
        if self._cut.captured() is Disposition.RESUME:
            self._subject.let_through()
            self._cut.released()
            if self._options.kill:
                raise _Resume
            return
        if not self._options.kill:
            raise errors.InvalidInput(
                "the cut asked to kill a tree that was dumped to run on",
                hint="set CaptureOptions.kill",
            )
        self._killed = self._subject.about_to_stop()

    def _how(self) -> dict[str, Any]:
        """Which way the memory took, and why no quicker one."""
        how: dict[str, Any]
        if self._short is None:
            how = {"path": "plain", "because": self._plain_because}
        else:
            how = {"path": "precopy", **self._short.facts()}
        return {**how, "spooled_bytes": self._held.spooled_bytes}

    def _store_all(self) -> None:
        """Have everything in the sink."""
        self._held.drain(self._before_each)
        if self._short is not None:
            self._copied_bytes = self._short.settle(self._server.spaces)
        for name in self._image_names:
            self._deadline.check("the dump")
            self._store_image(name)

    def _before_each(self) -> None:
        self._deadline.check("the dump")
        if self._short is not None and not self._options.kill:
            self._short.keep_pace()

    def _store_image(self, name: str) -> None:
        path = os.path.join(self._images, name)
        if os.path.islink(path):
            return  # "parent", which only incremental dumps of CRIU's own have
        self._metadata_bytes += os.path.getsize(path)
        with open(path, "rb") as content:
            self._sink.metadata(name, cast("BinaryIO", content))

    def _root_ended(self) -> bool:
        return clock.wait_until(lambda: not proc.alive(self._root), clock.Deadline.after(_REAPED_S))

    def _settle_killed(self) -> None:
        """See a killed tree to its end."""
        clock.wait_until(
            lambda: not any(proc.alive(who) for who in self._tree), clock.Deadline.after(_DEATH_S)
        )
        # The root is its parent's to reap; the others went to init, which does so at once, and
        # until then their numbers are in the way of a restore.
        orphans = [who.pid for who in self._tree[1:]]
        clock.wait_until(
            lambda: not any(proc.exists(pid) for pid in orphans), clock.Deadline.after(_REAPED_S)
        )
        self._subject.killed(self._places, self._operation, self._facts)

    @property
    def _memory_bytes(self) -> int:
        return self._server.raw_bytes + self._copied_bytes

    def _report(self) -> CaptureReport:
        times = self._times
        return CaptureReport(
            stop_s=times.running_s - times.freeze_from_s,
            freeze_s=times.frozen_s - times.freeze_from_s,
            raw_bytes=self._memory_bytes + self._metadata_bytes,
            pids=tuple(self._pids),
            engine_facts={
                "memory_bytes": self._memory_bytes,
                "metadata_bytes": self._metadata_bytes,
                "stop": self._facts.get("stop", {}),
                "skipped": self._facts.get("skipped", []),
            },
        )


def _state(pid: int) -> str:
    try:
        return proc.stat(pid).state
    except errors.NotFound:
        return "X"
