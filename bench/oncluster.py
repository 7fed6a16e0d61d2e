"""The program against the running test cluster, in a namespace of a bench.

Promises: a command that fails stops the bench, with what it said.
Does not: start the cluster.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tests.cluster import deployed
from tests.cluster.cluster import Cluster

_PROGRAM = (sys.executable, "-c", "from agent.cli.main import main; main()")


def ckpt(cluster: Cluster, namespace: str, *arguments: str) -> dict[str, Any]:
    """What a command answers."""
    environment = {"CKPT_AGENT_OUTPUT": "json", "PYTHONPATH": str(deployed.CHECKOUT)}
    done = cluster.run_in_control_plane(
        *(*_PROGRAM, *arguments, "-n", namespace, "--quiet"),
        environment=environment,
        timeout_s=600,
    )
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def kubelet_checkpoint(cluster: Cluster, node: str, container: str) -> float:
    """The kubelet's own checkpoint of ``container`` (NAMESPACE/POD/NAME) on ``node``; seconds. Its
    archive is removed.
    """
    path = f"/api/v1/nodes/{node}/proxy/checkpoint/{container}"
    began_s = time.monotonic()
    said = cluster.kubectl("create", "--raw", path, "-f", "-", stdin="{}", timeout_s=300)
    took_s = time.monotonic() - began_s
    for item in json.loads(said)["items"]:
        (cluster.node(node).root / item.lstrip("/")).unlink()
    return took_s


def delete_all(cluster: Cluster, namespace: str) -> None:
    """The images and the namespace."""
    for image in ckpt(cluster, namespace, "list")["items"]:
        ckpt(cluster, namespace, "delete", image["name"])
    cluster.kubectl("delete", "namespace", namespace, "--timeout=120s", timeout_s=130)
