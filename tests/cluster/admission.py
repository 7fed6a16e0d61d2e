"""The admission service as users deploy it, for the tests of it and of the policy beside it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.model import optin
from tests.cluster.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "ckpt-agent"
SERVICE = "ckpt-agent-admission"
IMAGE = "ckpt-agent:dev"
HELD = ["/.ckpt-agent/hold", "auto"]
COUNTER = ["python3", "-u", "/opt/counter.py"]
# What these tests do not need: the agents, and the store that they share.
_OTHERS = ("DaemonSet", "PersistentVolumeClaim", "PersistentVolume")


@pytest.fixture(scope="module")
def admission(cluster: Cluster) -> None:
    """The service and the policies are there, and the API server trusts the service."""
    if any(IMAGE not in _images(cluster, node) for node in cluster.nodes):
        subprocess.run([ROOT / "scripts/cluster", "agent"], check=True, timeout=900)
    text = cluster.kubectl("kustomize", str(ROOT / "deploy/overlays/dev"))
    found = [each for each in yaml.safe_load_all(text) if each["kind"] not in _OTHERS]
    cluster.apply(found)
    cluster.wait_for_deployment(SERVICE, PROJECT, 120)
    cluster.wait_for("the webhook to be called", lambda: called(cluster), 30)


def _images(cluster: Cluster, node: str) -> str:
    return cluster.node(node).exec("ctr", "-n", "k8s.io", "images", "ls", "-q").stdout


def called(cluster: Cluster) -> bool:
    """Whether a pod that nobody keeps comes back held."""
    return is_held(create(cluster, pod("probe", "default"), "--dry-run=server"))


def is_held(found: dict[str, Any]) -> bool:
    """Whether each container of a pod starts under hold."""
    return all(c["command"][:2] == HELD for c in found["spec"]["containers"])


def pod(name: str, namespace: str, **more: Any) -> dict[str, Any]:
    """A pod that wants to be checkpointed and counts."""
    container = {"name": "main", "image": "localhost/np:1", "command": COUNTER}
    annotations = more.pop("annotations", {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {optin.LABEL: optin.ENABLED},
            "annotations": annotations,
        },
        "spec": {
            "containers": [container],
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
        }
        | more,
    }


def create(
    cluster: Cluster, body: dict[str, Any], *arguments: str, kubeconfig: Path | None = None
) -> dict[str, Any]:
    """Create an object and return it as the API server stored it."""
    words = ("create", "-f", "-", "-o", "json", *arguments)
    text = cluster.kubectl(*words, stdin=json.dumps(body), kubeconfig=kubeconfig)
    found: dict[str, Any] = json.loads(text)
    return found
