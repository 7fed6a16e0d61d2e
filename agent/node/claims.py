"""Which pod an image was restored into: one image makes one pod, unless asked otherwise.

Beside the images a namespace's store holds ``restored/GROUP@EPOCH`` (``restored/GROUP/EPOCH`` where
the group's name is too long for that): JSON with the pod's uid and name, the ids of its containers,
the node and the time. The volume lets exactly one writer create it, also among agents of several
nodes.

Promises: of several restores of an image into different pods exactly one goes on; a restore that
failed takes its claim back; the same pod may try again after whatever happened.
Does not: keep anything of an image that was deleted, once ``forget`` was called.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.pods import Pod
from agent.volumes.base import Volume

_PREFIX = "restored/"
_JOINED_CHARACTERS = 63


def holder(volume: Volume, image: str) -> str:
    """The uid of the pod that ``image`` was last restored into; "" if none."""
    content = _read(volume, image)
    return "" if content is None else _uid(content)


def names(volume: Volume, image: str, containers: Sequence[str]) -> bool:
    """Whether ``image`` was last claimed for exactly these containers."""
    try:
        return bool(json.loads(_read(volume, image) or b"{}")["containers"] == sorted(containers))
    except (ValueError, KeyError, TypeError):
        return False  # damaged, or older than this field


@contextlib.contextmanager
def claimed(
    volume: Volume, image: str, pod: Pod, *, again: bool, containers: Sequence[str] = ()
) -> Iterator[None]:
    """Claim ``image`` for ``pod`` and its ``containers`` (the runtime's ids) while it is restored;
    leaving with an error gives it back to whom it belonged before.

    Raises:
        errors.RestoreConflict: another pod has it, and ``again`` is not set.
        errors.VolumeError: it cannot be written down.
    """
    name = _name(image)
    content = json.dumps(
        {
            "pod_uid": pod.uid,
            "pod": str(pod),
            "node": pod.node,
            "containers": sorted(containers),
            "at_s": clock.wall_s(),
        }
    ).encode()
    before = _read(volume, image)
    if before is not None:
        if not again and _uid(before) != pod.uid:
            raise _taken(image, _uid(before))
        volume.delete(name)
    try:
        volume.put(name, content)
    except errors.BlobExists as exc:  # somebody else was faster, in this very instant
        raise _taken(image, holder(volume, image)) from exc
    except errors.VolumeError:
        if before is not None:
            with contextlib.suppress(errors.VolumeError):
                volume.put(name, before)
        raise
    try:
        yield
    except BaseException:
        with contextlib.suppress(errors.VolumeError):
            volume.delete(name)
            if before is not None:
                volume.put(name, before)
        raise


def forget(volume: Volume, group: ids.GroupName, epoch: ids.EpochId) -> None:
    """Drop the claim on an image that is deleted; a no-op if there is none."""
    volume.delete(_name(ids.image_name(group, epoch)))


def _name(image: str) -> str:
    # One component of a name has room for 253 characters (agent.volumes.names), an epoch takes 22.
    group, _, epoch = image.rpartition("@")
    return f"{_PREFIX}{image}" if len(group) <= _JOINED_CHARACTERS else f"{_PREFIX}{group}/{epoch}"


def _read(volume: Volume, image: str) -> bytes | None:
    try:
        return volume.read(_name(image))
    except errors.BlobNotFound:
        return None


def _uid(content: bytes) -> str:
    try:
        return str(json.loads(content)["pod_uid"])
    except (ValueError, KeyError, TypeError):
        # Damaged: it was restored, into nobody knows which pod.
        return "unknown"


def _taken(image: str, uid: str) -> errors.RestoreConflict:
    return errors.RestoreConflict(
        f"image {image} was already restored into the pod with uid {uid}",
        hint="two pods with one memory may both write to the same places: restore it again only"
        " if the first one is gone (--again)",
        reasons=[f"restored into pod {uid}"],
        pod_uid=uid,
    )
