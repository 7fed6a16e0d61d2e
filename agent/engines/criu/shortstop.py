"""The short stop: memory is copied while the job runs, CRIU writes descriptions only, and what is
left is read beside it while the job stands still.

Promises: what a plain dump would have held at the freeze is what is settled, page by page; pages
that CRIU sends all the same go before our own copies of them. Everything ends with ``close``.
Does not: hold anything back; that is the sink's (``held``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from agent import errors
from agent.engines.base import CaptureOptions, Kept
from agent.engines.criu import codepages, hiding, pageserver, preflight
from agent.engines.criu.held import HeldSink
from agent.engines.criu.probe import Criu
from agent.engines.tracking import areas, reading, residue
from agent.engines.tracking.copies import Standing
from agent.engines.tracking.pace import UNLIMITED, Limits, Pace
from agent.engines.tracking.precopy import Precopy
from agent.engines.tracking.shared import Found
from agent.host import clock, layouts, pagemap, proc, threads
from agent.host.pagemap import Ranges
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink, PageRun

# Below this a plain dump stops a tree for no longer than the preparations take.
_SMALLEST_BYTES = 16 << 20
# In small mappings of a process, none of which are copied ahead.
_APART_BYTES = 3 << 20
# What is left for the stop of a tree that is followed.
_LEFT_BYTES = 16 << 20
# A tree whose mappings changed in the moment of the stop may do that all the time: so often it is
# then stopped a little longer, which costs less than a second stop, the plain way, each time.
_DOUBTED = 10


def unsuited(criu: Criu, pids: Sequence[int]) -> str:
    """Why a short stop is not to be tried; "" if it is."""
    if resident_bytes(pids) < _SMALLEST_BYTES:
        return "there is little memory"
    return hiding.usable(criu, pids)


def resident_bytes(pids: Sequence[int]) -> int:
    """How much memory, but that of files, these processes have."""
    found = 0
    for pid in pids:
        with contextlib.suppress(errors.NotFound):
            resident = proc.resident(pid)
            found += resident.anon + resident.shmem
    return found


def passed_over(kept: Kept | None, root: int) -> None:
    """The tree below ``root`` is captured the plain way: what is kept of it becomes good for the
    epoch that this makes.
    """
    part = kept.take(root) if kept else None
    if kept is None or part is None:
        return
    if isinstance(part, Precopy):
        part.forget_shared()
    kept.keep(root, part)


class ShortStop:
    """One capture's. ``ahead`` takes what is copied while the job runs, ``held`` the rest."""

    def __init__(
        self,
        root: int,
        ahead: MemberSink,
        held: HeldSink,
        deadline: clock.Deadline,
        options: CaptureOptions,
    ) -> None:
        self._root = root
        self._held = held
        self._deadline = deadline
        self._kept = kept = options.kept
        # Who is to end has no speed to keep, and is often in a hurry.
        limits = Limits(options.precopy_cpu_percent, options.precopy_bytes_per_s)
        self._pace = pace = Pace(root, UNLIMITED if options.kill else limits, deadline)
        with contextlib.ExitStack() as stack:
            taken_up = _taken_up(kept, root, ahead, deadline, pace)
            self._precopy = taken_up or Precopy(ahead, deadline, pace)
            stack.callback(self._precopy.close)
            self._hiding = hiding.Hiding()
            stack.pop_all()
        # Who is to end is stopped for longer in any case; but a CRIU that looks at each page for
        # itself cannot be told of mappings, only of whole processes.
        self._kill = options.kill
        asked = options.kill and pagemap.scans()
        doubted = kept is not None and kept.doubted(root)
        self._layouts = None if asked or doubted else layouts.Layouts()
        self._code = codepages.CodePages()
        self._found: dict[int, layouts.Layout] = {}
        # Worked out before the stop, for who changes nothing of its mappings until then.
        self._ahead: dict[int, tuple[layouts.Layout, residue.Parts | None]] = {}
        self._parts: dict[AddressSpace, residue.Parts] = {}
        self._residue: dict[AddressSpace, Ranges] = {}
        self._residue_read_bytes = 0
        self._sent: dict[AddressSpace, list[PageRun]] = {}
        self._pids: Sequence[int] = ()
        self._standing: list[Standing] = []
        self._shared: list[Found] = []
        self._shared_spaces: frozenset[AddressSpace] = frozenset()
        self._failure: BaseException | None = None
        self._let_go = True
        self._reader = threading.Thread(target=self._read, name="cut", daemon=True)

    @property
    def descriptor(self) -> int:
        """What CRIU must inherit."""
        return self._hiding.descriptor

    @property
    def expected_bytes(self) -> int:
        """How much is likely to be left for the stop."""
        return _LEFT_BYTES + self._precopy.expected_bytes + _APART_BYTES * self._precopy.processes

    @property
    def under(self) -> list[str]:
        """What CRIU must be started by."""
        return self._hiding.under

    @property
    def knows_flags(self) -> bool:
        """Whether the flags of the tree's mappings are looked at before the stop; who has them that
        cannot be captured is then refused (``preflight.refuse_filled``).
        """
        return self._layouts is not None

    def copy_ahead(self) -> None:
        """Copy the tree, which runs; then be ready for CRIU to start."""
        self._precopy.run(self._root)
        self._hiding.start()

    def started(self) -> None:
        """CRIU has been started."""
        self._hiding.release()

    def about_to_freeze(self) -> None:
        """Copy once more what was written meanwhile, if that leaves less: into what holds it back,
        since the store takes longer to take it in than the tree to write as much again.
        """
        self._held.renew(self._check)
        self._precopy.look(self._root)
        if not self._kill:
            self._held.hold()
        self._precopy.last_rounds(self._root, self._held, self._note_layouts)
        if self._held.overflowed:
            # What the stop holds would go to memory that nobody has touched.
            self._held.renew(self._check)
            self._held.hold()
            # That took long; what was seen before may have changed.
            self._note_layouts()
            self._precopy.round(self._root, into=self._held)

    def _note_layouts(self) -> None:
        pids = proc.tree(self._root)
        self._hiding.only(areas.private_id(pids[0]) if len(pids) == 1 else None)
        if self._layouts is not None:
            self._layouts.note(pids)
            for pid in pids:
                layout = self._layouts.noted(pid)
                if layout is not None:
                    preflight.refuse_filled(pid, layout.flags)
                    self._ahead[pid] = layout, _private(layout)

    def _check(self) -> None:
        self._deadline.check("the dump")

    def frozen(self, pids: Sequence[int], code: codepages.CodePages) -> None:
        """The tree, now ``pids``, stands still: hide its memory from CRIU and read what is left,
        with ``code`` as it is now, while CRIU goes on.
        """
        self._pids = pids
        self._code = code
        # CRIU looks at the whole machine first, and asks for the tree's memory only then.
        self._hiding.expect()
        threads.start(self._reader)

    def mappings(self, pid: int) -> Sequence[proc.Mapping]:
        """Those that the process has in the stop; raises errors.NotFound."""
        self._hiding.wait()
        found = self._found.get(pid)
        return proc.maps(pid) if found is None else found.mappings

    def _hide(self) -> None:
        try:
            self._standing = self._precopy.cut(self._pids, self._mappings)
            self._shared = self._precopy.cut_shared(self._pids)
            self._shared_spaces = frozenset(each.space for each in self._shared)
            self._hiding.hide(self._standing, self._shared, self._whole())
        finally:
            self._hiding.told()

    def _mappings(self, pid: int) -> Sequence[proc.Mapping]:
        if self._layouts is None:
            return proc.maps(pid)
        if self._kill:
            self._layouts.note([pid])  # nobody can look afterwards
        self._found[pid] = layout = self._layouts.now(pid)
        return layout.mappings

    def _residue_of(self, pid: int, layout: layouts.Layout) -> residue.Parts | None:
        before, parts = self._ahead.get(pid, (None, None))
        return parts if layout is before else _private(layout)

    def _whole(self) -> dict[int, bytes]:
        """The smaps of processes all of whose private memory is read here."""
        found = {}
        for each in self._standing:
            layout = self._found.get(each.who.pid)
            if layout is None:
                continue
            if layout.smaps is not None and (parts := self._residue_of(each.who.pid, layout)):
                self._parts[each.space] = parts
                found[each.space.id] = layout.smaps
        return found

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        """Take pages that CRIU sent."""
        if not self._ours(space):
            self._held.pages(space, run, data)
            return
        self._sent.setdefault(space, []).append(run)
        self._held.draft(space, [run], data)

    def finish(self) -> None:
        """Wait until everything that is left has been read.

        Raises:
            errors.ShortStopFailed: it could not be.
            errors.VolumeError: from the sink.
        """
        self._reader.join(self._deadline.remaining_s)
        if self._reader.is_alive():
            raise errors.DeadlineExceeded("the memory of the tree was not read in time")
        if self._failure is not None:
            raise self._failure

    def keep_pace(self) -> None:
        """Wait until more may be stored: the tree runs again."""
        self._pace.wait(0)

    def settle(self, spaces: Sequence[AddressSpace]) -> int:
        """Settle those of ``spaces`` that are copied here, when everything is in the sink; say how
        many bytes are not CRIU's.
        """
        ours = [space for space in spaces if self._ours(space)]
        residue_bytes = 0
        for space, pages in self._residue.items():
            sent = self._sent.get(space, [])
            more = _besides(sent, pages)
            residue_bytes += sum(run.pages for run in more) * PAGE_BYTES
            self._sent[space] = sorted(sent + more, key=lambda run: run.address)
        return residue_bytes + self._precopy.settle(ours, self._sent, pageserver.PE_PRESENT)

    def confirm(self) -> None:
        """Be sure that what CRIU was told is what it would have been told; the tree runs again.

        Raises:
            errors.ShortStopFailed: it may be something else.
        """
        changed = [] if self._layouts is None else self._layouts.changed()
        if changed:
            if self._kept is not None:
                self._kept.doubt(self._root, _DOUBTED)
            raise errors.ShortStopFailed(
                f"the mappings of process {changed[0]} changed while it was being stopped",
                pid=changed[0],
            )

    def facts(self) -> dict[str, Any]:
        """How it went."""
        return {
            "tracked": self._precopy.kinds,
            "untracked_because": self._precopy.reasons,
            "unread_because": self._precopy.unread_because,
            "rounds": [[each.read_bytes, round(each.took_s, 4)] for each in self._precopy.rounds],
            "held_back_s": round(self._pace.held_back_s, 3),
            "hurried": self._pace.hurried,
            "read_at_cut_bytes": self._precopy.cut_bytes + self._residue_read_bytes,
            "shared_objects": len(self._shared),
            "shared_read_at_cut_bytes": self._precopy.shared_bytes,
            "hidden_from_criu": self._hiding.answered,
        }

    def done(self) -> None:
        """It went well: the next capture may go on from here."""
        if self._kept is not None:
            self._kept.keep(self._root, self._precopy)
            self._let_go = False

    def close(self) -> None:
        """End it; waits for the reader, which ends soon once the sink fails or the tree runs."""
        if self._reader.is_alive():
            self._reader.join()
        try:
            if self._let_go:
                self._precopy.close()
        finally:
            self._hiding.close()

    def _ours(self, space: AddressSpace) -> bool:
        if space.kind == "process":
            return True
        self._hiding.wait()
        return space in self._shared_spaces

    def _read_residue(self) -> None:
        sink = self._code.drafts(self._held)
        for each in self._standing:
            if each.space in self._parts:
                pages = residue.pages(each.who.pid, self._parts[each.space])
                self._residue_read_bytes += reading.whole(
                    each.who, each.space, pages, sink, self._precopy.room
                )
                self._residue[each.space] = pages

    def _read(self) -> None:
        try:
            self._hide()
            self._precopy.finish_shared(self._shared, self._held)
            self._precopy.finish(self._standing, self._held)
            self._read_residue()
        except BaseException as exc:  # noqa: BLE001 - carried to the thread that asks, by finish
            self._failure = exc


def _private(layout: layouts.Layout) -> residue.Parts | None:
    """The private memory that is not copied ahead."""
    return residue.parts(layout, areas.eligible_of(layout.mappings))


def _besides(sent: list[PageRun], pages: Ranges) -> list[PageRun]:
    """What of ``pages`` CRIU has not sent."""
    rows = [(run.address, run.address + run.pages * PAGE_BYTES) for run in sent]
    own = pagemap.without(pages, np.array(rows, dtype=np.int64).reshape(-1, 2))
    return [
        PageRun(start, (end - start) // PAGE_BYTES, pageserver.PE_PRESENT)
        for start, end in own.tolist()
    ]


def _taken_up(
    kept: Kept | None, root: int, sink: MemberSink, deadline: clock.Deadline, pace: Pace
) -> Precopy | None:
    """The copy of the capture before, ready for another one."""
    part = kept.take(root) if kept else None
    if kept is None or part is None:
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(part.close)
        if not isinstance(part, Precopy) or not kept.epoch:
            return None
        part.begin(sink, deadline, kept.epoch, pace)
        stack.pop_all()
        return part
