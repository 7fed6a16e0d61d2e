"""A container runtime's checkpoint archive: what it holds, by name, and its content.

```
checkpoint/            what CRIU wrote: *.img, pages-N.img, tmpfs-*.tar.gz, runc's descriptors.json
config.dump spec.dump  the container, and its OCI configuration (JSON)
status.dump status     how the kubelet and containerd saw it (JSON)
rootfs-diff.tar        what changed in the root file system (a layer, by containerd gzipped)
deleted.files          what was deleted from it (CRI-O, JSON)
stats-dump dump.log    CRIU's statistics and log
container.log ...      the container's output, and whatever else a runtime adds
```

Promises: the file is opened once, and everything is read through that descriptor, so that neither
a rename nor a removal changes what is read; content is read in pieces of bounded size.
Does not: trust anything in it; ``ingest`` understands the images.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from agent import errors
from agent.engines.kubelet import tarindex
from agent.engines.kubelet.tarindex import LIMITS, Limits, Member, corrupt

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

IMAGES = "checkpoint"
SPEC = "spec.dump"
CONFIG = "config.dump"
STATUS = "status.dump"
ROOTFS_DIFF = "rootfs-diff.tar"
DELETED = "deleted.files"
STATS = "stats-dump"
LOG = "dump.log"
# The container's output so far. It stays where the cluster keeps logs: it is not the job's state.
_OUTPUT = ("container.log", "ctr.log")

# The OCI configuration of a container with thousands of mounts is some MiB.
_JSON_BYTES = 32 << 20
_BUFFER_BYTES = 1 << 20


class Archive:
    """An archive on an open descriptor, which stays the caller's.

    ``images`` are the members of CRIU's folder, ``parts`` those beside it, by their names there.
    """

    def __init__(self, fd: int, limits: Limits = LIMITS) -> None:
        """Read the headers.

        Raises:
            errors.Corrupt: it is not a checkpoint archive, or one that nobody should read on.
        """
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise corrupt("it is not a regular file")
        self._fd = fd
        self.size_bytes = info.st_size
        self.images: dict[str, Member] = {}
        self.parts: dict[str, Member] = {}
        for member in tarindex.members(self.content(), limits):
            self._add(member)
        for name in (SPEC, CONFIG):
            if name not in self.parts:
                raise corrupt(f"it has no {name}")
        if "inventory.img" not in self.images or "pstree.img" not in self.images:
            raise corrupt("it has no CRIU images of processes")
        both = sorted(self.images.keys() & self.parts.keys() - {STATS, LOG})
        if both:
            raise corrupt(f"{both[0]} is in it twice")

    def _add(self, member: Member) -> None:
        folder, slash, name = member.name.partition("/")
        if member.kind not in ("file", "directory"):
            raise corrupt(f"{member.name!r} is a {member.kind}")
        if member.kind == "directory":
            if member.name not in (".", IMAGES):
                raise corrupt(f"it has the unknown folder {member.name!r}")
        elif not slash and folder != IMAGES:
            self.parts[_name(folder)] = member
        elif slash and folder == IMAGES and "/" not in name:
            self.images[_name(name)] = member
        else:
            raise corrupt(f"{member.name!r} is where no checkpoint archive has a file")

    @property
    def kept_parts(self) -> list[str]:
        """The parts that are kept as they are, in order of names."""
        other = (*_OUTPUT, LOG, ROOTFS_DIFF, DELETED)
        return sorted(name for name in self.parts if name not in other)

    def content(self) -> BinaryIO:
        """The file itself, as ``stream``."""
        return self.stream(Member("the archive", "file", 0, self.size_bytes))

    def stream(self, member: Member) -> BinaryIO:
        """The content of a member, buffered; raises ``errors.Corrupt`` while it is read if the
        file became shorter.
        """
        raw = _Content(self._fd, member)
        return cast("BinaryIO", io.BufferedReader(raw, _BUFFER_BYTES))

    def read(self, member: Member, limit_bytes: int) -> bytes:
        """All of a member's content.

        Raises:
            errors.Corrupt: it is longer than ``limit_bytes``.
        """
        if member.size_bytes > limit_bytes:
            raise corrupt(f"{member.name} has {member.size_bytes} bytes")
        content = bytearray(member.size_bytes)
        self.fill(member, 0, memoryview(content))
        return bytes(content)

    def fill(self, member: Member, at: int, target: memoryview) -> None:
        """Fill ``target`` with the member's content from byte ``at``.

        Raises:
            errors.Corrupt: the member, or by now the file, ends before.
        """
        if at + len(target) > member.size_bytes:
            raise corrupt(f"{member.name} is cut short")
        position = member.offset + at
        while target:
            count = os.preadv(self._fd, [target], position)
            if not count:
                raise corrupt("it became shorter while it was read")
            position += count
            target = target[count:]

    def json(self, name: str) -> dict[str, Any]:
        """A part that is a JSON object; an empty one if there is no such part.

        Raises:
            errors.Corrupt: it is something else.
        """
        member = self.parts.get(name)
        return parse_json(name, self.read(member, _JSON_BYTES)) if member else {}


def parse_json(name: str, raw: bytes) -> dict[str, Any]:
    """``raw`` as a JSON object; raises ``errors.Corrupt`` if it is something else."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise corrupt(f"{name} is not JSON") from exc
    if not isinstance(value, dict):
        raise corrupt(f"{name} is not a JSON object")
    return value


@contextlib.contextmanager
def opened(path: str, limits: Limits = LIMITS) -> Iterator[Archive]:
    """The archive at ``path``, which must not be a symbolic link.

    Raises:
        errors.NotFound: there is no such file.
        errors.Corrupt: as ``Archive``.
    """
    try:
        # Not blocking: a pipe of that name must not hold us up until somebody writes to it.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags)
    except OSError as exc:
        raise errors.NotFound(
            f"cannot open the archive {path}: {exc.strerror}",
            hint="name a readable file that is not a symbolic link",
            path=path,
        ) from exc
    try:
        yield Archive(fd, limits)
    finally:
        os.close(fd)


class _Content(io.RawIOBase):
    """A member's content as a stream of its own position."""

    def __init__(self, fd: int, member: Member) -> None:
        self._fd = fd
        self._member = member
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        ends = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._member.size_bytes}
        self._at = ends[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: WriteableBuffer) -> int:
        view = memoryview(target)[: max(0, self._member.size_bytes - self._at)]
        if not view:
            return 0
        count = os.preadv(self._fd, [view], self._member.offset + self._at)
        if not count:
            raise corrupt("it became shorter while it was read")
        self._at += count
        return count


def _name(name: str) -> str:
    if not name.isascii() or not name.isprintable() or len(name) > 255:
        raise corrupt(f"the name {name!r} is not what CRIU or a runtime writes")
    return name
