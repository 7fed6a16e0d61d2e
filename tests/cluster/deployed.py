"""The project in the cluster as its users have it: image from the Dockerfile, deploy/ applied.

Promises: what runs is this checkout's; nothing is built or restarted that is so already.
Does not: remove anything; the cluster goes with its machines.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from tests.cluster import admission
from tests.cluster.cluster import Cluster, ClusterError

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
NAME = "app.kubernetes.io/name"
REPLICAS = 2  # of what is a Deployment
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
    await_webhook(cluster)


def await_webhook(cluster: Cluster) -> None:
    """Return when the API server asks the admission service."""
    # While it cannot be asked, pods start as they are (failurePolicy): not even an error says so.
    # One answer says little: each replica has an address of its own, and a call goes to any.
    asked = range(ASKED)
    cluster.wait_for(
        "the webhook to be called", lambda: all(admission.called(cluster) for _ in asked), READY_S
    )


def await_ready(cluster: Cluster) -> None:
    """Return when all that ``deploy`` started is ready."""
    wanted = {
        "ckpt-agent-node": len(cluster.nodes),
        "ckpt-agent-admission": REPLICAS,
        "ckpt-agent-coordinator": REPLICAS,
    }
    missing: Counter[str] = Counter()

    def ready() -> bool:
        found = cluster.get("pods", "-n", NAMESPACE)["items"]
        groups = control_groups()
        names = (p["metadata"]["labels"].get(NAME) for p in found if is_ready(p, groups))
        missing.clear()
        missing.update(Counter(wanted) - Counter(names))
        return not missing

    try:
        cluster.wait_for("the project's pods", ready, READY_S, 0.5)
    except ClusterError as error:
        pods = cluster.kubectl("describe", "pods", "-n", NAMESPACE)
        raise ClusterError(f"{error}\nnot ready: {dict(missing)}\n{pods}") from error


def is_ready(pod: dict[str, Any], groups: str) -> bool:
    """Whether a pod serves. Of containers that have just ended the API server still says that they
    are ready, so they have to be in ``groups`` as well.
    """
    status = pod["status"]
    conditions = {each["type"]: each["status"] for each in status.get("conditions", ())}
    ids = [each.get("containerID", "") for each in status.get("containerStatuses", ())]
    return (
        "deletionTimestamp" not in pod["metadata"]
        and conditions.get("Ready") == "True"
        and all(each and each.rpartition("/")[2] in groups for each in ids)
    )


def control_groups() -> str:
    """The control groups that any process of this machine is in; containers' are named for them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):
            found.append(entry.read_text())
    return "".join(found)


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
