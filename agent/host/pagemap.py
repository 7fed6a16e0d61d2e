"""Which pages a process has, and which of them it wrote: PAGEMAP_SCAN and write protection.

Before Linux 6.7 there is neither: which pages a process has is read page by page then
(``pageentries``), and all of them count as written.

A userfaultfd of the process with asynchronous write protection lets the kernel itself note the
first write to a page after each reset, without asking anybody (Linux 6.7). A *range* is a row of
``start, end`` addresses; ranges are ascending and do not overlap.

Promises: ``take`` returns every page that was written since it was last returned, and protects
exactly those in the same step, so that no write is lost between looking and resetting. Dropping the
descriptor, by ``close`` or by death, removes all protection, unless another process holds it too.
Does not: see writes that do not go through the page table: by devices into pages that they pinned,
or to a file or shared memory by another way than this mapping.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.host import pageentries

Ranges = npt.NDArray[np.int64]

PAGE_BYTES = 4096

# linux/userfaultfd.h
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_API = 0xAA
_EVENT_REMAP, _WP_UNPOPULATED, _WP_ASYNC = 1 << 2, 1 << 13, 1 << 15
_MODE_WP = 2
# linux/fs.h
_PAGEMAP_SCAN = 0xC0606610
_WP_MATCHING = 1
_WPALLOWED, _WRITTEN, _FILE, _PRESENT, _SWAPPED, _PFNZERO = 1, 2, 4, 8, 16, 32
_GUARD = 1 << 8  # Linux 6.15; older kernels have no guard pages and refuse the bit
_REGIONS = 1 << 15
# The process cannot map or unmap while a piece is looked at, or while so much, in which page tables
# may have been left, is searched for something that is there.
_PIECE_BYTES, _SEARCHED_BYTES = 256 << 20, 4 << 30


def none() -> Ranges:
    """No ranges."""
    return np.empty((0, 2), dtype=np.int64)


class Pagemap:
    """The pages of the address space that ``pid`` has now; it goes on naming that address space
    when the process executes another program.

    Every method raises ``errors.NotFound`` if the process has ended.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as exc:
            raise errors.NotFound(f"there is no process {pid}", pid=pid) from exc
        self._regions = np.empty((_REGIONS, 3), dtype=np.uint64)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def take(self, start: int, end: int) -> Ranges:
        """Pages written since they were last taken; they are protected again. Only of registered
        mappings.
        """
        return self._scan(
            self.pieces(start, end),
            flags=_WP_MATCHING,
            mask=_WRITTEN,
            any_of=_PRESENT | _SWAPPED,
        )[:, :2]

    def unguarded(self, start: int, end: int) -> Ranges:
        """Pages that are there, in mappings whose writes are not noted."""
        return self._scan(
            self.pieces(start, end),
            inverted=_WPALLOWED,
            mask=_WPALLOWED,
            any_of=_PRESENT | _SWAPPED,
        )[:, :2]

    def guarded(self, start: int, end: int) -> bool:
        """Whether writes to this one mapping are noted."""
        found = self._look(start, min(end, start + _PIECE_BYTES), mask=_WPALLOWED, most_pages=1)
        return len(found) > 0

    def pieces(self, start: int, end: int, most_bytes: int = _PIECE_BYTES) -> Ranges:
        """Parts of at most ``most_bytes`` outside which nothing was there a moment ago: programs
        reserve a thousand times what they ever use.
        """
        rows = []
        while start < end:
            if end - start > most_bytes and scans():
                until = min(end, start + _SEARCHED_BYTES)
                there = self._look(start, until, any_of=_PRESENT | _SWAPPED, most_pages=1)
                if not len(there):
                    start = until
                    continue
                start = int(there[0, 0])
            rows.append((start, min(end, start + most_bytes)))
            start += most_bytes
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def occupied(self, start: int, end: int) -> Ranges:
        """Pages that no fault would ask for: mapped, the kernel's zero page included, or swapped
        out.
        """
        return self._scan(self.pieces(start, end), any_of=_PRESENT | _SWAPPED)[:, :2]

    def existing(self, start: int, end: int) -> Ranges:
        """Pages that hold something: mapped or swapped out, but neither the kernel's zero page nor
        a guard.
        """
        return self._states(start, end, 0)[0]

    def existing_and_written(self, start: int, end: int) -> tuple[Ranges, Ranges]:
        """What ``existing`` says, and what ``take`` would without protecting anything; of mappings
        that are not registered, all pages. One look is most of what both take.
        """
        return self._states(start, end, _WRITTEN)

    def _states(self, start: int, end: int, written: int) -> tuple[Ranges, Ranges]:
        # Few runs of pages are missing or written, so looking for those is quicker than listing
        # what is there with its state.
        guard = _GUARD if knows_guards() else 0
        pieces = self.pieces(start, end)
        found = self._scan(
            pieces,
            inverted=_PRESENT,
            any_of=_PRESENT | _PFNZERO | guard | written,
            returned=_PRESENT | _SWAPPED | _PFNZERO | guard | written,
        )
        kind = found[:, 2]
        there = kind & (_PRESENT | _SWAPPED) != 0
        gone = found[~there | (kind & (_PFNZERO | guard) != 0)]
        existing = without(union(pieces), gone[:, :2])
        return existing, found[there & (kind & written != 0)][:, :2]

    def own(self, start: int, end: int) -> Ranges:
        """As ``existing``, without the pages that are a file's or shared memory's. Takes longer
        where there are many.
        """
        others = _FILE | _PFNZERO
        guard = _GUARD if knows_guards() else 0
        found = self._scan(
            self.pieces(start, end),
            inverted=others,
            mask=others,
            any_of=_PRESENT | _SWAPPED,
            returned=guard,
        )
        kept: Ranges = found[found[:, 2] & guard == 0][:, :2]
        return kept

    def _scan(self, pieces: Ranges, **asked: int) -> Ranges:
        """As ``_look``, of all of these."""
        found = [self._look(start, end, **asked) for start, end in pieces.tolist()]
        return np.concatenate(found) if found else np.empty((0, 3), dtype=np.int64)

    def _look(
        self,
        start: int,
        end: int,
        *,
        flags: int = 0,
        inverted: int = 0,
        mask: int = 0,
        any_of: int = 0,
        returned: int = 0,
        most_pages: int = 0,
    ) -> Ranges:
        """Ranges and their categories, shape (n, 3)."""
        if not scans():
            try:
                return pageentries.scan(self._fd, start, end, inverted, mask, any_of, returned)
            except ProcessLookupError as exc:
                raise errors.NotFound("the process has ended", pid=self._pid) from exc
        found = []
        while start < end:
            # struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages,
            # category_inverted, category_mask, category_anyof_mask, return_mask.
            argument = bytearray(
                struct.pack(
                    "=12Q",
                    *(96, flags, start, end, 0, self._regions.ctypes.data, _REGIONS, most_pages),
                    *(inverted, mask, any_of, returned),
                )
            )
            try:
                count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
            except ProcessLookupError as exc:
                raise errors.NotFound("the process has ended", pid=self._pid) from exc
            if count:
                found.append(self._regions[:count].astype(np.int64))
            if most_pages and count:
                break
            # walk_end is not to be believed once everything was walked (seen on Linux 6.18).
            full = count == _REGIONS
            start = int(struct.unpack_from("=Q", argument, 32)[0]) if full else end
        return np.concatenate(found) if found else np.empty((0, 3), dtype=np.int64)


def notes_writes(pid: int, number: int) -> bool:
    """Whether this descriptor of a process is a userfaultfd that was asked for asynchronous write
    protection; raises ``FileNotFoundError`` if it has been closed.
    """
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as info:
        for line in info:
            key, _, value = line.partition(":")
            if key == "API":  # the version, the features and the ioctls
                return bool(int(value.split(":")[1], 16) & _WP_ASYNC)
    return False


def existing(pid: int, areas: Ranges) -> Ranges:
    """What ``Pagemap.existing`` says of each of these mappings; raises as that."""
    pages = Pagemap(pid)
    try:
        parts = [pages.existing(start, end) for start, end in areas.tolist()]
    finally:
        pages.close()
    return np.concatenate([none(), *parts])


class WriteProtection:
    """Asynchronous write protection by ``descriptor``, a fresh userfaultfd, which it then owns.
    Somebody must read what it tells of moved mappings (``moves.Moves``): who moves one waits for
    that.

    Raises:
        errors.EnvironmentUnfit: this kernel does not know it.
    """

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor
        request = bytearray(
            struct.pack("=QQQ", _API, _WP_ASYNC | _WP_UNPOPULATED | _EVENT_REMAP, 0)
        )
        try:
            fcntl.ioctl(self._fd, _UFFDIO_API, request)
        except OSError as exc:
            self.close()
            raise errors.EnvironmentUnfit(
                "this kernel cannot note writes to memory by itself",
                hint="Linux 6.7 or newer can, with CONFIG_HAVE_ARCH_USERFAULTFD_WP",
            ) from exc

    def register(self, start: int, end: int) -> bool:
        """Have writes to a mapping noted; False if that cannot be. Again: a no-op."""
        try:
            fcntl.ioctl(
                self._fd,
                _UFFDIO_REGISTER,
                bytearray(struct.pack("=QQQQ", start, end - start, _MODE_WP, 0)),
            )
        except OSError:
            return False  # gone, of another kind, or somebody else's
        return True

    def unregister(self, start: int, end: int) -> bool:
        """No more of that between these addresses, whoever else holds the descriptor; False if it
        cannot be.
        """
        # Linux does nothing where one mapping has never been registered and cannot be asked about
        # faults (of a file, come meanwhile); and older kernels would take another descriptor's.
        if not self.register(start, end):
            return False
        try:
            fcntl.ioctl(
                self._fd,
                _UFFDIO_UNREGISTER,
                bytearray(struct.pack("=QQ", start, end - start)),
            )
        except OSError:
            return False  # it has changed in between
        return True

    def close(self) -> None:
        """Drop our descriptor, and with the last one all of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@functools.cache
def scans() -> bool:
    """Whether this kernel knows PAGEMAP_SCAN."""
    argument = bytearray(struct.pack("=12Q", 96, 0, 0, PAGE_BYTES, 0, 0, 0, 0, 0, 0, 0, 0))
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _PAGEMAP_SCAN, argument)
    except OSError as exc:
        return exc.errno != errno.ENOTTY
    else:
        return True
    finally:
        os.close(descriptor)


@functools.cache
def knows_guards() -> bool:
    """Whether this kernel has guard pages."""
    if not scans():
        return False
    own = Pagemap(os.getpid())
    try:
        own._look(0, PAGE_BYTES, any_of=_GUARD)
    except OSError:
        return False
    else:
        return True
    finally:
        own.close()


def clip(ranges: Ranges, within: Ranges) -> Ranges:
    """The parts of ``ranges`` that lie in ``within``."""
    first = np.searchsorted(within[:, 1], ranges[:, 0], side="right")
    last = np.searchsorted(within[:, 0], ranges[:, 1], side="left")
    count = np.maximum(last - first, 0)
    of = np.repeat(np.arange(len(ranges)), count)
    inner = (
        np.repeat(first, count)
        + np.arange(int(count.sum()))
        - np.repeat(np.cumsum(count) - count, count)
    )
    return np.stack(
        [
            np.maximum(ranges[of, 0], within[inner, 0]),
            np.minimum(ranges[of, 1], within[inner, 1]),
        ],
        axis=1,
    )


def without(ranges: Ranges, holes: Ranges) -> Ranges:
    """``ranges`` less ``holes``."""
    if not len(ranges) or not len(holes):
        return ranges
    low, high = int(min(ranges[0, 0], holes[0, 0])), int(max(ranges[-1, 1], holes[-1, 1]))
    starts = np.concatenate(([low], holes[:, 1]))
    ends = np.concatenate((holes[:, 0], [high]))
    kept = np.stack([starts, ends], axis=1)
    return clip(ranges, kept[kept[:, 0] < kept[:, 1]])


def union(*parts: Ranges) -> Ranges:
    """All of the parts' pages, neighbours joined."""
    both = np.concatenate(parts)
    if not len(both):
        return none()
    both = both[np.argsort(both[:, 0], kind="stable")]
    reach = np.maximum.accumulate(both[:, 1])
    heads = np.concatenate(([True], both[1:, 0] > reach[:-1]))
    at = np.flatnonzero(heads)
    return np.stack([both[at, 0], np.append(reach[at[1:] - 1], reach[-1])], axis=1)


def size_bytes(ranges: Ranges) -> int:
    """How many bytes the ranges hold."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())
