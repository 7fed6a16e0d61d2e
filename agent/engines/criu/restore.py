"""The restore half: an image becomes a running tree again, in place or in namespaces of its own.

The images are laid out in a scratch folder, the memory as page files (``feed``), the job's own
files are put back, and CRIU builds the tree. Its ``post-restore`` notification is the gate: all
processes stand complete, none has run, connections are still locked.

Promises: everything in the way on this host has been reported, and everything of the image been
read and verified, before a process is started; where memory comes late, all other memory is
verified before one runs. A restore that fails leaves none of the tree and puts displaced files
back. Where a quicker way of bringing memory is what fails before the tree runs, a plainer one is
taken, the last of them CRIU's own; any other failure is told at once. A number that somebody had
only for a moment is tried again, once.
Does not: know where the bytes come from.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pycriu import rpc_pb2

from agent import errors
from agent.engines import ephemeral
from agent.engines.base import FilePolicy, Gate, RestoredTree, RestoreOptions
from agent.engines.criu import (
    conflicts,
    feed,
    filling,
    journal,
    lazy,
    log,
    mend,
    pour,
    recovery,
    robust,
    rpc,
    sites,
)
from agent.engines.criu.probe import Criu
from agent.host import clock, proc
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource

logger = logging.getLogger(__name__)

LOG = "restore.log"


class Site(Protocol):
    """Where a tree is restored, and how CRIU gets there. Made for one operation."""

    def entry(self) -> journal.About:
        """What the journal is to say of the operation besides the numbers taken."""

    def wired(self, images: str) -> AbstractContextManager[Mapping[str, int]]:
        """Edit the images in the folder for this place; gives the descriptors that replace what
        the tree had from outside, by CRIU's keys.
        """

    def held(self, operation: journal.Operation) -> AbstractContextManager[None]:
        """Keep the tree's connections silent."""

    def started(
        self, images: str, pass_fds: Sequence[int], operation: journal.Operation
    ) -> AbstractContextManager[tuple[rpc.Worker, str]]:
        """Start CRIU, ready for one request; gives its name for the folder ``images`` as well.
        Leaving it by an exception leaves nothing of what was started.
        """

    def configure(self, opts: rpc.Request) -> None:
        """Set the options of a restore that depend on the place."""

    def namespaces_made(self) -> None:
        """The root stands alone in the namespaces that CRIU makes, if it makes any; may raise."""

    def host_pid(self, number: int) -> int:
        """The number on this host of the process that has ``number`` in the image."""

    def complete(self, images: str) -> None:
        """The tree stands complete with its memory and has not run; may raise."""

    def settled(
        self, response: rpc.Response, worker: rpc.Worker, deadline: clock.Deadline
    ) -> RestoredTree:
        """The tree runs: let go of CRIU and hand it over."""

    def undo(self, places: journal.Places, operation: journal.Operation) -> None:
        """Leave nothing of what a failed restore made."""


def check(places: journal.Places, source: MemberSource, options: RestoreOptions) -> None:
    """Refuse what stands in the way; see ``agent.engines.base.Engine.check_restore``."""
    places.prepare()
    recovery.recover(places)
    known = source.facts()
    numbers = set() if options.isolate else conflicts.numbers(known)
    conflicts.wait_for_init(numbers)
    _refuse_conflicts(known, source, options)


def restore(
    criu: Criu,
    places: journal.Places,
    source: MemberSource,
    options: RestoreOptions,
    gate: Gate,
) -> RestoredTree:
    """Bring a tree back on this host; see ``agent.engines.base.Engine.restore``."""
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
    site: Site = (
        sites.Isolated(criu, known, options)
        if options.isolate
        else sites.InPlace(criu, known, options)
    )
    with (
        places.locked(proc.Identity(number, 0) for number in numbers),
        ephemeral.put_back(source, options.files, f".before-restore-{int(clock.wall_s())}"),
    ):
        return run(places, site, taken, source, known, options, gate, deadline)


def run(
    places: journal.Places,
    site: Site,
    taken: Sequence[proc.Identity],
    source: MemberSource,
    known: dict[str, Any],
    options: RestoreOptions,
    gate: Gate,
    deadline: clock.Deadline,
) -> RestoredTree:
    """Bring a tree back at ``site``; everything that may refuse has passed, files are in place.

    ``taken`` are the host's numbers that it will have, with the moment when they were free.
    """
    way = _Way.FIRST if options.fills is None else _Way.LATE
    again = True
    while True:
        with places.operation("restore", taken, about=site.entry()) as operation:
            running = _Restore(
                *(operation, places, site, source, known, options, gate, deadline), way
            )
            try:
                return running.run()
            except BaseException as exc:
                running.abandon()
                site.undo(places, operation)
                explained = running.explained(exc)
                plainer = running.plainer(explained)
                free = not any(proc.exists(who.pid) for who in taken)
                if plainer is None and again and free and running.collided(explained):
                    plainer, again = way, False
                if plainer is None:
                    if explained is exc:
                        raise
                    raise explained from exc
                how = "once more" if plainer is way else "another way"
                logger.warning("memory is restored %s: %s", how, explained)
                way = plainer
            finally:
                recovery.forget_gone_tables(places)


class _Way(enum.Enum):
    """How memory comes: what can when the tree runs, all of it into the standing tree, or through
    page files.
    """

    LATE = enum.auto()
    FIRST = enum.auto()
    FILES = enum.auto()


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


class _Restore:
    """One restore, from the request to the reply."""

    def __init__(
        self,
        operation: journal.Operation,
        places: journal.Places,
        site: Site,
        source: MemberSource,
        known: dict[str, Any],
        options: RestoreOptions,
        gate: Gate,
        deadline: clock.Deadline,
        way: _Way,
    ) -> None:
        self._operation = operation
        self._places = places
        self._site = site
        self._source = source
        self._options = options
        self._gate = gate
        self._deadline = deadline
        self._images = operation.folder("images")
        self._way = way
        self._feed = feed.Feed(
            source,
            known,
            self._images,
            pouring=way is not _Way.FILES,
            defer_bytes=options.fills.least_bytes if options.fills and way is _Way.LATE else None,
            parties=options.parties,
        )
        self._stands = False
        self._daemon: lazy.Daemon | None = None
        self._fill: filling.Fill | None = None
        self._hold = contextlib.ExitStack()
        self._criu_status: int | None = None

    def run(self) -> RestoredTree:
        """Do it."""
        with contextlib.closing(self._feed):
            return self._run()

    def _run(self) -> RestoredTree:
        self._feed.lay_out()
        mend.mend(self._images, accept_changed=self._options.accept_changed)
        # An end of a connection may be there before its peer, also of another member's tree.
        with self._site.wired(self._images) as inherit, self._hold:
            self._hold.enter_context(self._site.held(self._operation))
            if self._feed.deferred:
                self._daemon = lazy.Daemon(self._images)
            with (
                contextlib.ExitStack() as daemon,
                self._site.started(self._images, list(inherit.values()), self._operation) as (
                    worker,
                    folder,
                ),
            ):
                if self._daemon is not None:
                    daemon.callback(self._daemon.close)
                response = self._ask(worker, self._request(folder, inherit))
                tree = self._site.settled(response, worker, self._deadline)
                if self._fill is not None and self._options.fills is not None:
                    self._options.fills.add(self._fill)
                return tree

    def abandon(self) -> None:
        """It failed: nothing goes on by itself."""
        if self._daemon is not None:
            self._daemon.close()
        if self._fill is not None:
            self._fill.give_up()

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

    def plainer(self, failure: BaseException) -> _Way | None:
        """The way of bringing memory by which it may work, since this one is what failed; none once
        others count on this one.
        """
        if self._stands:
            return None
        if isinstance(failure, pour.PourRefused):
            return _Way.FILES if self._way is not _Way.FILES else None
        if not self._feed.deferred:
            return None
        # Where a CRIU crashed is not known; one that was killed would be killed again. Who was
        # interrupted meanwhile wants no other way.
        died = isinstance(failure, errors.CriuFailed) and self._criu_status is not None
        crashed = died and self._criu_status != 128 + signal.SIGKILL
        late = isinstance(failure, lazy.LateRefused) or log.blames_lazy_mode(failure)
        return _Way.FIRST if crashed or late else None

    def collided(self, failure: BaseException) -> bool:
        """Whether somebody had a number of the tree's, perhaps for a moment only: all of the host
        take numbers, also what CRIU itself starts.
        """
        return not self._stands and log.blames_numbers(failure)

    @property
    def _log_path(self) -> str:
        return os.path.join(self._images, LOG)

    def _ask(self, worker: rpc.Worker, request: rpc.Request) -> rpc.Response:
        try:
            response = worker.connection.request(request, self._on_stage, self._deadline)
        except rpc.Gone:
            self._criu_status = worker.end()
            raise
        return rpc.checked("restore", response, self._log_path)

    def _request(self, folder: str, inherit: Mapping[str, int]) -> rpc.Request:
        request = rpc_pb2.criu_req(type=rpc_pb2.RESTORE)
        opts = request.opts
        opts.images_dir_fd = -1
        opts.images_dir = folder
        opts.log_file = LOG
        opts.log_level = self._options.log_level
        opts.notify_scripts = True
        opts.ext_unix_sk = True
        opts.file_locks = True
        opts.link_remap = True
        opts.tcp_established = True
        opts.manage_cgroups = True
        opts.manage_cgroups_mode = rpc_pb2.IGNORE
        for key, descriptor in inherit.items():
            opts.inherit_fd.add(key=key, fd=descriptor)
        opts.lazy_pages = self._daemon is not None
        self._site.configure(opts)
        return request

    def _on_stage(self, stage: str, pid: int, descriptor: int | None) -> None:
        del pid
        if descriptor is not None:
            os.close(descriptor)
        if stage == "setup-namespaces":
            self._site.namespaces_made()
        elif stage == "post-restore":
            descriptors = self._daemon.take() if self._daemon is not None else {}
            try:
                self._write_memory(descriptors)
            finally:
                for each in descriptors.values():
                    os.close(each)
            self._site.complete(self._images)
            self._stands = True
            self._gate.restored()
            # All ends of the group are complete now.
            self._hold.close()
            self._gate.released()

    def _write_memory(self, descriptors: Mapping[int, int]) -> None:
        """All that must be there before the tree runs, and then whatever brings the rest."""
        deferred = self._feed.deferred
        for space in deferred:
            if space.id not in descriptors:
                raise lazy.LateRefused(
                    f"CRIU does not let process {space.id} wait for its memory",
                    hint="restore it with --eager",
                )
        for process in map(self._feed.process, descriptors):
            lazy.release(descriptors[process.pid], process)
        if deferred:
            # It takes about as long to start as what must be there takes to be written.
            self._fill = filling.Fill(
                self._places,
                self._source,
                deferred,
                {space: descriptors[space.id] for space in deferred},
                [proc.identity(self._site.host_pid(number)) for number in self._feed.numbers],
                self._options.deadline_s,
                self._options.parties,
            )
        self._feed.fill(self._site.host_pid, lambda: self._deadline.check("the restore"))
        if self._fill is None:
            return
        for space, each in deferred.items():
            pid = self._site.host_pid(space.id)
            self._bring_robust(space, each, pid)
            there = lazy.ask_for(descriptors[space.id], each, pid)
            self._feed.pour_early(space, there, pid)
        self._fill.begin()

    def _bring_robust(self, space: AddressSpace, deferred: lazy.Deferred, pid: int) -> None:
        """What the kernel looks at when threads end that hold robust futexes now."""
        asked = set()

        def ask(start: int, end: int) -> None:
            for page in range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1):
                if page not in asked:
                    asked.add(page)
                    self._deadline.check("the restore")
                    wanted = deferred.within(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
                    self._feed.pour_early(space, wanted, pid)

        robust.bring(self._feed.process(space.id).robust_lists, pid, ask)
