"""The coordinator's service on the real cluster: README's client with the rights that it is said to
need, callers who lack them, operations that meet each other, and a leader that is killed while the
pods it froze stand still.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agent.cli import exits
from agent.coordination import leading
from tests import readme
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster
from tests.cluster.machine import ClusterError
from tests.cluster.midway import begun, processes, stands, told
from tests.cluster.test_cli_cluster import CHECKOUT, PROJECT, ckpt
from tests.cluster.test_jobset import Training
from tests.cluster.test_jobset_restore import await_step, pods, steps_of

Json = dict[str, Any]
PYTHON = "/usr/local/lib/ckpt-agent/venv/bin/python"
CHOSEN = ("-l", "app.kubernetes.io/name=ckpt-agent-coordinator")
# An agent that hears nothing lets its pod go after five seconds; the rest is a busy machine.
SOON_S = 25.0

# A caller with a token that asks the replica that serves for what its first argument says.
CALLER = """
import json, sys
from agent import errors
from agent.rpc import channels, coordinatorclient as client
asked = json.load(sys.stdin)
credentials = channels.Credentials(
    asked["ca"].encode(), "ckpt-agent-coordinator.ckpt-agent.svc", lambda: asked["token"]
)
def begin(replica, key, wait=False):
    return replica.create_epoch(
        client.Asking(asked["namespace"], key, wait), client.Target(jobset="train")
    )
def attempt(call):
    try:
        return {"id": call().id}
    except errors.CkptError as exc:
        return {"code": exc.code, "message": exc.message, "facts": exc.facts}
with client.connect(asked["address"], credentials, peer="the coordinator") as replica:
    exec(asked["do"])
"""
ONE = """
print(json.dumps(attempt(lambda: begin(replica, asked["key"]))))
"""
MEETING = """
first = begin(replica, "one")
said = [attempt(lambda: begin(replica, "two")), attempt(lambda: begin(replica, "three", True))]
cancelled = replica.cancel(asked["namespace"], first.id)
both = (first.id, said[1]["id"])
ends = [list(replica.watch(asked["namespace"], each))[-1].state.value for each in both]
print(json.dumps({"first": first.id, "said": said, "ends": ends}))
"""


class Service:
    """The coordinator as callers find it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        (self.ca,) = cluster.get("configmap", "ckpt-agent-ca", "-n", PROJECT)["data"].values()

    def leader(self) -> Json:
        """The pod of the replica that serves."""
        spec = self.cluster.get("lease", leading.LEASE_NAME, "-n", PROJECT)["spec"]
        name = str(spec.get("holderIdentity") or "").partition("_")[0]
        return self.cluster.get("pod", name, "-n", PROJECT)

    def holder(self) -> str:
        spec = self.cluster.get("lease", leading.LEASE_NAME, "-n", PROJECT)["spec"]
        return str(spec.get("holderIdentity"))

    def call(self, namespace: str, token: str, do: str = ONE, key: str = "") -> Json:
        """What a caller with this token is told."""
        asked = {
            "ca": self.ca,
            "address": f"{self.leader()['status']['podIP']}:7543",
            "token": token,
            "namespace": namespace,
            "do": do,
            "key": key,
        }
        done = self.cluster.run_in_control_plane(
            *(sys.executable, "-c", CALLER),
            stdin=json.dumps(asked),
            environment={"PYTHONPATH": str(CHECKOUT)},
        )
        found: Json = json.loads(done.stdout)
        return found

    def token(self, namespace: str, account: str, *more: str) -> str:
        return self.cluster.kubectl("create", "token", account, "-n", namespace, *more).strip()


@pytest.fixture
def service(agents: Cluster) -> Service:
    found = Service(agents)
    # After an update the certificate reaches the pods with the kubelet's next look at its Secret.
    agents.wait_for("a replica that serves", found.leader, 60)
    return found


@pytest.fixture
def training(agents: Cluster, namespace: str) -> Training:
    return Training(agents, namespace)


@contextlib.contextmanager
def account(cluster: Cluster, namespace: str, name: str, of: str = "") -> Iterator[str]:
    """A ServiceAccount of ``namespace`` that may do what users may in the namespace ``of``, and
    reach the coordinator; README says no more is needed.
    """
    who = f"--serviceaccount={namespace}:{name}"
    cluster.kubectl("create", "serviceaccount", name, "-n", namespace)
    if of:
        role = "--clusterrole=ckpt-agent-user"
        cluster.kubectl("create", "rolebinding", f"{namespace}-{name}", "-n", of, role, who)
    reaching = f"test-{namespace}-{name}"
    cluster.kubectl(
        "create", "rolebinding", reaching, "-n", PROJECT, "--role=ckpt-agent-client", who
    )
    try:
        yield name
    finally:
        cluster.delete("rolebinding", reaching, PROJECT)


def scheduler(namespace: str, name: str, key: str) -> Json:
    """README's client, word for word."""
    container = {
        "name": "client",
        "image": "ckpt-agent:dev",
        "imagePullPolicy": "Never",
        "command": [PYTHON, "-c", readme.client(), namespace, "train", key],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "serviceAccountName": "scheduler",
            "restartPolicy": "Never",
            "containers": [container],
        },
    }


def test_a_scheduler_has_a_job_dumped_once_and_nobody_who_may_not(
    agents: Cluster, namespace: str, training: Training, service: Service
) -> None:
    before = leftovers.of_all(agents)
    with account(agents, namespace, "scheduler", of=namespace):
        agents.apply([scheduler(namespace, each, "maintenance") for each in ("first", "again")])
        for each in ("first", "again"):
            agents.wait_for_pod(each, namespace, "Succeeded")
        said = [agents.logs(each, namespace).split()[-1] for each in ("first", "again")]
        assert training.images() == [said[0]]
        assert said[0] == said[1], "the same key is the same operation"
        (operation,) = ckpt(agents, "operations", "-n", namespace).document()["items"]
        assert operation["caller"] == f"system:serviceaccount:{namespace}:scheduler"
        assert (operation["state"], operation["image"]["name"]) == ("succeeded", said[0])
        training.goes_on()
        mine = service.token(namespace, "scheduler")
        # What it may here it may not there, whatever is there.
        assert service.call("default", mine, key="x")["code"] == "forbidden"
        limited = service.token(namespace, "scheduler", "--audience=ckpt-agent.dev")
        assert service.call(namespace, limited, key="maintenance")["id"] == operation["name"]
    with account(agents, namespace, "nobody"):
        theirs = service.token(namespace, "nobody")
        told = service.call(namespace, theirs, key="maintenance")
        assert told["code"] == "forbidden"
        assert "create images.ckpt-agent.dev" in told["message"]
    for token in ("", "nonsense", f"{mine[:-6]}AAAAAA"):
        assert service.call(namespace, token, key="maintenance")["code"] == "unauthenticated"
    assert training.images() == [said[0]]
    assert len(ckpt(agents, "operations", "-n", namespace).document()["items"]) == 1
    leftovers.assert_none(agents, before)


def test_of_two_epochs_at_once_one_is_refused_or_waits_and_a_cancelled_one_costs_nothing(
    agents: Cluster, namespace: str, training: Training, service: Service
) -> None:
    before = leftovers.of_all(agents)
    with account(agents, namespace, "scheduler", of=namespace):
        found = service.call(namespace, service.token(namespace, "scheduler"), MEETING)
    refused, waited = found["said"]
    assert (refused["code"], refused["facts"]["operation"]) == ("target-busy", found["first"])
    assert "id" in waited
    assert found["ends"] == ["cancelled", "succeeded"]
    assert len(training.images()) == 1
    cancelled = ckpt(agents, "operations", "show", found["first"], "-n", namespace).document()
    assert cancelled["error"]["code"] == "interrupted"
    training.goes_on()
    leftovers.assert_none(agents, before)


def test_a_leader_that_is_killed_while_pods_stand_still_costs_them_seconds_and_no_epoch(
    agents: Cluster, namespace: str, training: Training, service: Service
) -> None:
    before = leftovers.of_all(agents)
    ranks = [
        processes(agents, namespace, each["metadata"]["name"])[-1]
        for each in training.pods().values()
    ]
    dead = service.leader()["metadata"]["name"]
    holder = service.holder()
    (*_, pid) = processes(agents, PROJECT, dead, "ckpt-agent", "python3", "python")
    dump = begun(agents, "dump", "jobset/train", "-n", namespace, "--coordinator")
    deadline = time.monotonic() + 60
    while not all(map(stands, ranks)):
        assert dump.poll() is None, dump.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    assert all(map(stands, ranks)), "it was met too late"
    agents.wait_for("the ranks to run", lambda: not any(map(stands, ranks)), SOON_S, 0.05)
    assert service.holder() == holder, "they ran by themselves, before anybody took over"
    training.goes_on()
    report = told(dump)
    assert dump.returncode == exits.DONE, report
    assert training.images() == [report["name"]]
    (operation,) = ckpt(agents, "operations", "-n", namespace).document()["items"]
    assert (operation["state"], operation["takeovers"]) == ("succeeded", 1)
    assert operation["name"] == report["operation"]
    assert service.leader()["metadata"]["name"] != dead
    assert ckpt(agents, "verify", report["name"], "-n", namespace).document()["good"]
    leftovers.assert_none(agents, before)


def test_a_job_moves_and_comes_back_by_the_service(agents: Cluster, namespace: str) -> None:
    before = leftovers.of_all(agents)
    Training(agents, namespace)
    here = {rank: each["spec"]["nodeName"] for rank, each in pods(agents, namespace).items()}
    there = {rank: agents.other_node(node).name for rank, node in here.items()}
    to = [word for rank in sorted(there) for word in ("--to", there[rank])]
    moved = ckpt(agents, "migrate", "jobset/train", "-n", namespace, *to, "--coordinator")
    report = moved.document()
    assert (report["operation"], report["state"]) == ("migrate", "succeeded")
    now = {each["member"]: each["now"]["node"] for each in report["pods"]}
    assert now == there
    cut = max(steps_of(agents, namespace, "worker-0-0"), default=0)
    await_step(agents, namespace, cut + 5)
    words = ("restore", "jobset/train", "-n", namespace, "--replace", "--coordinator")
    back = ckpt(agents, *words).document()
    assert (back["operation"], back["state"]) == ("restore", "succeeded")
    assert back["image"]["name"] == report["image"]["name"]
    await_step(agents, namespace, min(steps_of(agents, namespace, "worker-0-0")) + 5)
    agents.delete("jobset", "train", namespace)
    leftovers.assert_none(agents, before)


def test_what_roles_cannot_say_of_the_coordinator_the_policy_does(
    agents: Cluster, namespace: str
) -> None:
    """As the coordinator itself: by a token of its ServiceAccount."""
    who = f"--as=system:serviceaccount:{PROJECT}:ckpt-agent-coordinator"
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "tried", "namespace": namespace},
        "spec": {"containers": [{"name": "c", "image": "localhost/np:1"}]},
    }
    text = json.dumps(pod)
    create = ("create", who, "-f", "-")
    agents.kubectl(*create, "--dry-run=server", stdin=text)
    with pytest.raises(ClusterError, match="the coordinator makes no pods"):
        agents.kubectl(*create, stdin=text)
    own = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "other", "namespace": PROJECT},
    }
    with pytest.raises(ClusterError, match="changes no ConfigMaps but those of its operations"):
        agents.kubectl(*create, stdin=json.dumps(own))
    with pytest.raises(ClusterError, match="changes no ConfigMaps but those of its operations"):
        agents.kubectl("delete", "configmap", "ckpt-agent-ca", "-n", PROJECT, who)
    with pytest.raises(ClusterError, match="cannot get resource"):
        agents.kubectl("get", "secret", "ckpt-agent-ca", "-n", PROJECT, who)
