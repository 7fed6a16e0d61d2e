"""The private memory of a process besides the mappings that are copied ahead: many small ones.

Promises: of a process that stands still, exactly the pages that CRIU would dump of its private
mappings (``should_dump_page`` in criu/mem.c of 4.2), but of those that are the kernel's own.
Does not: know all kinds of mappings: ``parts`` says which process has only those that it knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from agent.host import pagemap, proc
from agent.host.layouts import Layout
from agent.host.pagemap import Ranges

# VmFlags (Documentation/filesystems/proc.rst) of mappings that CRIU treats in a way of their own:
# huge pages, droppable, of devices, shadow stacks.
_PECULIAR = frozenset((b"ht", b"dp", b"io", b"pf", b"ss"))
# What is asked about at once: holes cost nothing up to this.
_HOLE_BYTES = 64 << 20
_KERNELS = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]")


@dataclasses.dataclass(frozen=True)
class Parts:
    """Private mappings, a row each, and ranges that have these and no other private ones."""

    areas: Ranges
    spans: Ranges


def parts(layout: Layout, copied: Ranges) -> Parts | None:
    """The private mappings besides ``copied``; None if the process has some of an unknown kind."""
    if layout.flags & _PECULIAR or not all(map(_known, layout.mappings)):
        return None
    elsewhere = set(copied[:, 0].tolist())
    areas: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    reach = 0
    for each in layout.mappings:
        if each.shared or each.path in _KERNELS or each.start in elsewhere:
            reach = 0
            continue
        areas.append((each.start, each.end))
        spans.append((spans.pop()[0] if each.start < reach else each.start, each.end))
        reach = each.end + _HOLE_BYTES
    return Parts(_ranges(areas), _ranges(spans))


def pages(pid: int, of: Parts) -> Ranges:
    """Their pages.

    Raises:
        errors.NotFound: the process has ended.
    """
    table = pagemap.Pagemap(pid)
    try:
        found = [table.own(start, end) for start, end in of.spans.tolist()]
    finally:
        table.close()
    return pagemap.clip(np.concatenate([pagemap.none(), *found]), of.areas)


def _known(mapping: proc.Mapping) -> bool:
    path = mapping.path
    if path in ("", "[heap]", "[stack]", *_KERNELS) or path.startswith("[anon:"):
        return True
    return path.startswith("/") and not path.startswith(("/dev/", "/[aio]"))


def _ranges(rows: Sequence[tuple[int, int]]) -> Ranges:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)
