"""A little room set aside, so that a full volume can still be pruned.

A deleter has to announce itself before it may delete (``prune``), which takes a small file. On a
volume without any room it gives the reserve up first, and sets it aside again at the end.

Promises: the reserve's bytes mean nothing; losing it costs nothing but that room.
Does not: help writers.
"""

from __future__ import annotations

import contextlib
import secrets

from agent import errors
from agent.store import layout
from agent.volumes.base import Volume

# A folder or two and a file on any file system; random, so that none compresses it away.
_BYTES = 64 << 10


def set_aside(volume: Volume) -> None:
    """Make the reserve if there is none and there is room."""
    try:
        volume.info(layout.RESERVE)
    except errors.BlobNotFound:
        with contextlib.suppress(errors.BlobExists, errors.VolumeFull):
            volume.put(layout.RESERVE, secrets.token_bytes(_BYTES))


def give_up(volume: Volume) -> None:
    """Give its room back to the volume."""
    volume.delete(layout.RESERVE)
