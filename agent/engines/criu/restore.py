"""The restore half: an image becomes a running tree again, in place or in namespaces of its own.

The images are laid out in a scratch folder, the memory as page files (``feed``), the job's own
files are put back, and CRIU builds the tree. Its ``post-restore`` notification is the gate: all
processes stand complete, none has run, connections are still locked.

Promises: everything of the image has been read and verified, and everything in the way on this
host has been reported, before a process is started; a restore that fails leaves none of the tree
and puts displaced files back.
Does not: know where the bytes come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from pycriu import rpc_pb2

from agent import errors
from agent.engines import ephemeral
from agent.engines.base import FilePolicy, Gate, RestoredTree, RestoreOptions
from agent.engines.criu import (
    conflicts,
    feed,
    journal,
    log,
    mend,
    pour,
    recovery,
    rpc,
    stdio,
    trees,
)
from agent.engines.criu.probe import Criu
from agent.host import clock, hold, proc
from agent.model.streams import MemberSource

logger = logging.getLogger(__name__)

LOG = "restore.log"
# CRIU itself takes some pid; another attempt gets another one.
_STARTS = 20
_DEATH_S = 5.0


def restore(
    criu: Criu,
    places: journal.Places,
    source: MemberSource,
    options: RestoreOptions,
    gate: Gate,
) -> RestoredTree:
    """Bring a tree back; see ``agent.engines.base.Engine.restore``."""
    deadline = clock.Deadline.after(options.deadline_s)
    places.prepare()
    recovery.recover(places)
    known = source.facts()
    numbers = conflicts.numbers(known)
    if options.isolate:
        numbers = set()
    conflicts.wait_for_init(numbers)
    _refuse_conflicts(known, source, options)
    # The numbers are free now; whoever has one after this moment got it from this restore.
    began = int(clock.boottime_s() * proc.TICKS_PER_S)
    taken = [proc.Identity(number, began) for number in sorted(numbers)]
    with (
        places.locked(proc.Identity(number, 0) for number in numbers),
        ephemeral.put_back(source, options.files, f".before-restore-{int(clock.wall_s())}"),
    ):
        for pouring in (True, False):
            with places.operation("restore", taken, conflicts.programs(known)) as operation:
                running = _Restore(
                    criu, operation, source, known, options, gate, deadline, pouring=pouring
                )
                try:
                    return running.run()
                except pour.PourRefused as exc:
                    _undo(places, operation, numbers)
                    if not pouring:
                        raise
                    logger.info("pouring refused, using page files", extra={"reason": exc.message})
                except BaseException as exc:
                    _undo(places, operation, numbers)
                    explained = running.explained(exc)
                    if explained is exc:
                        raise
                    raise explained from exc
                finally:
                    recovery.forget_gone_tables(places)
    raise errors.RestoreFailed("no way to restore memory worked")


def _undo(places: journal.Places, operation: journal.Operation, numbers: set[int]) -> None:
    recovery.undo_restore(places, operation.entry)
    trees.reap(numbers)
    # What was no child of ours is init's to reap; until then a second attempt would collide.
    clock.wait_until(
        lambda: not any(proc.exists(number) for number in numbers), clock.Deadline.after(_DEATH_S)
    )


def _refuse_conflicts(known: dict[str, Any], source: MemberSource, options: RestoreOptions) -> None:
    reasons = conflicts.find(known, feed.memory_bytes(source), options)
    if options.files is FilePolicy.REFUSE:
        reasons.extend(ephemeral.differences(source))
    if reasons:
        raise errors.RestoreConflict(
            f"cannot restore here: {'; '.join(reasons[:3])}"
            + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""),
            hint="put missing and changed files back, end what uses a pid or an address, or use "
            "--isolate for pids and --files rollback for the job's own files",
            reasons=reasons,
        )


@dataclasses.dataclass
class _Streams:
    """Descriptors for the tree's standard streams, and those of them that are ours to close."""

    by_number: dict[int, int]
    owned: list[int]


class _Restore:
    """One restore, from the request to the reply."""

    def __init__(
        self,
        criu: Criu,
        operation: journal.Operation,
        source: MemberSource,
        known: dict[str, Any],
        options: RestoreOptions,
        gate: Gate,
        deadline: clock.Deadline,
        *,
        pouring: bool,
    ) -> None:
        self._criu = criu
        self._operation = operation
        self._source = source
        self._known = known
        self._options = options
        self._gate = gate
        self._deadline = deadline
        self._images = operation.folder("images")
        self._root_pid = int(known["processes"][0]["pid"])
        self._feed = feed.Feed(source, known, self._images, pouring=pouring)
        self._host_pid: Callable[[int], int] = int
        self._hold = contextlib.ExitStack()
        self._criu_status: int | None = None

    def run(self) -> RestoredTree:
        """Do it."""
        self._feed.lay_out()
        mend.mend(self._images, accept_changed=self._options.accept_changed)
        with self._streams() as streams:
            redirected = stdio.redirect(self._images, self._root_pid, set(streams.by_number))
            inherit = {n: fd for n, fd in streams.by_number.items() if n in redirected}
            # An end of a connection may be there before its peer, also of another member's tree.
            with self._hold:
                self._hold.enter_context(
                    hold.held(
                        recovery.hold_name(self._operation.entry),
                        conflicts.connections(self._known),
                    )
                )
                if self._options.isolate:
                    return self._isolated(inherit)
                return self._in_place(inherit)

    def explained(self, exc: BaseException) -> BaseException:
        """The error to show for ``exc``."""
        if isinstance(exc, rpc.Gone):
            return log.died(
                "restore", self._criu_status, self._log_path, "nothing of the tree runs; try again"
            )
        if isinstance(exc, errors.NotFound):
            return errors.RestoreFailed(
                "a process ended while it was being restored", hint="try again"
            )
        return exc

    @property
    def _log_path(self) -> str:
        return os.path.join(self._images, LOG)

    def _in_place(self, inherit: dict[int, int]) -> RestoredTree:
        with contextlib.ExitStack() as stack:
            worker = self._start_beside(inherit, stack)
            response = self._ask(worker, inherit)
            # The restored root may be in CRIU's session: it stays.
            self._criu_status = worker.end(alone=False)
        return trees.InPlace(int(response.restore.pid))

    def _start_beside(self, inherit: dict[int, int], stack: contextlib.ExitStack) -> rpc.Worker:
        """Start CRIU under a number that the tree does not need itself."""
        numbers = conflicts.numbers(self._known)
        for _ in range(_STARTS):
            attempt = stack.enter_context(contextlib.ExitStack())
            worker = attempt.enter_context(
                rpc.worker(self._criu.path, pass_fds=list(inherit.values()))
            )
            if worker.child.pid not in numbers:
                self._operation.note_criu(worker.child.pid)
                return worker
            attempt.close()
        raise errors.RestoreConflict(
            "the tree's pids are those that this host gives out next",
            hint="try again",
            reasons=["the next free pids of this host belong to the tree"],
        )

    def _isolated(self, inherit: dict[int, int]) -> RestoredTree:
        with contextlib.ExitStack() as stack:
            supervised = trees.supervise(
                self._criu.path, self._root_pid, conflicts.numbers(self._known), inherit.values()
            )
            stack.callback(supervised.kill)
            self._operation.note_criu(supervised.supervisor_pid)
            self._host_pid = supervised.host_pid
            self._ask(supervised.worker, inherit)
            supervised.settle(self._deadline)
            stack.pop_all()
        return supervised

    def _ask(self, worker: rpc.Worker, inherit: dict[int, int]) -> rpc.Response:
        try:
            response = worker.connection.request(
                self._request(inherit), self._on_stage, self._deadline
            )
        except rpc.Gone:
            self._criu_status = worker.end()
            raise
        return rpc.checked("restore", response, self._log_path)

    def _request(self, inherit: dict[int, int]) -> rpc.Request:
        request = rpc_pb2.criu_req(type=rpc_pb2.RESTORE)
        opts = request.opts
        opts.images_dir_fd = -1
        opts.images_dir = self._images
        opts.log_file = LOG
        opts.log_level = self._options.log_level
        opts.notify_scripts = True
        opts.rst_sibling = True
        opts.shell_job = True
        opts.ext_unix_sk = True
        opts.file_locks = True
        opts.link_remap = True
        opts.tcp_established = True
        opts.manage_cgroups = True
        opts.manage_cgroups_mode = rpc_pb2.IGNORE
        for number, descriptor in inherit.items():
            opts.inherit_fd.add(key=stdio.key(number), fd=descriptor)
        return request

    def _on_stage(self, stage: str, pid: int, descriptor: int | None) -> None:
        del pid
        if descriptor is not None:
            os.close(descriptor)
        if stage == "post-restore":
            self._feed.fill(self._host_pid, lambda: self._deadline.check("the restore"))
            self._gate.restored()
            # All ends of the group are complete now.
            self._hold.close()

    @contextlib.contextmanager
    def _streams(self) -> Iterator[_Streams]:
        """What replaces the tree's standard streams: what was asked for, and /dev/null where the
        other end stayed outside of the tree and nobody would read or write it.
        """
        asked = {0: self._options.stdin, 1: self._options.stdout, 2: self._options.stderr}
        streams = _Streams({n: fd for n, fd in asked.items() if fd is not None}, [])
        try:
            for each in self._known["stdio"]:
                number = int(each["fd"])
                if number in streams.by_number or not each["external"]:
                    continue
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                streams.owned.append(null)
                streams.by_number[number] = null
            yield streams
        finally:
            for descriptor in streams.owned:
                os.close(descriptor)
