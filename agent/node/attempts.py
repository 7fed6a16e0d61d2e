"""Attempts to restore the image of a group: each is decided once, and of those that run at the same
time at most one is committed.

Beside the images a namespace's store holds for each attempt
``restoring/GROUP/EPOCH/ATTEMPT.begun`` (``{}``) and, once it is decided, ``ATTEMPT.decided`` in the
same place (JSON: ``decision``, and of a commit ``pod_uids`` and ``at_s``), which the volume lets
exactly one writer create. Whoever commits an attempt first puts its ``begun``, then lists all
others and abandons each that is not decided. Of two attempts at least one sees the other, so that
one of them is abandoned before the other can be committed, or both are.

Promises: of any number of callers, on any number of machines, all are told the same of an attempt,
also when its image is deleted meanwhile; no attempt is committed while another one of the same
image is, unless that is wanted (``again``).
Does not: keep anything of an image that was deleted, once ``forget`` was called an hour later.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.protocol import Decision
from agent.volumes.base import Volume

_PREFIX = "restoring/"
_BEGUN, _DECIDED = ".begun", ".decided"
_ID = re.compile(r"[0-9a-f]{16}")
# Whoever takes part asks within minutes what was decided, or is cut off from the store.
_KEPT_S = 3600.0


class Attempt:
    """The attempt ``name`` to restore ``group`` as it was at ``epoch``. What it was once found
    to be is remembered.

    Raises:
        errors.InvalidInput: no attempt is called that.
    """

    def __init__(self, volume: Volume, group: ids.GroupName, epoch: ids.EpochId, name: str) -> None:
        if not _ID.fullmatch(name):
            raise errors.InvalidInput(
                f"attempt {name!r} is not valid", hint="use 16 hexadecimal digits"
            )
        self._volume = volume
        self._image = ids.image_name(group, epoch)
        self._folder = _folder(group, epoch)
        self._known: Decision | None = None
        self.name = name

    def begin(self, *, again: bool) -> None:
        """Announce the attempt; done before, a no-op.

        Raises:
            errors.RestoreConflict: the image was restored already, and ``again`` is not set.
            errors.VolumeError: it cannot be written down.
        """
        blob = f"{self._folder}{self.name}{_BEGUN}"
        try:
            self._volume.info(blob)
        except errors.BlobNotFound:
            with contextlib.suppress(errors.BlobExists):
                self._volume.put(blob, b"{}")
        if not again:
            for other in self._others():
                if _decision(self._volume, f"{self._folder}{other}{_DECIDED}") is _COMMITTED:
                    raise self._taken(other)

    def commit(self, pod_uids: Sequence[str], *, again: bool) -> Decision:
        """Decide that the processes of the image run in these pods, unless it is decided; return
        what it is.

        Raises:
            errors.RestoreConflict: they already run, or ran, in others, and ``again`` is not set.
            errors.VolumeError | errors.DataError: it may be committed all the same; ``abandon``
                tells.
        """
        self.begin(again=again)
        for other in self._others():
            # Nothing changes a decision, and a look is cheaper than another try to make one.
            theirs = _decision(self._volume, f"{self._folder}{other}{_DECIDED}")
            theirs = theirs or self._decide(other, {"decision": _ABANDONED.value})
            if theirs is _COMMITTED and not again:
                raise self._taken(other)
        body = {
            "decision": _COMMITTED.value,
            "pod_uids": sorted(pod_uids),
            "at_s": clock.wall_s(),
        }
        return self._decide(self.name, body)

    def abandon(self) -> Decision:
        """Decide that the attempt is never committed, unless it is decided; return what it is.

        Raises:
            errors.VolumeError | errors.DataError: it is not known whether it is decided; asking
                again tells.
        """
        self._known = self._known or self._decide(self.name, {"decision": _ABANDONED.value})
        return self._known

    def decision(self) -> Decision | None:
        """What it is decided to be, None if it is not; raises as ``abandon``."""
        if self._known is None:
            self._known = _decision(self._volume, f"{self._folder}{self.name}{_DECIDED}")
        return self._known

    def _decide(self, name: str, body: Mapping[str, object]) -> Decision:
        blob = f"{self._folder}{name}{_DECIDED}"
        try:
            self._volume.put(blob, json.dumps(body).encode())
        except errors.BlobExists:
            found = _decision(self._volume, blob)
            if found is None:
                raise errors.Conflict(
                    f"image {self._image} is being deleted", hint="restore another one"
                ) from None
            return found
        return Decision(body["decision"])

    def _others(self) -> list[str]:
        names = [each.name.removeprefix(self._folder) for each in self._volume.list(self._folder)]
        known = {name.removesuffix(_BEGUN).removesuffix(_DECIDED) for name in names}
        return sorted(known - {self.name})

    def _taken(self, other: str) -> errors.RestoreConflict:
        return errors.RestoreConflict(
            f"image {self._image} was already restored",
            hint="two groups with one memory may both write to the same places: restore it again"
            " only if the first one is gone (--again)",
            reasons=[f"restored by attempt {other}"],
        )


_COMMITTED, _ABANDONED = Decision.COMMITTED, Decision.ABANDONED


def holders(volume: Volume, group: ids.GroupName, epoch: ids.EpochId) -> list[str]:
    """The uids of the pods that an image was last restored into; none if it never was."""
    found: list[tuple[float, list[str]]] = []
    for each in volume.list(_folder(group, epoch)):
        if each.name.endswith(_DECIDED):
            with contextlib.suppress(errors.BlobNotFound, ValueError, KeyError, TypeError):
                body = json.loads(volume.read(each.name))
                if body["decision"] == _COMMITTED.value:
                    found.append((float(body["at_s"]), [str(uid) for uid in body["pod_uids"]]))
    return max(found)[1] if found else []


def forget(
    volume: Volume,
    removed: Collection[tuple[ids.GroupName, ids.EpochId]],
    kept: Collection[tuple[ids.GroupName, ids.EpochId]],
    *,
    now_s: float,
) -> None:
    """Drop the attempts on images that are ``removed``, or were earlier and are not among those
    that are ``kept``; undecided ones are abandoned first. What was decided is kept for an hour
    (``now_s`` is wall time): agents may be about to ask for it.
    """
    removed_folders = {_folder(*image) for image in removed}
    kept_folders = {_folder(*image) for image in kept}
    listed = {each.name: each for each in volume.list(_PREFIX)}
    for name, each in listed.items():
        folder = name[: name.rindex("/") + 1]
        # An image newer than the list of those that are kept has no old attempts.
        old = now_s - each.modified_s > _KEPT_S
        if folder in kept_folders or not (old or folder in removed_folders):
            continue
        if name.endswith(_BEGUN):
            decided = name.removesuffix(_BEGUN) + _DECIDED
            if decided not in listed:
                with contextlib.suppress(errors.BlobExists):
                    volume.put(decided, json.dumps({"decision": _ABANDONED.value}).encode())
            volume.delete(name)
        elif old:
            volume.delete(name)


def _folder(group: ids.GroupName, epoch: ids.EpochId) -> str:
    return f"{_PREFIX}{group}/{epoch}/"


def _decision(volume: Volume, blob: str) -> Decision | None:
    try:
        return Decision(json.loads(volume.read(blob))["decision"])
    except errors.BlobNotFound:
        return None
    except (ValueError, KeyError, TypeError) as exc:
        raise errors.Corrupt(f"{blob} cannot be understood", part=blob) from exc
