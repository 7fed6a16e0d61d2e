"""The dump half: one tree is frozen, streamed into a sink, and runs on (or is killed after the
commit).

CRIU's notifications give the stages: ``pre-dump`` (still running), ``query-ext-files`` (frozen,
nothing read), ``post-dump`` (all metadata written, memory streamed, still frozen). The answer to
``post-dump`` is the point of no return: "yes" completes CRIU's work, "no" makes it thaw the tree.

What is particular to where the tree lives is its ``Subject``'s: ``hosttree.HostTree`` for trees of
this host, the ``container`` engine's for those inside a container.

Promises: whatever fails before the cut answered ``KILL``, the tree goes on as it was, and the
error is the cause, not what followed from it; nothing is left on the host.
Does not: know where the bytes go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol, cast

from pycriu import rpc_pb2

from agent import errors
from agent.engines.base import CaptureOptions, CaptureReport, Cut, Disposition
from agent.engines.criu import hosttree, journal, log, pageserver, preflight, recovery, rpc
from agent.engines.criu.probe import Criu
from agent.host import clock, proc
from agent.model.streams import AddressSpace, MemberSink, PageRun

LOG = "dump.log"
# Files that are beside the images and that no restore reads.
_NOT_IMAGES = (LOG, "stats-dump", "criu.kdat", "criu.kdat.tmp")
# Processes that CRIU killed are gone when the kernel has taken their memory apart.
_DEATH_S = 30.0
_REAPED_S = 2.0


class Subject(Protocol):
    """The tree that is dumped, and how CRIU reaches it. Processes are named by their numbers on
    this host, ``tree`` root first. ``ends_with_root``: whatever runs where CRIU runs is killed by
    the kernel when the root has ended.
    """

    tree: Sequence[proc.Identity]
    ends_with_root: bool

    @property
    def criu_kills(self) -> bool:
        """Whether CRIU is to kill a tree that is to stop; else the subject itself sees to it."""

    def entry(self) -> journal.About:
        """What the journal is to say of the operation besides the tree."""

    def started(
        self, images: str, pass_fds: Sequence[int]
    ) -> AbstractContextManager[tuple[rpc.Worker, str]]:
        """Start CRIU, ready for one request; gives its name for the folder ``images`` as well."""

    def configure(self, opts: rpc.Request) -> None:
        """Set the options of a dump that depend on where the tree lives, ``pid`` among them."""

    def about_to_freeze(self, operation: journal.Operation) -> None:
        """CRIU is going to stop the tree; it still runs."""

    def frozen(self, pids: Sequence[int], operation: journal.Operation) -> None:
        """The tree, now ``pids``, stands still and nothing has been read; may raise."""

    def memory_flows(self, operation: journal.Operation) -> None:
        """The first pages arrive."""

    def gather(self, pids: Sequence[int], states: Mapping[int, str]) -> dict[str, Any]:
        """The facts of the tree, from /proc; called in a thread while memory is streamed."""

    def collect(
        self, images: str, pids: Sequence[int], options: CaptureOptions, sink: MemberSink
    ) -> dict[str, Any]:
        """Store what travels besides memory and CRIU's images; more facts. May raise."""

    def about_to_stop(self) -> bool:
        """The epoch is committed, and CRIU is going to kill the tree or to let go of it; whether
        it ends, or only never runs on.
        """

    def killed(
        self, places: journal.Places, operation: journal.Operation, known: dict[str, Any]
    ) -> None:
        """The tree is gone, after a commit."""


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
    ):
        running = _Capture(places, operation, subject, sink, cut, options, deadline)
        try:
            return running.run()
        except BaseException as exc:
            recovery.undo_dump(places, operation.entry)
            explained = running.explained(exc)
            if explained is exc:
                raise
            raise explained from exc


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
        self._cut = cut
        self._options = options
        self._deadline = deadline
        self._images = operation.folder("images")
        self._server = pageserver.PageServer(self._on_pages, deadline)
        self._gatherer: _Gatherer | None = None
        self._times = _Times()
        self._metadata_bytes = 0
        self._pids: list[int] = [who.pid for who in subject.tree]
        self._states: dict[int, str] = {}
        self._facts: dict[str, Any] = {}
        self._killed = False
        self._memory_flows = False
        self._criu_status: int | None = None

    def run(self) -> CaptureReport:
        """Do it."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._join_gatherer)
            stack.callback(self._server.close)
            worker, folder = stack.enter_context(
                self._subject.started(self._images, [self._server.for_criu.fileno()])
            )
            # Left in the order written: the stream first, so that a CRIU that is blocked writing
            # to it fails and thaws the tree, then CRIU's connection and process.
            stack.callback(self._note_status, worker)
            stack.callback(self._server.close)
            self._operation.note_criu(worker.child.pid)
            request = self._request(folder)
            self._server.release()
            self._server.start()
            try:
                response = worker.connection.request(request, self._on_stage, self._deadline)
                rpc.checked("dump", response, self._log_path)
            except _Resume:
                pass
            except rpc.Gone:
                # The committed and killed tree may take its namespaces, and CRIU in them, along.
                if not (self._killed and self._subject.ends_with_root and self._root_ended()):
                    raise
            self._times.running_s = clock.monotonic_s()
        if self._killed:
            self._settle_killed()
        return self._report()

    def explained(self, exc: BaseException) -> BaseException:
        """The error to show for ``exc``: its cause where it is only a consequence."""
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
        if isinstance(exc, errors.NotFound) and exc.facts.get("pid") in self._pids:
            return errors.TargetExited(
                f"process {exc.facts['pid']} ended while it was being dumped",
                hint="try again",
                pid=exc.facts["pid"],
            )
        return exc

    @property
    def _log_path(self) -> str:
        return os.path.join(self._images, LOG)

    def _note_status(self, worker: rpc.Worker) -> None:
        self._criu_status = worker.end()

    def _join_gatherer(self) -> None:
        if self._gatherer is not None:
            self._gatherer.join()

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
            self._states = {each: _state(each) for each in proc.tree(self._root.pid)}
            self._times.freeze_from_s = clock.monotonic_s()
        elif stage == "query-ext-files":
            self._times.frozen_s = clock.monotonic_s()
            self._pids = proc.tree(self._root.pid)
            self._subject.frozen(self._pids, self._operation)
            self._cut.frozen()
            self._gatherer = _Gatherer(self._subject, self._pids, self._states)
            self._gatherer.start()
        elif stage == "post-dump":
            self._on_captured()

    def _on_pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        if not self._memory_flows:
            self._memory_flows = True
            self._subject.memory_flows(self._operation)
        self._sink.pages(space, run, data)

    def _on_captured(self) -> None:
        """All metadata is written and all memory streamed; the tree still stands still."""
        self._server.finish()
        if self._gatherer is None:
            raise errors.DumpFailed("CRIU did not say when the tree stood still")
        for name in sorted(os.listdir(self._images)):
            if name not in _NOT_IMAGES:
                self._store_image(name)
        more = self._subject.collect(self._images, self._pids, self._options, self._sink)
        self._facts = {
            **self._gatherer.result(),
            "spaces": [[space.kind, space.id] for space in self._server.spaces],
            **more,
        }
        self._sink.facts(self._facts)
        self._deadline.check("the capture")
        if self._cut.captured() is Disposition.RESUME:
            if self._options.kill:
                raise _Resume
            return
        if not self._options.kill:
            raise errors.InvalidInput(
                "the cut asked to kill a tree that was dumped to run on",
                hint="set CaptureOptions.kill",
            )
        self._killed = self._subject.about_to_stop()

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

    def _report(self) -> CaptureReport:
        times = self._times
        return CaptureReport(
            stop_s=times.running_s - times.freeze_from_s,
            freeze_s=times.frozen_s - times.freeze_from_s,
            raw_bytes=self._server.raw_bytes + self._metadata_bytes,
            pids=tuple(self._pids),
            engine_facts={
                "memory_bytes": self._server.raw_bytes,
                "metadata_bytes": self._metadata_bytes,
                "skipped": self._facts.get("skipped", []),
            },
        )


class _Gatherer(threading.Thread):
    """Reads the facts from /proc while CRIU streams the memory: that time is free."""

    def __init__(self, subject: Subject, pids: Sequence[int], states: Mapping[int, str]) -> None:
        super().__init__(name="facts", daemon=True)
        self._subject = subject
        self._pids = pids
        self._states = states
        self._facts: dict[str, Any] = {}
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._facts = self._subject.gather(self._pids, self._states)
        except BaseException as exc:  # noqa: BLE001 - carried to the thread that asks, by result
            self._failure = exc

    def result(self) -> dict[str, Any]:
        self.join()
        if self._failure is not None:
            raise self._failure
        return self._facts


def _state(pid: int) -> str:
    try:
        return proc.stat(pid).state
    except errors.NotFound:
        return "X"
