"""What becomes of an epoch: decided once, by whoever takes its name first.

The name of an epoch's manifest is taken exclusively: by the manifest (committed), or by a small
blob that says that there will never be one (abandoned). So whoever must know the outcome of an
epoch, and cannot wait for those who may still commit it, abandons it himself, and is told if they
were first.

Promises: of any number of callers, on any number of machines, all are told the same, for at least
``intents.STALE_S`` and as long as anybody has a joint intent for the epoch.
Does not: remove what was written for an abandoned epoch (``joint``, ``prune``).
"""

from __future__ import annotations

from agent import errors
from agent.model.ids import EpochId, GroupName
from agent.model.protocol import Decision
from agent.store import envelope, layout, manifest, reserve
from agent.store.fields import Fields, encode
from agent.volumes.base import BlobInfo, Volume

# What takes an epoch's name and is longer is its manifest: the envelope, and twice the two names.
MAX_ABANDONMENT_BYTES = 384
# How often a decision may be taken away between two looks before something is really wrong.
_RACES = 8


def abandon(
    volume: Volume, group: GroupName, epoch: EpochId, *, use_reserve: bool = False
) -> Decision:
    """Decide that an epoch is never committed, unless it is decided; return what it is now.

    ``use_reserve``: for callers that go on to make room, and then set the reserve aside again.

    Raises:
        errors.DataError: it is decided, but the file that says how is damaged.
        errors.VolumeError: it is not known whether it is decided; asking again tells.
    """
    name = layout.epoch_name(group, epoch)
    sealed = encode_abandonment(group, epoch)
    for _ in range(_RACES):
        try:
            volume.put(name, sealed)
        except errors.BlobExists:
            decided = decision(volume, group, epoch)
            if decided is not None:
                return decided
        except errors.VolumeFull:
            if not use_reserve:
                raise
            use_reserve = False
            reserve.give_up(volume)
        else:
            return Decision.ABANDONED
    raise errors.Conflict(f"epoch {epoch} of {group} comes and goes", hint="try again later")


def decision(volume: Volume, group: GroupName, epoch: EpochId) -> Decision | None:
    """Return what an epoch is decided to be, None if it is not.

    Raises:
        errors.DataError: the file that says it is damaged.
        errors.VolumeError: the volume failed.
    """
    try:
        sealed = volume.read(layout.epoch_name(group, epoch))
    except errors.BlobNotFound:
        return None
    if is_abandonment(sealed, group, epoch):
        return Decision.ABANDONED
    manifest.decode_epoch(sealed, group, epoch)
    return Decision.COMMITTED


def encode_abandonment(group: GroupName, epoch: EpochId) -> bytes:
    """Return the sealed blob that abandons an epoch."""
    body = encode({"group": group, "epoch": epoch})
    return envelope.seal(envelope.Kind.ABANDONMENT, body)


def is_abandonment(sealed: bytes, group: GroupName, epoch: EpochId) -> bool:
    """Tell what the file under the name of this epoch's manifest is.

    Raises:
        errors.Corrupt | errors.UnknownFormat: it claims to be an abandonment and is damaged.
    """
    if not envelope.claims(envelope.Kind.ABANDONMENT, sealed):
        return False
    part = layout.epoch_name(group, epoch)
    body = Fields.parse(envelope.unseal(envelope.Kind.ABANDONMENT, sealed, part=part), part)
    if (body.text("group"), body.text("epoch")) != (group, epoch):
        raise errors.Corrupt(f"{part} is of another epoch", part=part)
    return True


def listed_as_abandoned(volume: Volume, info: BlobInfo, group: GroupName, epoch: EpochId) -> bool:
    """Tell whether what a listing shows under an epoch's name abandons it. What is damaged does
    not, and what is gone by now does: there is no epoch either way. Reads small files only.
    """
    if info.size_bytes > MAX_ABANDONMENT_BYTES:
        return False
    try:
        return is_abandonment(volume.read(info.name), group, epoch)
    except errors.BlobNotFound:
        return True
    except errors.DataError:
        return False
