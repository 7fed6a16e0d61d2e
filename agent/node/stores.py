"""One store a namespace, below one directory of a volume that all nodes share.

Promises: tenants share nothing: each namespace has a directory, a key and content of its own; the
directory that all lie in is never made, so that a volume that is not mounted is noticed instead of
being written beside.
Does not: keep stores open: a volume may come and go.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable

from agent import errors
from agent.model import ids
from agent.store.repository import Store
from agent.volumes.base import Volume


class NamespaceStores:
    """The stores below ``root``. ``volume`` opens a directory's volume, and makes the directory
    if told to.
    """

    def __init__(self, root: str, volume: Callable[[str, bool], Volume]) -> None:
        self._root = root
        self._volume = volume

    def open(self, namespace: ids.Namespace, create: bool) -> Store:
        """The store of ``namespace``, made if ``create`` and there is none.

        Raises:
            errors.NotFound: it has none.
            errors.UnknownFormat | errors.Corrupt | errors.VolumeError: it cannot be used.
        """
        self.root()
        path = posixpath.join(self._root, namespace)
        try:
            return Store.open(self._volume(path, create), create=create)
        except errors.VolumeGone as exc:
            if create or not isinstance(exc.__cause__, FileNotFoundError):
                raise
            raise errors.NotFound(
                f"namespace {namespace} has no images", hint="the first dump makes its store"
            ) from exc

    def any(self) -> Store:
        """For a look at all of them together, which there is none of.

        Raises:
            errors.NotFound: always: each namespace has its own.
        """
        raise errors.NotFound("each namespace has a store of its own")

    def root(self) -> Volume:
        """What all stores lie in.

        Raises:
            errors.VolumeError: it is not there or cannot be used.
        """
        return self._volume(self._root, False)
