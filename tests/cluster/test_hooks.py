"""Hooks in a real cluster: by the runtime's own exec, with the rights that the deployment gives the
agent, in a pod that moves to another node.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.model import optin
from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import ckpt

QUIESCE = Path(__file__).resolve().parents[2] / "hooks" / "quiesce.py"
LOOP = """
import sys, time
sys.path.insert(0, '/module')
from quiesce import Boundary
with Boundary('/run/quiesce.sock', longest_s=60) as boundary:
    print('started', flush=True)
    while True:
        time.sleep(0.05)
        if found := boundary.reached():
            now, was = found.told['now'], found.told['was'] or {}
            print(found.outcome, now['node'], *now['addresses'], was.get('node'), flush=True)
"""


def calling(name: str) -> dict[str, Any]:
    return {"name": name, "unix": {"socket": "/run/quiesce.sock", "path": f"/{name}"}}


def running(name: str, script: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "exec": ["sh", "-c", script], **fields}


HOOKS = {
    "pre": [
        running("note", "(echo $CKPT_AGENT_POD; grep CapEff /proc/self/status) >> /tmp/noted"),
        calling("quiesce"),
        {"name": "sync", "action": "sync"},
    ],
    "post": [
        calling("resume"),
        running(
            "report", 'echo "$CKPT_AGENT_OUTCOME $CKPT_AGENT_NODE" >> /tmp/noted', when="decided"
        ),
        running("bad", "echo oh; exit 3"),
    ],
}


def loop(namespace: str, name: str, hooks: object) -> dict[str, Any]:
    module = {"name": "module", "configMap": {"name": "module"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {optin.LABEL: optin.ENABLED},
            "annotations": {optin.HOOKS: json.dumps(hooks)},
        },
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "volumes": [module],
            "containers": [
                {
                    "name": "c",
                    "image": "localhost/np:1",
                    "imagePullPolicy": "Never",
                    "command": ["python3", "-u", "-c", LOOP],
                    "volumeMounts": [{"name": "module", "mountPath": "/module"}],
                }
            ],
        },
    }


def test_a_loop_is_held_for_a_dump_and_a_move_and_told_where_it_is(
    agents: Cluster, namespace: str
) -> None:
    module = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "module", "namespace": namespace},
        "data": {"quiesce.py": QUIESCE.read_text()},
    }
    agents.apply([module, loop(namespace, "loop", HOOKS)])
    agents.wait_for_pod("loop", namespace)
    lines(agents, namespace, "started")
    found = agents.get("pod", "loop", "-n", namespace)
    here, address = found["spec"]["nodeName"], found["status"]["podIP"]
    there = "n2" if here == "n1" else "n1"

    dumped = ckpt(agents, "dump", "pod/loop", "-n", namespace)
    assert dumped.status == 0, dumped.err
    problem = "the hook 'bad' failed: it ended with status 3\noh"
    assert json.loads(dumped.out)["hookProblems"] == [problem]
    assert lines(agents, namespace, "captured") == ["started", f"captured {here} {address} None"]
    # As any container's command of this cluster.
    own = agents.kubectl(
        "exec", "loop", "-n", namespace, "--", "grep", "CapEff", "/proc/self/status"
    )
    noted = ["loop", own.strip(), f"committed {here}"]
    shown = agents.kubectl("exec", "loop", "-n", namespace, "--", "cat", "/tmp/noted")
    assert shown.splitlines() == noted

    moved = ckpt(agents, "migrate", "pod/loop", "-n", namespace, "--to", there)
    assert moved.status == 0, moved.err
    address = agents.get("pod", "loop", "-n", namespace)["status"]["podIP"]
    assert lines(agents, namespace, "restored") == [f"restored {there} {address} {here}"]
    shown = agents.kubectl("exec", "loop", "-n", namespace, "--", "cat", "/tmp/noted")
    assert shown.splitlines() == [*noted, *noted[:2], f"restored {there}"]


def lines(agents: Cluster, namespace: str, word: str) -> list[str]:
    """What the pod has said, when ``word`` is among it."""

    def said() -> str:
        return agents.kubectl("logs", "loop", "-n", namespace, "-c", "c")

    agents.wait_for(f"{word!r} in the log", lambda: word in said(), 30)
    return said().splitlines()
