"""Which mappings of a process are copied by the agent itself, and by what its writes can escape.

Promises: only memory that belongs to one process and to no file: what is shared or backed by a
file can change without the process's page table showing it.
Does not: read memory; know of other processes that write to this one (``quiet``), nor of an
io_uring that has neither a descriptor nor a mapping.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable

import numpy as np

from agent import errors
from agent.engines.tracking.directly import Directly
from agent.host import descriptors, proc
from agent.host.pagemap import Ranges
from agent.model import gpus

# Below this, CRIU's own way costs less than one more question about a mapping.
SMALLEST_BYTES = 1 << 20
# Below it nothing can be mapped (vm.mmap_min_addr).
_LOWEST = 1 << 16
# Descriptors through which devices or the kernel write into pages that they have pinned.
_WRITERS = (
    *("anon_inode:[io_uring]", "anon_inode:[infiniband", "/dev/infiniband/", "/dev/vfio/"),
    *gpus.DEVICES,
)


def eligible(pid: int) -> Ranges:
    """The large private anonymous mappings that hold no program: one row each.

    Raises:
        errors.NotFound: the process has ended.
    """
    return eligible_of(proc.maps(pid))


def eligible_of(mappings: Iterable[proc.Mapping]) -> Ranges:
    """As ``eligible``, of a process that has these mappings."""
    return _ranges(
        (each.start, each.end)
        for each in mappings
        if _anonymous(each)
        and each.end - each.start >= SMALLEST_BYTES
        # CRIU works in executable mappings of the process itself.
        and "x" not in each.perms
    )


def spans(pid: int) -> Ranges:
    """Where there are private mappings and nothing else, holes included: each span is as large as
    can be, and ends where a process hardly ever changes its mappings.

    What tracks some of them must track all, and take them on in one step: the kernel does not join
    neighbours that differ in being tracked, and a process may rely on its mapping being one
    (mremap), or on their number staying small (a compiler that protects what it wrote). Mappings
    may come, move and go between looking and taking on; the ends of a span then cut none.

    Raises:
        errors.NotFound: the process has ended.
    """
    rows: list[tuple[int, int]] = []
    start, last = _LOWEST, 0
    for each in proc.maps(pid):
        if _takes_part(each):
            last = each.end
            continue
        if last > start:
            # A stack grows down into the hole before it.
            rows.append((start, last if each.path == "[stack]" else each.start))
        start = each.end
    if last > start:
        rows.append((start, last))
    return _ranges(rows)


def _takes_part(mapping: proc.Mapping) -> bool:
    if mapping.perms[3] != "p" or mapping.path.startswith("/dev/"):
        return False
    return not mapping.path.startswith("[") or _anonymous(mapping)


def _anonymous(mapping: proc.Mapping) -> bool:
    named = mapping.path in ("", "[heap]") or mapping.path.startswith("[anon:")
    return mapping.perms[3] == "p" and not mapping.inode and named


def _ranges(rows: Iterable[tuple[int, int]]) -> Ranges:
    return np.array(list(rows), dtype=np.int64).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class Escapes:
    """By what pages of a process may change without a write through its page table. ``reason``: by
    devices and kernel threads that work on pages pinned before, at any time; "" if by none.
    ``direct``: by reads past the page cache, while they last: by O_DIRECT, or as their file system
    likes.
    """

    reason: str
    direct: bool = False


def escapes(pid: int) -> Escapes:
    """What there is of it now.

    Raises:
        errors.NotFound: the process has ended.
    """
    if proc.pinned_bytes(pid):
        return Escapes("it has memory pinned for a device")
    if any(each.path == "/[aio]" for each in proc.maps(pid)):
        return Escapes("it uses asynchronous I/O")
    if descriptors.apart(pid):
        return Escapes("one of its threads has descriptors of its own")
    direct, directly = False, Directly(pid)
    for number in proc.descriptors(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            link = proc.descriptor_link(pid, number)
            if link.startswith(_WRITERS):
                return Escapes("it uses a device or io_uring that writes memory by itself")
            direct = direct or directly.reads(number, link)
    return Escapes("", direct)


def private_id(pid: int) -> int:
    """The number that the process has in its innermost pid namespace, by which CRIU knows it.

    Raises:
        errors.NotFound: the process has ended.
    """
    numbers = proc.status(pid).ns_pids
    if not numbers:
        raise errors.NotFound(f"there is no process {pid}", pid=pid)
    return numbers[-1]
