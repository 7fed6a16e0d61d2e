"""Which pages of old packs a new epoch may refer to.

An epoch that refers to a few pages of an old block pays for the whole block when it is restored,
and keeps a whole pack alive for them. So where the base uses less than a quarter of a pack, or of a
block, the rest is treated as unknown: equal pages are stored again, in new packs, and the old ones
die by themselves when the epochs that need them go. No pack is ever rewritten. What an epoch
stores again is bounded by a third of what has changed since these pages were stored.

Promises: pure; the same answer for the same usage.
"""

from __future__ import annotations

import numpy as np
from numpy import typing as npt

# With a quarter, a restore reads at most four times the bytes it needs.
LEAST_USE = 0.25

Mask = npt.NDArray[np.bool_]


def reusable_pages(used: Mask, block_pages: npt.NDArray[np.int64]) -> Mask:
    """Return which pages of one pack may be referred to.

    ``used`` says which pages the base refers to, ``block_pages`` how many each block holds.
    Unused pages of a block that is worth keeping may be referred to again: they are there anyway.
    """
    if used.sum() < LEAST_USE * len(used):
        return np.zeros(len(used), dtype=np.bool_)
    starts = np.cumsum(block_pages) - block_pages
    in_use = np.add.reduceat(used.astype(np.int64), starts) if len(starts) else starts
    return np.repeat(in_use >= LEAST_USE * block_pages, block_pages)
