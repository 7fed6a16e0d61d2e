"""The agent's image with this checkout's Python code, in seconds: one layer more on the image that
``agent_image`` built last, for whoever edits and tries.

Promises: agent/ and hooks/ of the image are exactly the checkout's; all else is the built image's.
Does not: replace a build from the Dockerfile, which is what tests and users run.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster, ClusterError
from tests.cluster.oci import steady, write_blobs

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("agent", "hooks")
IMAGE = "docker.io/library/ckpt-agent:dev"


def _site_packages(built: tarfile.TarFile, layers: list[str]) -> str:
    """Where the image keeps the agent's package."""
    for layer in reversed(layers):
        stream = built.extractfile(layer)
        if stream is None:
            continue
        with tarfile.open(fileobj=stream) as content:
            for entry in content:
                if entry.name.endswith("/site-packages/agent/__init__.py"):
                    return entry.name.removesuffix("/agent/__init__.py")
    raise ClusterError("the built image has no package 'agent'")


def _code_layer(site_packages: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as layer:
        for package in PACKAGES:
            for source in sorted((CHECKOUT / package).rglob("*")):
                if source.is_dir() or "__pycache__" in source.parts:
                    continue
                layer.add(source, f"{site_packages}/{source.relative_to(CHECKOUT)}", filter=steady)
        for package in PACKAGES:
            # What the layers below hold of these packages is gone, compiled modules included.
            opaque = tarfile.TarInfo(f"{site_packages}/{package}/.wh..wh..opq")
            layer.addfile(opaque, io.BytesIO())
    return buffer.getvalue()


def load(cluster: Cluster) -> None:
    """Gives both nodes the image ``ckpt-agent:dev`` with this checkout's code.

    Raises: ClusterError when ``agent_image`` has not built and loaded one before.
    """
    archive = cluster.cache / "images/agent.tar"
    if not archive.exists():
        raise ClusterError(f"{archive} is not there; build the image first: scripts/cluster agent")
    with tarfile.open(archive) as built:
        listing = built.extractfile("manifest.json")
        assert listing is not None
        (image,) = json.load(listing)
        names: list[str] = image["Layers"]
        config_file = built.extractfile(image["Config"])
        assert config_file is not None
        config: dict[str, Any] = json.load(config_file)
        known = cluster.cache / "images/.agent.site-packages"
        if not known.exists() or known.stat().st_mtime < archive.stat().st_mtime:
            known.write_text(_site_packages(built, names))
        sizes = [built.getmember(name).size for name in names]
    layer = _code_layer(known.read_text())
    diff_ids: list[str] = config["rootfs"]["diff_ids"]
    digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    config["rootfs"]["diff_ids"] = [*diff_ids, digest]
    config.pop("history", None)
    # The layers below are not in the archive: the nodes have them from the image's own.
    below = list(zip(diff_ids, sizes, strict=True))
    part = archive.with_name("agent-code.tar")
    write_blobs(part, IMAGE, config, [*below, (digest, len(layer))], {digest: io.BytesIO(layer)})
    cluster.import_image(part)
