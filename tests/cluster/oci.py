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
NOT_CARRIED = {"dev", "proc", "sys", "run"}  # what a container gets from its runtime


def _steady(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _write_layer(to: IO[bytes], root: Path | None, files: dict[str, Path]) -> None:
    with tarfile.open(fileobj=to, mode="w", format=tarfile.PAX_FORMAT) as layer:
        if root is not None:
            for name in sorted(os.listdir(root)):
                if name not in NOT_CARRIED:
                    layer.add(root / name, name, filter=_steady)
        for name, source in sorted(files.items()):
            layer.add(source, name, filter=_steady)


def _digest(stream: io.BufferedRandom) -> tuple[str, int]:
    stream.seek(0)
    found = hashlib.file_digest(stream, "sha256").hexdigest()
    size = stream.tell()
    stream.seek(0)
    return found, size


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
    part = archive.with_name(archive.name + ".part")
    layer_file = archive.with_name(archive.name + ".layer")
    try:
        with open(layer_file, "w+b") as layer, tarfile.open(part, "w") as out:
            _write_layer(layer, root, files or {})
            layer_digest, layer_size = _digest(layer)

            def add(name: str, content: bytes) -> None:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                out.addfile(entry, io.BytesIO(content))

            def blob(document: dict[str, Any]) -> tuple[str, int]:
                content = json.dumps(document, sort_keys=True).encode()
                name = hashlib.sha256(content).hexdigest()
                add(f"blobs/sha256/{name}", content)
                return f"sha256:{name}", len(content)

            add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
            entry = tarfile.TarInfo(f"blobs/sha256/{layer_digest}")
            entry.size = layer_size
            out.addfile(entry, layer)
            config_digest, config_size = blob(
                {
                    "architecture": ARCHITECTURES[platform.machine()],
                    "os": "linux",
                    "config": {"Cmd": command, "Env": [PATH], "User": user, "WorkingDir": "/"},
                    "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
                }
            )
            manifest_digest, manifest_size = blob(
                {
                    "schemaVersion": 2,
                    "mediaType": "application/vnd.oci.image.manifest.v1+json",
                    "config": {
                        "mediaType": "application/vnd.oci.image.config.v1+json",
                        "digest": config_digest,
                        "size": config_size,
                    },
                    "layers": [
                        {
                            "mediaType": "application/vnd.oci.image.layer.v1.tar",
                            "digest": f"sha256:{layer_digest}",
                            "size": layer_size,
                        }
                    ],
                }
            )
            index = {
                "schemaVersion": 2,
                "manifests": [
                    {
                        "mediaType": "application/vnd.oci.image.manifest.v1+json",
                        "digest": manifest_digest,
                        "size": manifest_size,
                        "annotations": {
                            "io.containerd.image.name": image,
                            "org.opencontainers.image.ref.name": image.rpartition(":")[2],
                        },
                    }
                ],
            }
            add("index.json", json.dumps(index).encode())
        os.replace(part, archive)
    finally:
        layer_file.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


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
