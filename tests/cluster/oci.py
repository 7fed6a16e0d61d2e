"""OCI image archives from a directory or single files, without a container engine or a registry.

Promises: one layer, one platform (this machine's); the same input gives the same digests; an
archive that was not finished does not stand under its name.
Does not: compress, or follow a Dockerfile.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import tarfile
from pathlib import Path
from typing import IO, Any

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
MEDIA_TYPE = "application/vnd.oci.image."
NOT_CARRIED = {"dev", "proc", "sys", "run"}  # what a container gets from its runtime


def steady(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """``entry`` without what differs from one checkout or machine to the next."""
    entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _write_layer(to: IO[bytes], root: Path | None, files: dict[str, Path]) -> None:
    with tarfile.open(fileobj=to, mode="w", format=tarfile.PAX_FORMAT) as layer:
        if root is not None:
            for name in sorted(os.listdir(root)):
                if name not in NOT_CARRIED:
                    layer.add(root / name, name, filter=steady)
        for name, source in sorted(files.items()):
            layer.add(source, name, filter=steady)


def _digest(stream: io.BufferedRandom) -> tuple[str, int]:
    stream.seek(0)
    found = hashlib.file_digest(stream, "sha256").hexdigest()
    size = stream.tell()
    stream.seek(0)
    return f"sha256:{found}", size


def write_blobs(
    archive: Path,
    image: str,
    config: dict[str, Any],
    layers: list[tuple[str, int]],
    contents: dict[str, IO[bytes]],
) -> None:
    """Writes an archive of ``image``: its configuration, its layers' digests and sizes, and the
    content of those layers that are to be in it.
    """
    part = archive.with_name(archive.name + ".part")
    try:
        with tarfile.open(part, "w") as out:

            def add(name: str, size: int, content: IO[bytes]) -> None:
                entry = tarfile.TarInfo(name)
                entry.size = size
                out.addfile(entry, content)

            def document(kind: str, value: dict[str, Any]) -> dict[str, Any]:
                content = json.dumps(value, sort_keys=True).encode()
                digest = hashlib.sha256(content).hexdigest()
                add(f"blobs/sha256/{digest}", len(content), io.BytesIO(content))
                return _descriptor(kind, f"sha256:{digest}", len(content))

            layout = b'{"imageLayoutVersion":"1.0.0"}'
            add("oci-layout", len(layout), io.BytesIO(layout))
            sizes = dict(layers)
            for digest, content in contents.items():
                add(f"blobs/{digest.replace(':', '/')}", sizes[digest], content)
            manifest = document(
                "manifest.v1+json",
                {
                    "schemaVersion": 2,
                    "mediaType": MEDIA_TYPE + "manifest.v1+json",
                    "config": document("config.v1+json", config),
                    "layers": [_descriptor("layer.v1.tar", *layer) for layer in layers],
                },
            )
            manifest["annotations"] = {
                "io.containerd.image.name": image,
                "org.opencontainers.image.ref.name": image.rpartition(":")[2],
            }
            index = json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()
            add("index.json", len(index), io.BytesIO(index))
        os.replace(part, archive)
    finally:
        part.unlink(missing_ok=True)


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": MEDIA_TYPE + kind, "digest": digest, "size": size}


def write_archive(
    archive: Path,
    image: str,
    *,
    root: Path | None = None,
    files: dict[str, Path] | None = None,
    command: list[str],
    user: str = "",
) -> None:
    """Writes image ``image`` of ``root``'s tree and of ``files`` (path in it: source)."""
    layer_file = archive.with_name(archive.name + ".layer")
    try:
        with open(layer_file, "w+b") as layer:
            _write_layer(layer, root, files or {})
            digest, size = _digest(layer)
            config = {
                "architecture": ARCHITECTURES[platform.machine()],
                "os": "linux",
                "config": {"Cmd": command, "Env": [PATH], "User": user, "WorkingDir": "/"},
                "rootfs": {"type": "layers", "diff_ids": [digest]},
            }
            write_blobs(archive, image, config, [(digest, size)], {digest: layer})
    finally:
        layer_file.unlink(missing_ok=True)


def main() -> None:
    """``oci.py ARCHIVE IMAGE [--root DIR] [--add FILE=PATH]... [--user U] --command CMD...``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("image")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--add", action="append", default=[], metavar="FILE=PATH")
    parser.add_argument("--user", default="")
    parser.add_argument("--command", nargs=argparse.REMAINDER, required=True)
    chosen = parser.parse_args()
    files = {
        path: Path(source) for source, _, path in (pair.rpartition("=") for pair in chosen.add)
    }
    write_archive(
        chosen.archive,
        chosen.image,
        root=chosen.root,
        files=files,
        command=chosen.command,
        user=chosen.user,
    )


if __name__ == "__main__":
    main()
