"""A volume in this process's memory, for tests and for trying things out.

Promises: everything ``base.Volume`` promises, but for durability: it ends with the process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from agent import errors
from agent.host import clock
from agent.volumes import base, names

_Pieces = list[bytes]


class MemoryVolume:
    """Blobs in a dictionary. ``capacity_bytes`` bounds them all together, or None."""

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self._blobs: dict[str, tuple[bytes, float]] = {}
        self._unfinished_bytes = 0
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """``memory:`` and a number that only this process understands."""
        return f"memory:{id(self):x}"

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[base.BlobWriter]:
        """Begin a blob; see ``base.Volume``."""
        names.components(name)
        writer = _Writer(self, name)
        try:
            yield writer
        finally:
            writer.close()

    def put(self, name: str, data: bytes) -> None:
        """Create a small blob; see ``base.Volume``."""
        with self.create(name) as writer:
            writer.write(data)
            writer.commit()

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return part of a blob; see ``base.Volume``."""
        data, _ = self._get(name)
        return data[offset : None if length is None else offset + length]

    def info(self, name: str) -> base.BlobInfo:
        """Return what a listing shows."""
        data, modified_s = self._get(name)
        return base.BlobInfo(name, len(data), modified_s)

    def list(self, prefix: str = "") -> Iterator[base.BlobInfo]:
        """Yield blobs in order of names."""
        names.split_prefix(prefix)
        with self._lock:
            found = [(n, len(d), t) for n, (d, t) in self._blobs.items() if n.startswith(prefix)]
        for entry in sorted(found):
            yield base.BlobInfo(*entry)

    def delete(self, name: str) -> None:
        """Remove a blob if it is there."""
        names.components(name)
        with self._lock:
            self._blobs.pop(name, None)

    def sweep(self, older_than_s: float) -> int:
        """Nothing unfinished outlives its writer here."""
        return 0

    def space(self) -> base.Space:
        """The capacity given, if any."""
        if self._capacity_bytes is None:
            return base.Space(None, None)
        with self._lock:
            return base.Space(self._capacity_bytes, max(0, self._capacity_bytes - self._used()))

    def _used(self) -> int:
        return self._unfinished_bytes + sum(len(d) for d, _ in self._blobs.values())

    def _get(self, name: str) -> tuple[bytes, float]:
        names.components(name)
        with self._lock:
            blob = self._blobs.get(name)
        if blob is None:
            raise errors.BlobNotFound(f"no blob {name}", blob=name)
        return blob

    def _reserve(self, count: int) -> None:
        with self._lock:
            full = self._capacity_bytes is not None and self._used() + count > self._capacity_bytes
            if full:
                raise errors.VolumeFull("the volume is full", hint="prune the store")
            self._unfinished_bytes += count

    def _finish(self, name: str, pieces: _Pieces | None, count: int) -> None:
        with self._lock:
            self._unfinished_bytes -= count
            if pieces is None:
                return
            if name in self._blobs:
                raise errors.BlobExists(f"blob {name} exists", blob=name)
            self._blobs[name] = (b"".join(pieces), clock.wall_s())


class _Writer:
    def __init__(self, volume: MemoryVolume, name: str) -> None:
        self._volume = volume
        self._name = name
        self._pieces: list[bytes] = []
        self._count = 0
        self._open = True

    def write(self, data: bytes | memoryview) -> None:
        if not self._open:
            raise errors.VolumeError("the blob was given up", blob=self._name)
        try:
            self._volume._reserve(len(data))
        except errors.VolumeFull:
            self.close()
            raise
        self._count += len(data)
        self._pieces.append(bytes(data))

    def commit(self) -> None:
        if not self._open:
            raise errors.VolumeError("the blob was given up", blob=self._name)
        self._open = False
        self._volume._finish(self._name, self._pieces, self._count)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._volume._finish(self._name, None, self._count)
