"""The project in the cluster as its users have it: image from the Dockerfile, deploy/ applied.

Promises: what runs is this checkout's; nothing is built or restarted that is so already.
Does not: remove anything; the cluster goes with its machines.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from tests.cluster import admission
from tests.cluster.cluster import Cluster

CHECKOUT = Path(__file__).resolve().parents[2]
NAMESPACE = "ckpt-agent"
IMAGE = "ckpt-agent:dev"
OVERLAY = CHECKOUT / "tests/cluster/manifests/agents"
# What the Dockerfile copies, and the recipe itself.
SOURCES = (
    *("Dockerfile", "requirements.lock", "pyproject.toml", "scripts/criu-bundle"),
    *("agent", "hooks", "hold"),
)
WORKLOADS = (
    "deployment/ckpt-agent-admission",
    "daemonset/ckpt-agent-node",
    "deployment/ckpt-agent-coordinator",
)
BUILD_S = 1800
READY_S = 240
ASKED = 8


def deploy(cluster: Cluster) -> None:
    """Builds and loads the image and applies the overlay for test clusters, as far as needed; the
    admission service, the coordinator and an agent on every node are ready afterwards, and the API
    server asks the service.
    """
    wanted = sources_digest()
    loaded = _loaded(cluster)
    there = all(node.has_image(f"docker.io/library/{IMAGE}") for node in cluster.nodes.values())
    if _content(loaded) != wanted or not there:
        cluster.import_image(build_image(cluster))
        _apply(cluster)
        for what in WORKLOADS:
            cluster.kubectl("rollout", "restart", what, "-n", NAMESPACE)
        loaded.write_text(wanted)
    else:
        _apply(cluster)
    for what in WORKLOADS:
        cluster.kubectl(
            *("rollout", "status", what, "-n", NAMESPACE, f"--timeout={READY_S}s"),
            timeout_s=READY_S + 10,
        )
    # While it cannot be asked, pods start as they are (failurePolicy): not even an error says so.
    # One answer says little: each replica has an address of its own, and a call goes to any.
    asked = range(ASKED)
    cluster.wait_for(
        "the webhook to be called", lambda: all(admission.called(cluster) for _ in asked)
    )


def forget(cluster: Cluster) -> None:
    """Another image than this module's was loaded: what is on the nodes is no longer known."""
    _loaded(cluster).unlink(missing_ok=True)


def _loaded(cluster: Cluster) -> Path:
    return cluster.state / "agent-sources"


def build_image(cluster: Cluster) -> Path:
    """The archive of the agent's image, built if it is not this checkout's."""
    archive = cluster.cache / "images/agent.tar"
    stamp = cluster.cache / "images/.agent-sources"
    wanted = sources_digest()
    if _content(stamp) != wanted or not archive.exists():
        script = str(CHECKOUT / "tests/cluster/agent_image")
        subprocess.run(["env", "NO_IMPORT=1", script], check=True, timeout=BUILD_S)
        stamp.write_text(wanted)
    return archive


def sources_digest() -> str:
    """A digest of everything that goes into the image."""
    digest = hashlib.sha256()
    for name in SOURCES:
        root = CHECKOUT / name
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for path in files:
            if "__pycache__" in path.parts:
                continue
            digest.update(f"{path.relative_to(CHECKOUT)}\0{path.stat().st_mode:o}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _apply(cluster: Cluster) -> None:
    rendered = cluster.kubectl("kustomize", str(OVERLAY))
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=rendered)


def _content(path: Path) -> str:
    return path.read_text() if path.exists() else ""
