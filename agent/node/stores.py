"""One store a namespace, below one directory of a volume that all nodes share.

Promises: tenants share nothing: each namespace has a directory, a key and content of its own; the
directory that all lie in is never made, so that a volume that is not mounted is noticed instead of
being written beside; a volume that hangs is told within ``ANSWER_S``.
Does not: keep stores open: a volume may come and go.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import threading
from collections.abc import Callable
from typing import TypeVar

from agent import errors
from agent.model import ids
from agent.store.repository import Store
from agent.volumes.base import Space, Volume

# A network volume that lives answers in milliseconds, and in seconds when it is busy.
ANSWER_S = 10.0

T = TypeVar("T")


class NamespaceStores:
    """The stores below ``root``. ``volume`` opens a directory's volume, and makes the directory
    if told to.
    """

    def __init__(
        self, root: str, volume: Callable[[str, bool], Volume], *, answer_s: float = ANSWER_S
    ) -> None:
        self.root = root
        self._volume = volume
        self._answer_s = answer_s
        self._lock = threading.Lock()
        self._hangs: threading.Thread | None = None

    def open(self, namespace: ids.Namespace, create: bool) -> Store:
        """The store of ``namespace``, made if ``create`` and there is none.

        Raises:
            errors.NotFound: it has none.
            errors.UnknownFormat | errors.Corrupt | errors.VolumeError: it cannot be used.
        """
        self._answered(self._touched)
        path = posixpath.join(self.root, namespace)
        try:
            return Store.open(self._volume(path, create), create=create)
        except errors.VolumeGone as exc:
            if create or not isinstance(exc.__cause__, FileNotFoundError):
                raise
            raise errors.NotFound(
                f"namespace {namespace} has no images", hint="the first dump makes its store"
            ) from exc

    def namespaces(self) -> list[ids.Namespace]:
        """Those that have a store, or a directory of their name.

        Raises:
            errors.VolumeError: the volume is not there or does not answer.
        """
        return self._answered(self._listed)

    def _listed(self) -> list[ids.Namespace]:
        try:
            names = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        except OSError as exc:
            raise errors.VolumeGone(
                f"cannot list {self.root}: {exc.strerror}", hint="is it mounted on this node?"
            ) from exc
        found = []
        for name in names:
            with contextlib.suppress(errors.InvalidInput):
                found.append(ids.namespace_name(name))
        return found

    def space(self) -> Space:
        """Room on the volume for all of them.

        Raises:
            errors.VolumeError: it is not there, is read-only or does not answer.
        """
        return self._answered(lambda: self._volume(self.root, False).space())

    def _touched(self) -> None:
        volume = self._volume(self.root, False)
        with contextlib.suppress(errors.VolumeError):  # read-only is good enough to read
            volume.space()

    def _answered(self, look: Callable[[], T]) -> T:
        """What ``look`` returns. It runs in a thread of its own, since nothing can end a call that
        hangs in the kernel; while one hangs, no second one is begun.
        """
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(look())
            except BaseException as exc:  # noqa: BLE001  raised again where it was asked for
                failed.append(exc)

        with self._lock:
            hanging = self._hangs is not None and self._hangs.is_alive()
            if not hanging:
                self._hangs = None
        if not hanging:
            thread = threading.Thread(target=run, name=f"look at {self.root}", daemon=True)
            thread.start()
            thread.join(self._answer_s)
            if done:
                return done[0]
            if failed:
                raise failed[0]
            with self._lock:
                self._hangs = thread
        raise errors.VolumeGone(
            f"the volume {self.root} does not answer",
            hint="is its server up? Look at the mount on this node",
            volume=self.root,
        )
