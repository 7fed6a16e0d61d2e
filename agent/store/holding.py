"""What whoever reads an image announces, so that nobody deletes it meanwhile.

A reader's intent names the image and its packs. It is put anew again and again: one that has become
old is of a reader that died, and keeps the image from going no longer.

Promises: while it is held, and the reader lives, ``prune`` spares the image and ``delete`` refuses.
Does not: wait for a deleter that came first: the image is gone then.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.ids import EpochId, GroupName
from agent.store import catalog, epoch_ids, intents, layout
from agent.volumes.base import Volume

logger = logging.getLogger(__name__)

# Eight of them fit in the time after which a reader counts as dead.
_RENEWED_S = intents.READER_STALE_S / 8
_AGAIN_S = 30.0


@contextlib.contextmanager
def hold(
    volume: Volume, group: GroupName, epoch: EpochId, packs: tuple[str, ...]
) -> Iterator[bool]:
    """Keep an epoch, whose manifest names ``packs``, from being deleted while the context lasts.
    Gives whether that is so: not on a volume that takes nothing (read-only, full).

    Raises:
        errors.NotFound: it is being deleted.
    """
    held = _Held(volume, group, epoch, packs)
    if not held.announce():
        yield False
        return
    over = threading.Event()
    renewing = threading.Thread(target=held.renew, args=(over,), name="hold-image", daemon=True)
    try:
        # A deleter lists intents before it deletes manifests, and again before it deletes packs.
        if not catalog.exists(volume, group, epoch):
            raise errors.NotFound(
                f"epoch {epoch} of {group} is being deleted", hint="list shows what there is"
            )
        renewing.start()
        yield True
    finally:
        over.set()
        if renewing.ident is not None:
            renewing.join()
        held.withdraw()


class _Held:
    """One image, and the intent of the moment."""

    def __init__(
        self, volume: Volume, group: GroupName, epoch: EpochId, packs: tuple[str, ...]
    ) -> None:
        self._volume = volume
        self._image = group, epoch
        self._packs = packs
        self._attempt: str | None = None

    def announce(self) -> bool:
        """Put an intent that takes the place of the last one; whether the volume took it."""
        earlier = self._attempt
        attempt = epoch_ids.new_attempt(epoch_ids.next_epoch([], clock.wall_s()))
        me = intents.Owner.myself()
        try:
            intents.announce(
                self._volume, intents.Intent(attempt, "read", me, *self._image, self._packs)
            )
        except errors.VolumeError as exc:
            # Of no consequence while nobody deletes it; who minds is told by ``hold``.
            logger.info(
                "image %s is not held against being deleted: %s",
                ids.image_name(*self._image),
                exc.message,
            )
            return False
        self._attempt = attempt
        if earlier is not None:
            self._withdraw(earlier)
        return True

    def renew(self, over: threading.Event) -> None:
        """Announce it again and again until it is over."""
        wait_s = _RENEWED_S
        while not over.wait(wait_s):
            wait_s = _RENEWED_S if self.announce() else _AGAIN_S

    def withdraw(self) -> None:
        """Let it go."""
        if self._attempt is not None:
            self._withdraw(self._attempt)

    def _withdraw(self, attempt: str) -> None:
        try:
            intents.withdraw(self._volume, attempt)
        except errors.VolumeError as exc:
            # The next prune takes it away when this process has ended.
            logger.warning("%s stays: %s", layout.intent_name(attempt), exc.message)
