"""What the admission service is asked about: pods that want to be checkpointed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.model import optin
from tests.cluster.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "ckpt-agent"
SERVICE = "ckpt-agent-admission"
HELD = ["/.ckpt-agent/hold", "auto"]
COUNTER = ["python3", "-u", "/opt/counter.py"]


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


def create(cluster: Cluster, body: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """Create an object and return it as the API server stored it."""
    text = cluster.kubectl("create", "-f", "-", "-o", "json", *arguments, stdin=json.dumps(body))
    found: dict[str, Any] = json.loads(text)
    return found
