"""An image becomes a checkpoint archive, for checkpointctl, containerd and CRI-O.

Promises: the archive is a stream of the same bytes for the same image; page files hold the
image's pages in order, zero pages included; parts that a runtime had put beside CRIU's images are
there as they were, and are made up from the image's facts where it was captured without a runtime's
help; memory is bounded.
Does not: carry volumes and open files, for which an archive has no place (``left_out`` names them),
or make an image restorable by a runtime that is not: one that ``container`` or ``criu`` captured
has no namespaces in it, and is for looking at.
"""

from __future__ import annotations

import datetime
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from agent import errors
from agent.engines.criu import images
from agent.engines.kubelet import archive, layer
from agent.model import container
from agent.model.archives import Whose
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun

Piece = bytes | memoryview

_ZEROS = bytes(1 << 20)


class Outgoing:
    """The archive of ``source``, of which ``about`` says what its facts may not; see
    ``model.archives.Outgoing``.
    """

    def __init__(self, source: MemberSource, about: Whose) -> None:
        self._source = source
        self._about = about
        self._known = source.facts()
        listed = self._known.get("archive_parts")
        self._parts = {str(name) for name in listed} if isinstance(listed, list) else set()
        # Its first process and its namespaces are in it, and what the runtime had said of it.
        self.restorable = self._known.get("root") == 1 and archive.STATUS in self._parts
        files = {entry.path: entry.size_bytes for entry in source.files()}
        self._has_rootfs = container.ROOTFS_DIFF in files
        self.left_out = tuple(path for path in files if path != container.ROOTFS_DIFF)
        self.expected_bytes = files.get(container.ROOTFS_DIFF, 0) + PAGE_BYTES * sum(
            run.pages for space in source.spaces() for run in source.runs(space)
        )

    def pieces(self) -> Iterator[Piece]:
        """See ``model.archives.Outgoing``."""
        beside: dict[str, bytes] = {}
        yield self._head(f"{archive.IMAGES}/", tarfile.DIRTYPE, 0o700, 0)
        for name, content in self._source.metadata():
            if name in self._parts:
                beside[name] = content
            else:
                yield from self._file(f"{archive.IMAGES}/{name}", len(content), [content])
        for number, space in enumerate(self._spaces(), start=1):
            yield from self._memory(space, number)
        for name, made in ((archive.CONFIG, self._config()), (archive.SPEC, self._spec())):
            beside.setdefault(name, json.dumps(made, sort_keys=True).encode())
        for name, content in sorted(beside.items()):
            yield from self._file(name, len(content), [content])
        if self._has_rootfs:
            yield from self._rootfs()
        yield bytes(2 * tarfile.BLOCKSIZE)

    def _head(self, name: str, kind: bytes, mode: int, size_bytes: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size = kind, mode, size_bytes
        info.mtime = int(self._about.created_s)
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")

    def _file(self, name: str, size_bytes: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
        yield self._head(name, tarfile.REGTYPE, 0o600, size_bytes)
        written = 0
        for piece in pieces:
            written += len(piece)
            yield piece
        if written != size_bytes:
            raise errors.Corrupt(f"{name} of the image has an odd size", part=name)
        yield bytes(-size_bytes % tarfile.BLOCKSIZE)

    def _spaces(self) -> list[AddressSpace]:
        """All address spaces, also those without a page: CRIU wants a page map of each."""
        found = self._source.spaces()
        for kind, number in self._known.get("spaces", ()):
            space = AddressSpace(kind, int(number))
            if space not in found:
                found.append(space)
        return found

    def _memory(self, space: AddressSpace, number: int) -> Iterator[Piece]:
        stored = space in self._source.spaces()
        runs: list[PageRun] = self._source.runs(space) if stored else []
        size_bytes = sum(run.pages for run in runs) * PAGE_BYTES
        pagemap = images.pagemap(number, runs)
        name = f"{archive.IMAGES}/{images.pagemap_name(space)}"
        yield from self._file(name, len(pagemap), [pagemap])
        name = f"{archive.IMAGES}/pages-{number}.img"
        yield from self._file(name, size_bytes, self._pages(space, runs))

    def _pages(self, space: AddressSpace, runs: list[PageRun]) -> Iterator[Piece]:
        for _, data, pages in self._source.read(space, runs) if runs else ():
            if data is not None:
                yield data
                continue
            left = pages * PAGE_BYTES
            while left:
                yield _ZEROS[: min(left, len(_ZEROS))]
                left -= min(left, len(_ZEROS))

    def _rootfs(self) -> Iterator[Piece]:
        """Twice through: a tar file names the size of what follows."""

        def pieces() -> Iterator[bytes]:
            return layer.as_layer(self._source.file_content(container.ROOTFS_DIFF))

        size_bytes = sum(len(piece) for piece in pieces())
        yield from self._file(archive.ROOTFS_DIFF, size_bytes, pieces())

    def _config(self) -> dict[str, Any]:
        known = _mapping(self._known.get("container"))
        made_at = datetime.datetime.fromtimestamp(self._about.created_s, datetime.UTC).isoformat()
        image = str(known.get("image") or known.get("image_digest") or "")
        return {
            "id": str(known.get("id") or self._about.container),
            "name": self._about.container,
            "rootfsImage": image,
            "rootfsImageName": image,
            "rootfsImageRef": str(known.get("image_digest") or ""),
            "runtime": str(known.get("runtime") or "ckpt-agent"),
            "createdTime": made_at,
            "checkpointedTime": made_at,
        }

    def _spec(self) -> dict[str, Any]:
        known = _mapping(self._known.get("container"))
        mounts = known.get("mounts")
        return {
            "ociVersion": "1.0.2",
            "annotations": {
                "io.kubernetes.cri.container-name": self._about.container,
                "io.kubernetes.cri.sandbox-name": self._about.pod,
                "io.kubernetes.cri.sandbox-namespace": self._about.namespace,
            },
            "mounts": [
                {"destination": str(each)} for each in (mounts if isinstance(mounts, list) else ())
            ],
        }


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
