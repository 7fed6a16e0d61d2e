"""An image becomes a checkpoint archive, for checkpointctl, containerd and CRI-O.

Promises: the archive is a stream of the same bytes for the same image; page files hold the
image's pages in order, zero pages included; parts that a runtime had put beside CRIU's images are
there as they were, and are made up from the image's facts where it was captured without a runtime's
help; memory is bounded.
Does not: carry volumes and open files, for which an archive has no place (``Exported`` names them),
or make an image restorable by a runtime that is not: one that ``container`` or ``criu`` captured
has no namespaces in it, and is for looking at.
"""

from __future__ import annotations

import datetime
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from agent import errors
from agent.engines.criu import images
from agent.engines.kubelet import archive, layer
from agent.model import container
from agent.model.archives import Exported, Whose
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun

_ZEROS = bytes(1 << 20)


def write(source: MemberSource, about: Whose, out: BinaryIO) -> Exported:
    """Write the archive of ``source``, of which ``about`` says what its facts may not.

    Raises:
        errors.Corrupt | errors.Missing: the image is damaged.
    """
    return _Writer(source, about, out).run()


class _Writer:
    def __init__(self, source: MemberSource, about: Whose, out: BinaryIO) -> None:
        self._source = source
        self._about = about
        self._out = out
        self._at = 0
        self._known = source.facts()
        listed = self._known.get("archive_parts")
        self._parts = {str(name) for name in listed} if isinstance(listed, list) else set()

    def run(self) -> Exported:
        beside: dict[str, bytes] = {}
        self._folder(archive.IMAGES)
        for name, content in self._source.metadata():
            if name in self._parts:
                beside[name] = content
            else:
                self._file(f"{archive.IMAGES}/{name}", len(content), [content])
        for number, space in enumerate(self._spaces(), start=1):
            self._memory(space, number)
        for name, made in ((archive.CONFIG, self._config()), (archive.SPEC, self._spec())):
            beside.setdefault(name, json.dumps(made, sort_keys=True).encode())
        for name, content in sorted(beside.items()):
            self._file(name, len(content), [content])
        self._rootfs()
        self._put(bytes(2 * tarfile.BLOCKSIZE))
        files = (entry.path for entry in self._source.files())
        return Exported(self._at, tuple(path for path in files if path != container.ROOTFS_DIFF))

    def _put(self, piece: bytes | memoryview) -> None:
        self._out.write(piece)
        self._at += len(piece)

    def _head(self, name: str, kind: bytes, mode: int, size_bytes: int) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size = kind, mode, size_bytes
        info.mtime = int(self._about.created_s)
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _folder(self, name: str) -> None:
        self._head(f"{name}/", tarfile.DIRTYPE, 0o700, 0)

    def _file(self, name: str, size_bytes: int, pieces: Iterable[bytes | memoryview]) -> None:
        self._head(name, tarfile.REGTYPE, 0o600, size_bytes)
        began = self._at
        for piece in pieces:
            self._put(piece)
        if self._at - began != size_bytes:
            raise errors.Corrupt(f"{name} of the image has an odd size", part=name)
        self._put(bytes(-size_bytes % tarfile.BLOCKSIZE))

    def _spaces(self) -> list[AddressSpace]:
        """All address spaces, also those without a page: CRIU wants a page map of each."""
        found = self._source.spaces()
        for kind, number in self._known.get("spaces", ()):
            space = AddressSpace(kind, int(number))
            if space not in found:
                found.append(space)
        return found

    def _memory(self, space: AddressSpace, number: int) -> None:
        stored = space in self._source.spaces()
        runs: list[PageRun] = self._source.runs(space) if stored else []
        size_bytes = sum(run.pages for run in runs) * PAGE_BYTES
        pagemap = images.pagemap(number, runs)
        self._file(f"{archive.IMAGES}/{images.pagemap_name(space)}", len(pagemap), [pagemap])
        self._file(f"{archive.IMAGES}/pages-{number}.img", size_bytes, self._pages(space, runs))

    def _pages(self, space: AddressSpace, runs: list[PageRun]) -> Iterator[bytes | memoryview]:
        for _, data, pages in self._source.read(space, runs) if runs else ():
            if data is not None:
                yield data
                continue
            left = pages * PAGE_BYTES
            while left:
                yield _ZEROS[: min(left, len(_ZEROS))]
                left -= min(left, len(_ZEROS))

    def _rootfs(self) -> None:
        """Twice through: a tar file names the size of what follows."""
        if container.ROOTFS_DIFF not in (entry.path for entry in self._source.files()):
            return

        def pieces() -> Iterator[bytes]:
            return layer.as_layer(self._source.file_content(container.ROOTFS_DIFF))

        size_bytes = sum(len(piece) for piece in pieces())
        self._file(archive.ROOTFS_DIFF, size_bytes, pieces())

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
