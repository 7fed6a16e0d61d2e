"""Packs that a verification found damaged, so that no new epoch builds on them.

Equal pages are stored once, so one damaged block may be part of every epoch that a group has. Once
it is known, the next dump stores those pages again, and is good.

Promises: marking and clearing never fail a verification: on a volume that cannot be written to,
nothing is marked.
Does not: take anything away from epochs that need such a pack; they may be repaired by hand.
"""

from __future__ import annotations

import contextlib

from agent import errors
from agent.store import envelope, layout
from agent.store.fields import encode
from agent.volumes.base import Volume


def known(volume: Volume) -> set[str]:
    """Return the names of all packs that are marked."""
    marks = (info.name for info in volume.list(layout.SUSPECTS))
    return {layout.PACKS + name.removeprefix(layout.SUSPECTS) for name in marks}


def mark(volume: Volume, pack: str, problem: str) -> None:
    """Mark a pack; ``problem`` is for people."""
    sealed = envelope.seal(envelope.Kind.SUSPECT, encode({"pack": pack, "problem": problem}))
    with contextlib.suppress(errors.VolumeError):
        volume.put(layout.suspect_name(pack), sealed)


def clear(volume: Volume, pack: str) -> None:
    """Take the mark away from a pack that turned out good."""
    with contextlib.suppress(errors.VolumeError):
        volume.delete(layout.suspect_name(pack))
