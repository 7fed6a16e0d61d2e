"""A checkpoint archive as an OCI image, which is how a container runtime is told to restore it: the
image's one layer is the archive, and annotations of its manifest say that it is a checkpoint.

Promises: one pass over the archive, in bounded memory; the file is an OCI image layout in a tar
(``ctr images import``, ``skopeo copy oci-archive:``); the same archive gives the same image.
Does not: compress, sign or push it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tarfile
from typing import Any, BinaryIO

from agent import errors

# What containerd looks for, and what CRI-O does.
_ANNOTATIONS = (
    "org.criu.checkpoint.container.name",
    "io.kubernetes.cri-o.annotations.checkpoint.name",
)
_MEDIA = "application/vnd.oci.image."
# Go's names, which OCI uses, by uname's.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "s390x": "s390x", "ppc64le": "ppc64le"}
# distribution/reference, less digests, and with a registry: without one, runtimes differ in whose
# image is meant.
_REFERENCE = re.compile(
    r"[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?(:[0-9]{1,5})?"
    r"(/[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*)+(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
)


@dataclasses.dataclass(frozen=True)
class About:
    """What the image is called (``reference``), the container it is of, and the machine that it
    ran on as ``uname -m`` says.
    """

    reference: str
    container: str
    machine: str


def check_reference(reference: str) -> str:
    """``reference``, if an image can be called that.

    Raises:
        errors.InvalidInput: it cannot.
    """
    if len(reference) > 255 or not _REFERENCE.fullmatch(reference):
        raise errors.InvalidInput(
            f"{reference!r} is not a name of an image",
            hint="write REGISTRY/REPOSITORY:TAG, such as registry.example/team/trainer-0:paused",
        )
    return reference


def reference(image: str, member: str) -> str:
    """The name of an image of which only ``GROUP@EPOCH`` and the member are known."""
    group, _, epoch = image.partition("@")
    words = re.findall(r"[a-z0-9]+", f"{group}-{member}".lower())
    return f"localhost/{'-'.join(words)}:{epoch}"


class OciImage:
    """The image that is written to ``out``, at its beginning, by ``add`` and then ``finish``."""

    def __init__(self, out: BinaryIO, about: About) -> None:
        """Raises ``errors.InvalidInput`` if no image can be of that machine."""
        if about.machine not in _ARCHITECTURES:
            raise errors.InvalidInput(
                f"no runtime's name is known for the machine {about.machine!r}",
                hint="export it as an archive",
            )
        self._out = out
        self._about = about
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._small("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        # Its digest and length, which its head needs, are known when all of it went by.
        self._layer_at = out.tell()
        out.write(bytes(tarfile.BLOCKSIZE))

    def add(self, piece: bytes | memoryview) -> None:
        """The next piece of the archive."""
        self._hash.update(piece)
        self._size_bytes += len(piece)
        self._out.write(piece)

    def finish(self) -> None:
        """Write what says what the archive is, once all of it was added."""
        self._out.write(bytes(-self._size_bytes % tarfile.BLOCKSIZE))
        digest = f"sha256:{self._hash.hexdigest()}"
        layer = {
            "mediaType": f"{_MEDIA}layer.v1.tar",
            "digest": digest,
            "size": self._size_bytes,
        }
        end = self._out.tell()
        self._out.seek(self._layer_at)
        self._out.write(_head(_blob(digest), self._size_bytes))
        self._out.seek(end)
        config = self._document(
            "config.v1+json",
            {
                "architecture": _ARCHITECTURES[self._about.machine],
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [digest]},
            },
        )
        manifest = self._document(
            "manifest.v1+json",
            {
                "schemaVersion": 2,
                "mediaType": f"{_MEDIA}manifest.v1+json",
                "config": config,
                "layers": [layer],
                "annotations": dict.fromkeys(_ANNOTATIONS, self._about.container),
            },
        )
        called = self._about.reference
        manifest["annotations"] = {
            "io.containerd.image.name": called,
            "org.opencontainers.image.ref.name": called.rpartition(":")[2],
        }
        index = {
            "schemaVersion": 2,
            "mediaType": f"{_MEDIA}index.v1+json",
            "manifests": [manifest],
        }
        self._small("index.json", _json(index))
        self._out.write(bytes(2 * tarfile.BLOCKSIZE))
        self._out.seek(0, os.SEEK_END)

    def _document(self, kind: str, value: dict[str, Any]) -> dict[str, Any]:
        content = _json(value)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self._small(_blob(digest), content)
        return {"mediaType": f"{_MEDIA}{kind}", "digest": digest, "size": len(content)}

    def _small(self, name: str, content: bytes) -> None:
        self._out.write(_head(name, len(content)))
        self._out.write(content)
        self._out.write(bytes(-len(content) % tarfile.BLOCKSIZE))


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _head(name: str, size_bytes: int) -> bytes:
    """One block, whatever the size: GNU's form writes large numbers into the same field."""
    info = tarfile.TarInfo(name)
    info.mode, info.size = 0o644, size_bytes
    return info.tobuf(tarfile.GNU_FORMAT)
