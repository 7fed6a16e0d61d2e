"""The pod that is measured: a clock that tells its own stops, over memory that compresses by half.

Promises: the stop is what the job itself sees: the longest time between two of its steps.
Does not: change its memory, unless told to.
"""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from typing import Any

from agent.model import optin
from tests.cluster.cluster import Cluster

# Between two of its lines, each of which tells the longest time between two steps since the one
# before.
_LINE_S = 0.25
_PROGRAM = f"""
import os, sys, time
size = int(os.environ["MEMORY_MIB"]) << 20
share = float(os.environ["DIRTY_SHARE_PER_S"])
memory = bytearray(size)
half = bytes(range(256)) * 8
for at in range(0, size, 4096):
    memory[at : at + 4096] = os.urandom(2048) + half
print("ready", flush=True)
last = told = time.monotonic()
longest, due, step, pages = 0.0, 0.0, 0, size // 4096
while True:
    now = time.monotonic()
    gap, last = now - last, now
    longest = max(longest, gap)
    if now - told > {_LINE_S}:
        print("gap", longest, time.time(), flush=True)
        told, longest = now, 0.0
    # What was missed in a long stop is not made up for.
    due = min(due + gap * share * pages, share * pages)
    while due >= 1:
        step, due = (step + 7919) % pages, due - 1
        memory[step * 4096] = (memory[step * 4096] + 1) % 256
    time.sleep(0.001)
"""


@dataclasses.dataclass(frozen=True)
class Gap:
    """The longest stop of a quarter of a second as the job saw it, and when that was over (seconds
    since 1970).
    """

    length_s: float
    at_s: float


def pod(
    name: str,
    node: str,
    memory_mib: int,
    dirty_share_per_s: float = 0.0,
    *,
    opted_in: bool = True,
) -> dict[str, Any]:
    """A pod on ``node`` that runs the clock, and writes to that share of its pages a second."""
    terms = [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    env = {"MEMORY_MIB": memory_mib, "DIRTY_SHARE_PER_S": dirty_share_per_s}
    container = {
        "name": "main",
        "image": "localhost/np:1",
        "command": ["python3", "-c", _PROGRAM],
        "env": [{"name": key, "value": str(value)} for key, value in env.items()],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {optin.LABEL: optin.ENABLED} if opted_in else {}},
        "spec": {
            "affinity": {"nodeAffinity": required},
            "terminationGracePeriodSeconds": 0,
            "restartPolicy": "Never",
            "containers": [container],
        },
    }


def start(cluster: Cluster, namespace: str, *bodies: dict[str, Any]) -> None:
    """Create the pods and wait until their memory is filled."""
    for body in bodies:
        cluster.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(body))
    for body in bodies:
        name = body["metadata"]["name"]
        cluster.wait_for_pod(name, namespace)
        cluster.wait_for("the clock", partial(_ready, cluster, namespace, name), 120)


def _ready(cluster: Cluster, namespace: str, name: str) -> bool:
    return "ready" in _log(cluster, namespace, name)


def longest_s(cluster: Cluster, namespace: str, name: str, since_s: float) -> float:
    """The longest stop that ended after ``since_s`` (seconds since 1970), seconds; returns when the
    job has told of all until now.
    """
    until_s = time.time() + _LINE_S
    found: list[Gap] = []

    def told() -> bool:
        found[:] = _gaps(cluster, namespace, name)
        return bool(found) and found[-1].at_s > until_s

    cluster.wait_for("the clock", told, 60)
    return max(gap.length_s for gap in found if gap.at_s > since_s)


def _gaps(cluster: Cluster, namespace: str, name: str) -> list[Gap]:
    words = [line.split() for line in _log(cluster, namespace, name).splitlines()]
    return [Gap(float(each[1]), float(each[2])) for each in words if each[:1] == ["gap"]]


def _log(cluster: Cluster, namespace: str, name: str) -> str:
    return cluster.logs(name, namespace, "-c", "main")
