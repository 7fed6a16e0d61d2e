"""What a listing shows of an epoch.

Promises: a value made here is complete without further reading.
Does not: say whether the epoch's packs are whole; ``verify`` does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from agent.model.ids import EpochId, GroupName, MemberName
from agent.store.manifest import EpochManifest


@dataclasses.dataclass(frozen=True)
class EpochSummary:
    """One committed epoch.

    ``raw_bytes`` is all content, ``new_bytes`` the pages that its base did not have,
    uncompressed, ``stored_bytes`` what the epoch added to the volume, ``pages`` and
    ``zero_pages`` count memory. ``damage`` says why the manifest cannot be read, and then the
    numbers are zero.
    """

    group: GroupName
    epoch: EpochId
    created_s: float
    members: tuple[MemberName, ...]
    raw_bytes: int
    new_bytes: int
    stored_bytes: int
    pages: int
    zero_pages: int
    damage: str | None
    facts: dict[str, Any]


def of(found: EpochManifest) -> EpochSummary:
    """Return what a good manifest tells."""
    totals = found.totals
    return EpochSummary(
        found.group,
        found.epoch,
        found.created_s,
        tuple(ref.member for ref in found.members),
        totals.raw_bytes,
        totals.new_bytes,
        found.stored_bytes,
        totals.pages,
        totals.zero_pages,
        None,
        found.facts,
    )


def damaged(group: GroupName, epoch: EpochId, damage: str) -> EpochSummary:
    """Return what can be said of an epoch whose manifest cannot be read."""
    return EpochSummary(group, epoch, 0.0, (), 0, 0, 0, 0, 0, damage, {})
