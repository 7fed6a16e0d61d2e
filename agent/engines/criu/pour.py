"""Pouring memory into a restored tree that stands complete but has not run yet.

CRIU copies pages from files in one thread, after somebody has written those files. Where it can,
the agent leaves these pages out of the images and, in CRIU's ``post-restore`` notification, writes
them itself from the store's blocks, in parallel: no pages on disk, no second copy; and the tree
runs only when all of it is in.

Promises: ``split`` is pure, and gives every page to exactly one of the two ways; what is poured
cannot be seen or changed by CRIU or the kernel between ``post-restore`` and the first instruction.
Does not: pour shared memory, pages that parent and child may share by copy-on-write (only CRIU can
make them shared again), the kernel's own mappings, nor the pages that hold a thread's ``rseq``
area, which the kernel writes to as soon as CRIU has registered it.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures

from agent import errors
from agent.host import standing
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun

# criu/include/image.h: bits of vma_entry.status.
_VSYSCALL, _VDSO, _FILE_PRIVATE, _ANON_PRIVATE = 1 << 2, 1 << 3, 1 << 6, 1 << 9
_VVAR, _AIORING, _SHADOW_STACK, _UPROBES, _PLUGIN = 1 << 12, 1 << 13, 1 << 15, 1 << 17, 1 << 27
_PRIVATE = _FILE_PRIVATE | _ANON_PRIVATE
_KERNELS_OWN = _VSYSCALL | _VDSO | _VVAR | _AIORING | _SHADOW_STACK | _UPROBES | _PLUGIN
# include/uapi/asm-generic/mman.h
_MAP_HUGETLB = 0x40000
# Where pages belong, what they hold (None: zero), how many, and whether it is zero there already.
Piece = tuple[int, memoryview | None, int, bool]

# What one thread takes at a time (32 MiB), and how many threads: each holds up to 34 MiB of blocks
# and pages (store/blocks.Limits), and the agent stays below 256 MiB.
_PART_PAGES, _THREADS = 8192, 3


@dataclasses.dataclass(frozen=True)
class Area:
    """One mapping of a process as its image describes it (mm.img); ``advice`` has the bit of each
    ``madvise`` that holds for it.
    """

    start: int
    end: int
    status: int
    flags: int
    offset: int
    shmid: int
    advice: int = 0


@dataclasses.dataclass(frozen=True)
class ProcessMemory:
    """What ``split`` needs to know of one process. ``parent`` is a pid of the tree or 0;
    ``rseq_addresses`` are those of its threads' registered rseq areas, ``early_addresses`` what the
    kernel reads and writes when a thread ends, when it can wait for no page any more; of these,
    ``robust_lists`` are the heads of the threads' lists of robust futexes.
    """

    pid: int
    parent: int
    areas: tuple[Area, ...]
    rseq_addresses: tuple[int, ...]
    early_addresses: tuple[int, ...] = ()
    robust_lists: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Split:
    """The runs of one address space, by who restores them. ``poured_fresh`` lie in memory that
    is zero until it is written, so that zero pages there cost nothing.
    """

    criu: tuple[PageRun, ...]
    poured: tuple[PageRun, ...]
    poured_fresh: tuple[PageRun, ...]

    @property
    def poured_bytes(self) -> int:
        """How much is poured."""
        return sum(run.pages for run in (*self.poured, *self.poured_fresh)) * PAGE_BYTES


def split(
    process: ProcessMemory, family: dict[int, ProcessMemory], runs: Sequence[PageRun]
) -> Split:
    """Share out ``runs`` (ascending) of a process; ``family`` is the whole tree by pid."""
    shared = _inherited(process, family)
    areas = sorted(map(_key, process.areas), key=lambda item: item[0])
    starts = [start for start, _, _ in areas]
    criu: list[PageRun] = []
    poured: list[PageRun] = []
    fresh: list[PageRun] = []
    held = {address // PAGE_BYTES * PAGE_BYTES for address in process.rseq_addresses}
    held_sorted = sorted(held)
    for run in runs:
        at, end = run.address, run.address + run.pages * PAGE_BYTES
        while at < end:
            index = bisect.bisect_right(starts, at) - 1
            area = areas[index][2] if index >= 0 and at < areas[index][1] else None
            if area is not None:
                stop = min(end, area.end)
            else:
                # A page outside every mapping is CRIU's to refuse.
                stop = min(end, starts[index + 1]) if index + 1 < len(starts) else end
            into = criu
            if area is not None and area not in shared and _can_pour(area):
                into = fresh if area.status & _ANON_PRIVATE else poured
            next_held = bisect.bisect_left(held_sorted, at)
            if into is not criu and next_held < len(held_sorted) and held_sorted[next_held] < stop:
                page = held_sorted[next_held]
                if page == at:
                    stop, into = at + PAGE_BYTES, criu
                else:
                    stop = page
            into.append(PageRun(at, (stop - at) // PAGE_BYTES, run.flags))
            at = stop
    return Split(tuple(criu), tuple(poured), tuple(fresh))


def pour(
    source: MemberSource,
    space: AddressSpace,
    share: Split,
    pid: int,
    check: Callable[[], None],
) -> int:
    """Write the poured runs of ``space`` into the process ``pid``, which stands still; return the
    bytes written. ``check`` is called between pieces and may raise.

    Raises:
        errors.Corrupt | errors.Missing: the image is damaged after all.
        errors.RestoreFailed: the kernel refuses the write (code ``pour-refused``); CRIU's own way
            still works.
    """
    return write(pieces(source, space, share), pid, check)


def pieces(source: MemberSource, space: AddressSpace, share: Split) -> Iterator[Piece]:
    """Read the poured runs of ``space``; raises as ``MemberSource.read``."""
    for runs, fresh in ((share.poured, False), (share.poured_fresh, True)):
        if runs:
            for address, data, pages in source.read(space, runs):
                yield address, data, pages, fresh


def write(found: Iterable[Piece], pid: int, check: Callable[[], None]) -> int:
    """Write what was found into the process ``pid``; as ``pour``."""
    written = 0
    with _understood(pid):
        memory = standing.StandingMemory(pid)
    with memory:
        for address, data, pages, fresh in found:
            check()
            with _understood(pid):
                if data is not None:
                    memory.write(address, data)
                elif not fresh:
                    for page in range(pages):
                        memory.write(address + page * PAGE_BYTES, _ZERO_PAGE)
                else:
                    continue
            written += pages * PAGE_BYTES
    return written


def pour_all(
    source: MemberSource,
    shares: Mapping[AddressSpace, Split],
    pids: Mapping[AddressSpace, int],
    check: Callable[[], None],
    parties: int = 1,
) -> int:
    """Pour all of these, each into its process, in parallel: each thread reads, verifies and writes
    what it has taken. ``check`` is called from each of them; ``parties`` members are restored at
    the same time. Raises as ``pour``.
    """
    jobs = collections.deque(
        (space, part) for space, share in shares.items() for part in _parts(share)
    )
    if len(jobs) == 1:
        return pour(source, *jobs[0], pids[jobs[0][0]], check)

    def work(own: MemberSource) -> int:
        written = 0
        try:
            while True:
                try:
                    space, part = jobs.popleft()
                except IndexError:
                    return written
                written += pour(own, space, part, pids[space], check)
        except BaseException:
            jobs.clear()
            raise

    most = min(max(1, _THREADS // parties), len(jobs), len(os.sched_getaffinity(0)))
    with futures.ThreadPoolExecutor(max(1, most), "pour") as pool:
        done = [pool.submit(work, source.beside()) for _ in range(most)]
    return sum(each.result() for each in done)


def _parts(share: Split) -> Iterator[Split]:
    """A share in pieces for one thread each."""
    for fresh in (False, True):
        part: list[PageRun] = []
        room = _PART_PAGES
        for run in share.poured_fresh if fresh else share.poured:
            address, left = run.address, run.pages
            while left:
                pages = min(left, room)
                part.append(PageRun(address, pages, run.flags))
                address, left, room = address + pages * PAGE_BYTES, left - pages, room - pages
                if not room:
                    yield Split((), () if fresh else tuple(part), tuple(part) if fresh else ())
                    part, room = [], _PART_PAGES
        if part:
            yield Split((), () if fresh else tuple(part), tuple(part) if fresh else ())


_ZERO_PAGE = memoryview(bytes(PAGE_BYTES))


class PourRefused(errors.RestoreFailed):
    """The kernel does not let the agent write the tree's memory (proc_mem.force_override)."""

    code = "pour-refused"


@contextlib.contextmanager
def _understood(pid: int) -> Iterator[None]:
    """Foreign errors become ours."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise errors.RestoreFailed(
            "a process ended while its memory was being restored", hint="try again"
        ) from exc
    except OSError as exc:
        raise PourRefused(
            f"cannot write restored memory of process {pid}: {exc.strerror}", pid=pid
        ) from exc


def _key(area: Area) -> tuple[int, int, Area]:
    return (area.start, area.end, area)


def _can_pour(area: Area) -> bool:
    return bool(
        area.status & _PRIVATE and not area.status & _KERNELS_OWN and not area.flags & _MAP_HUGETLB
    )


def anonymous(area: Area) -> bool:
    """Whether it is private memory of no file that may be poured."""
    return _can_pour(area) and bool(area.status & _ANON_PRIVATE)


def _inherited(process: ProcessMemory, family: dict[int, ProcessMemory]) -> set[Area]:
    """Mappings that a parent or child has too, alike: CRIU restores them as shared by
    copy-on-write where the pages still are equal (criu/mem.c, prepare_cow_vmas).
    """
    kin = [other for other in family.values() if other.parent == process.pid]
    if process.parent in family:
        kin.append(family[process.parent])
    alike = {_alike(area) for other in kin for area in other.areas}
    return {area for area in process.areas if _alike(area) in alike}


def _alike(area: Area) -> tuple[int, int, int, int]:
    return (area.start, area.end, area.offset, area.shmid)
