"""What one writer contributes to an epoch, as told to whoever commits it.

Promises: ``decode`` after ``encode`` gives the same; anything else raises ``errors.Corrupt``. What
is decoded names nothing but members' manifests and packs.
Does not: check that what it names is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from agent import errors
from agent.model import ids
from agent.model.ids import EpochId, GroupName
from agent.store import layout, manifest
from agent.store.fields import Fields, encode

# Where the writers' own warnings go among the facts of an epoch.
WARNINGS = "store_warnings"


@dataclasses.dataclass(frozen=True)
class Part:
    """Members of one attempt, all durable. ``packs`` are all that they name, ``stored_bytes`` what
    the attempt added to the volume, ``warnings`` what an epoch's facts should tell people.
    """

    group: GroupName
    epoch: EpochId
    attempt: str
    members: tuple[manifest.MemberRef, ...]
    packs: tuple[str, ...]
    totals: manifest.Totals
    stored_bytes: int
    warnings: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return it as JSON in ASCII, to be sent."""
        return encode(
            {
                "group": self.group,
                "epoch": self.epoch,
                "attempt": self.attempt,
                "members": manifest.encode_refs(self.members),
                "packs": list(self.packs),
                "totals": dataclasses.asdict(self.totals),
                "stored_bytes": self.stored_bytes,
                "warnings": list(self.warnings),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Part:
        """Return what was sent; raises ``errors.Corrupt``."""
        what = "a member's part of an epoch"
        body = Fields.parse(data, what)
        attempt = body.text("attempt")
        try:
            group, epoch = ids.group_name(body.text("group")), ids.epoch_id(body.text("epoch"))
        except errors.InvalidInput as exc:
            raise errors.Corrupt(f"{what} names something impossible", part=what) from exc
        if not layout.is_attempt(attempt) or layout.attempt_epoch(attempt) != epoch:
            raise errors.Corrupt(f"{what} is of no attempt at its epoch", part=what)
        return cls(
            group,
            epoch,
            attempt,
            manifest.decode_refs(body, what),
            manifest.decode_packs(body),
            manifest.decode_totals(body, what),
            body.integer("stored_bytes"),
            tuple(body.texts("warnings")),
        )


def assemble(
    attempt: str, parts: Sequence[Part], facts: dict[str, Any], created_s: float
) -> manifest.EpochManifest:
    """Return the manifest of the epoch that the parts make up; ``attempt`` is who commits it.

    Raises:
        errors.InvalidInput: there are none, or they do not fit together.
    """
    members = tuple(ref for part in parts for ref in part.members)
    if not members:
        raise errors.InvalidInput("an epoch needs at least one member")
    if len({(part.group, part.epoch) for part in parts}) > 1:
        raise errors.InvalidInput("parts of different epochs do not make one")
    if len({ref.member for ref in members}) != len(members):
        raise errors.InvalidInput("a member was written by two parts of an epoch")
    warnings = [warning for part in parts for warning in part.warnings]
    if warnings:
        facts = facts | {WARNINGS: warnings}
    totals = manifest.Totals()
    for part in parts:
        totals += part.totals
    return manifest.EpochManifest(
        parts[0].group,
        parts[0].epoch,
        attempt,
        created_s,
        members,
        tuple(sorted({name for part in parts for name in part.packs})),
        totals,
        sum(part.stored_bytes for part in parts),
        facts,
    )
