"""Where things lie in a store: the names of its blobs.

Promises: names made here are valid on every volume; names read from a manifest are taken only if
they have exactly the shape that is made here, so that no manifest can name anything else.
Does not: touch a volume.
"""

from __future__ import annotations

import dataclasses
import re

from agent import errors
from agent.model import ids
from agent.model.ids import EpochId, GroupName, MemberName

STORE = "store"
RESERVE = "reserve"
GROUPS = "groups/"
PACKS = "packs/"
INTENTS = "intents/"
SUSPECTS = "suspects/"
_EPOCH_FILE = "epoch"
_MEMBER_PREFIX = "member-"
_ATTEMPT = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}-[0-9a-f]{16}")
_PACK = re.compile(rf"packs/({_ATTEMPT.pattern})/(0|[1-9][0-9]{{0,6}})")


@dataclasses.dataclass(frozen=True)
class EpochFile:
    """A file below ``groups/``, as its name tells: the epoch's manifest, or a member's."""

    group: GroupName
    epoch: EpochId
    member: MemberName | None


def epoch_name(group: GroupName, epoch: EpochId) -> str:
    """The group manifest, whose creation is the commit."""
    return f"{GROUPS}{group}/{epoch}/{_EPOCH_FILE}"


def member_name(group: GroupName, epoch: EpochId, member: MemberName) -> str:
    """A member's manifest."""
    return f"{GROUPS}{group}/{epoch}/{_MEMBER_PREFIX}{member}"


def pack_name(attempt: str, number: int) -> str:
    """A pack; ``attempt`` tells which writer made it."""
    return f"{PACKS}{attempt}/{number}"


def intent_name(attempt: str) -> str:
    """What a writer or a deleter announces before it begins."""
    return f"{INTENTS}{attempt}"


def suspect_name(pack: str) -> str:
    """The mark of a damaged pack."""
    return SUSPECTS + pack.removeprefix(PACKS)


def attempt_id(epoch: EpochId, unique: str) -> str:
    """Names one attempt to write an epoch; ``unique`` is 16 hexadecimal digits."""
    return f"{epoch}-{unique}"


def is_attempt(text: str) -> bool:
    """Tell whether ``text`` is an attempt's id."""
    return _ATTEMPT.fullmatch(text) is not None


def attempt_epoch(attempt: str) -> EpochId:
    """Return the epoch that an attempt is made at."""
    return EpochId(attempt.rpartition("-")[0])


def pack_attempt(name: str) -> str:
    """Return the attempt that a pack's name tells.

    Raises:
        errors.Corrupt: it is no pack's name.
    """
    match = _PACK.fullmatch(name)
    if match is None:
        raise errors.Corrupt(f"{name[:80]!r} is not the name of a pack")
    return match[1]


def parse_group_file(name: str) -> EpochFile | None:
    """Return what a name below ``groups/`` tells, or None if it is not one of ours."""
    parts = name.split("/")
    if len(parts) != 4:
        return None
    try:
        group, epoch = ids.group_name(parts[1]), ids.epoch_id(parts[2])
        if parts[3] == _EPOCH_FILE:
            return EpochFile(group, epoch, None)
        if parts[3].startswith(_MEMBER_PREFIX):
            member = ids.member_name(parts[3].removeprefix(_MEMBER_PREFIX))
            return EpochFile(group, epoch, member)
    except errors.InvalidInput:
        return None
    return None
