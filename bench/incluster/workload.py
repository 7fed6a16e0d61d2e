"""The pod that is measured: a clock that tells its own stops, over memory that compresses by half.

Promises: the stop is what the job itself sees: the longest time between two of its steps.
Does not: change its memory, unless told to.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from agent.model import optin
from tests.cluster.cluster import Cluster

# A step a millisecond; longer gaps than this are told. The cluster's own noise on two cores comes
# to a few milliseconds.
_TOLD_S = 0.01
_PROGRAM = f"""
import os, sys, time
size = int(os.environ["MEMORY_MIB"]) << 20
dirty = int(os.environ["DIRTY_PAGES_A_STEP"])
memory = bytearray(size)
half = bytes(range(256)) * 8
for at in range(0, size, 4096):
    memory[at : at + 4096] = os.urandom(2048) + half
print("ready", flush=True)
last, step, pages = time.monotonic(), 0, size // 4096
while True:
    now = time.monotonic()
    if now - last > {_TOLD_S}:
        print("gap", now - last, time.time(), flush=True)
    last = time.monotonic()
    for _ in range(dirty):
        step = (step + 7919) % pages
        memory[step * 4096] = (memory[step * 4096] + 1) % 256
    time.sleep(0.001)
"""


@dataclasses.dataclass(frozen=True)
class Gap:
    """A stop as the job saw it, and when it was over (seconds since 1970)."""

    length_s: float
    at_s: float


def pod(name: str, node: str, memory_mib: int, dirty_pages_a_step: int = 0) -> dict[str, Any]:
    """An opted-in pod on ``node`` that runs the clock."""
    terms = [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    env = {"MEMORY_MIB": memory_mib, "DIRTY_PAGES_A_STEP": dirty_pages_a_step}
    container = {
        "name": "main",
        "image": "localhost/np:1",
        "command": ["python3", "-c", _PROGRAM],
        "env": [{"name": key, "value": str(value)} for key, value in env.items()],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {optin.LABEL: optin.ENABLED}},
        "spec": {
            "affinity": {"nodeAffinity": required},
            "terminationGracePeriodSeconds": 0,
            "restartPolicy": "Never",
            "containers": [container],
        },
    }


def start(cluster: Cluster, namespace: str, body: dict[str, Any]) -> None:
    """Create the pod and wait until its memory is filled."""
    name = body["metadata"]["name"]
    cluster.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(body))
    cluster.wait_for_pod(name, namespace)
    cluster.wait_for("the clock", lambda: "ready" in _log(cluster, namespace, name), 120)


def gaps(cluster: Cluster, namespace: str, name: str, since_s: float) -> list[Gap]:
    """The stops that ended after ``since_s``."""
    words = [line.split() for line in _log(cluster, namespace, name).splitlines()]
    found = [Gap(float(each[1]), float(each[2])) for each in words if each[:1] == ["gap"]]
    return [gap for gap in found if gap.at_s > since_s]


def _log(cluster: Cluster, namespace: str, name: str) -> str:
    return cluster.logs(name, namespace, "-c", "main")
