"""The dump half: one tree is frozen, streamed into a sink, and runs on (or is killed after the
commit).

CRIU's notifications give the stages: ``pre-dump`` (still running), ``query-ext-files`` (frozen,
nothing read), ``post-dump`` (all metadata written, memory streamed, still frozen). The answer to
``post-dump`` is the point of no return: "yes" completes CRIU's work, "no" makes it thaw the tree.

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
from typing import Any, BinaryIO, cast

from pycriu import rpc_pb2

from agent import errors
from agent.engines import ephemeral
from agent.engines.base import CaptureOptions, CaptureReport, Cut, Disposition
from agent.engines.criu import facts, journal, links, log, pageserver, preflight, recovery, rpc
from agent.engines.criu.probe import Criu
from agent.host import clock, netfilter, proc
from agent.model.streams import AddressSpace, MemberSink, PageRun

LOG = "dump.log"
# Files that CRIU writes beside the images and that no restore reads.
_NOT_IMAGES = (LOG, "stats-dump")
# Processes that CRIU killed are gone when the kernel has taken their memory apart.
_DEATH_S = 30.0
_REAPED_S = 2.0


def capture(
    criu: Criu,
    places: journal.Places,
    pid: int,
    sink: MemberSink,
    cut: Cut,
    options: CaptureOptions,
) -> CaptureReport:
    """Capture the tree below ``pid``; see ``agent.engines.base.Engine.capture``."""
    deadline = clock.Deadline.after(options.deadline_s)
    places.prepare()
    recovery.recover(places)
    tree = preflight.target(pid)
    with places.locked(tree), places.operation("dump", tree) as operation:
        running = _Capture(criu, places, operation, tree, sink, cut, options, deadline)
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
        criu: Criu,
        places: journal.Places,
        operation: journal.Operation,
        tree: Sequence[proc.Identity],
        sink: MemberSink,
        cut: Cut,
        options: CaptureOptions,
        deadline: clock.Deadline,
    ) -> None:
        self._criu = criu
        self._places = places
        self._operation = operation
        self._root = tree[0]
        self._tree = tree
        self._sink = sink
        self._cut = cut
        self._options = options
        self._deadline = deadline
        self._images = operation.folder("images")
        self._server = pageserver.PageServer(self._on_pages, deadline)
        self._gatherer: _Gatherer | None = None
        self._times = _Times()
        self._metadata_bytes = 0
        self._pids: list[int] = [who.pid for who in tree]
        self._states: dict[int, str] = {}
        self._facts: dict[str, Any] = {}
        self._killed = False
        self._looked_for_table = False
        self._criu_status: int | None = None

    def run(self) -> CaptureReport:
        """Do it."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._join_gatherer)
            stack.callback(self._server.close)
            worker = stack.enter_context(
                rpc.worker(self._criu.path, pass_fds=[self._server.for_criu.fileno()])
            )
            # Left in the order written: the stream first, so that a CRIU that is blocked writing
            # to it fails and thaws the tree, then CRIU's connection and process.
            stack.callback(self._note_status, worker)
            stack.callback(self._server.close)
            self._operation.note_criu(worker.child.pid)
            request = self._request()
            self._server.release()
            self._server.start()
            try:
                response = worker.connection.request(request, self._on_stage, self._deadline)
                rpc.checked("dump", response, self._log_path)
            except _Resume:
                pass
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

    def _request(self) -> rpc.Request:
        request = rpc_pb2.criu_req(type=rpc_pb2.DUMP)
        opts = request.opts
        opts.pid = self._root.pid
        # -1 means: see images_dir. Log and statistics go there too.
        opts.images_dir_fd = -1
        opts.images_dir = self._images
        opts.log_file = LOG
        opts.log_level = self._options.log_level
        opts.notify_scripts = True
        opts.leave_running = not self._options.kill
        opts.ps.fd = self._server.for_criu.fileno()
        opts.shell_job = True
        opts.ext_unix_sk = True
        opts.file_locks = True
        opts.link_remap = True
        opts.ghost_limit = self._options.ghost_limit_bytes
        opts.tcp_established = self._options.tcp_established
        opts.network_lock = rpc_pb2.NFTABLES
        opts.manage_cgroups = True
        opts.manage_cgroups_mode = rpc_pb2.IGNORE
        # CRIU knows numbers only up to 32 bits of seconds, and no "no limit".
        opts.timeout = max(1, min(60, int(self._deadline.remaining_s)))
        opts.external.extend(sorted(facts.outside_ttys(self._pids)))
        return request

    def _on_stage(self, stage: str, pid: int, descriptor: int | None) -> None:
        del pid
        if descriptor is not None:
            os.close(descriptor)
        if stage == "pre-dump":
            # CRIU makes its table as soon as it has frozen the tree.
            self._operation.note_tables_before(netfilter.tables(recovery.TABLE_PREFIX))
            self._states = {each: _state(each) for each in proc.tree(self._root.pid)}
            self._times.freeze_from_s = clock.monotonic_s()
        elif stage == "query-ext-files":
            self._times.frozen_s = clock.monotonic_s()
            self._pids = proc.tree(self._root.pid)
            self._cut.frozen()
            self._gatherer = _Gatherer(self._pids, self._states, self._criu)
            self._gatherer.start()
        elif stage == "post-dump":
            self._on_captured()

    def _on_pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        if not self._looked_for_table:
            # Memory flows, so CRIU's code is in a process of the tree: now it can be told apart
            # from another CRIU's.
            self._looked_for_table = True
            if self._operation.entry.criu is not None:
                self._operation.note_table(recovery.table_of(self._operation.entry.criu.pid))
        self._sink.pages(space, run, data)

    def _on_captured(self) -> None:
        """All metadata is written and all memory streamed; the tree still stands still."""
        self._server.finish()
        if self._gatherer is None:
            raise errors.DumpFailed("CRIU did not say when the tree stood still")
        for name in sorted(os.listdir(self._images)):
            if name not in _NOT_IMAGES:
                self._store_image(name)
        links.collect(self._images, self._sink)
        collected = ephemeral.collect(self._pids, self._options.include, self._sink)
        self._facts = {
            **self._gatherer.result(),
            "spaces": [[space.kind, space.id] for space in self._server.spaces],
            "skipped": [list(each) for each in collected.skipped],
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
        self._killed = True

    def _store_image(self, name: str) -> None:
        path = os.path.join(self._images, name)
        if os.path.islink(path):
            return  # "parent", which only incremental dumps of CRIU's own have
        self._metadata_bytes += os.path.getsize(path)
        with open(path, "rb") as content:
            self._sink.metadata(name, cast("BinaryIO", content))

    def _settle_killed(self) -> None:
        """See a killed tree to its end, and decide about its connections' lock."""
        clock.wait_until(
            lambda: not any(proc.alive(who) for who in self._tree), clock.Deadline.after(_DEATH_S)
        )
        # The root is its parent's to reap; the others went to init, which does so at once, and
        # until then their numbers are in the way of a restore.
        orphans = [who.pid for who in self._tree[1:]]
        clock.wait_until(
            lambda: not any(proc.exists(pid) for pid in orphans), clock.Deadline.after(_REAPED_S)
        )
        # Peers outside of the tree wait behind CRIU's lock for the restore; without the lock they
        # would be told that the connection is gone.
        recovery.settle_tables(
            self._places, self._operation.entry, keep=bool(_outside_peers(self._facts))
        )

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

    def __init__(self, pids: Sequence[int], states: Mapping[int, str], criu: Criu) -> None:
        super().__init__(name="facts", daemon=True)
        self._pids = pids
        self._states = states
        self._criu = criu
        self._facts: dict[str, Any] = {}
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._facts = facts.gather(self._pids, self._states, self._criu)
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


def _outside_peers(known: dict[str, Any]) -> list[str]:
    """The remote ends of live TCP connections that lead out of the tree."""
    live = facts.connections(known)
    inside = set(live)
    return sorted(remote for local, remote in live if (remote, local) not in inside)
