"""What a volume promises: blobs under names, whole or not at all.

A volume keeps the bytes of a store. A name is a relative path of components
``[A-Za-z0-9][A-Za-z0-9._@-]*`` joined by ``/``. A blob is written once, never changed, and may be
deleted. These promises are small enough for a directory on NFS and for an object store, and
``tests/contracts`` holds one suite that every volume passes.

Promises: a blob is visible under its name only when it is whole and durable (after a power cut it
is either there with all its bytes or not at all); a reader that began before a delete may fail
with ``BlobNotFound`` but never gets other bytes.
Does not: hash, compress, encrypt, retry or cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class BlobInfo:
    """One blob as a listing shows it. ``modified_s`` is the volume's own clock, seconds since
    1970, good for showing and for ages of days, not for ordering.
    """

    name: str
    size_bytes: int
    modified_s: float


@dataclasses.dataclass(frozen=True)
class Space:
    """Room on the volume; None where it cannot be told (an object store)."""

    total_bytes: int | None
    free_bytes: int | None


class BlobWriter(Protocol):
    """A blob being written. Nothing is visible under its name before ``commit`` returns."""

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``.

        Raises:
            errors.VolumeFull: no room; the blob can only be given up.
            errors.VolumeError: the volume failed; likewise.
        """

    def commit(self) -> None:
        """Make the blob durable and visible.

        Raises:
            errors.BlobExists: the name was taken meanwhile, durably; nothing changed.
            errors.VolumeError: whether the blob is visible is not known (a reply that was lost);
                if it is, then for good.
        """


class Volume(Protocol):
    """A place for blobs. Methods are safe to call from several threads and processes at once."""

    @property
    def url(self) -> str:
        """Names the volume to a person; opening this URL again gives the same blobs."""

    def create(self, name: str) -> AbstractContextManager[BlobWriter]:
        """Begin a blob. Leaving the context without ``commit`` leaves nothing under the name,
        whether by an error or not.
        """

    def put(self, name: str, data: bytes) -> None:
        """Create a small blob in one step, durable when this returns. Of several callers, in this
        process or on other machines, exactly one wins.

        Raises:
            errors.BlobExists: another blob has the name, durably, and was left as it is.
            errors.VolumeError: as for ``create``.
        """

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return ``length`` bytes from ``offset`` (to the end if None). Fewer bytes come back
        only if the blob ends earlier.

        Raises:
            errors.BlobNotFound: no such blob.
            errors.VolumeError: it cannot be read (EIO, the volume vanished).
        """

    def info(self, name: str) -> BlobInfo:
        """Return what a listing would show. Raises ``errors.BlobNotFound``."""

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """Yield every blob whose name begins with ``prefix`` in order of names; unfinished blobs
        are not shown. A blob put before the call began is in it, also if another machine put it.
        """

    def delete(self, name: str) -> None:
        """Remove a blob, durably; removing one that is not there is a no-op."""

    def sweep(self, older_than_s: float) -> int:
        """Remove what writers that died left unfinished for at least that long; return how many."""

    def space(self) -> Space:
        """Room left for new blobs.

        Raises:
            errors.VolumeGone: the volume cannot be reached or is read-only.
        """
