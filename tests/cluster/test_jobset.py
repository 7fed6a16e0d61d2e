"""A JobSet whose pods are cut at one instant: on the real cluster, by the real controller."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from agent.cli import exits
from agent.model import optin
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import CHECKOUT, PROGRAM, PROJECT, ckpt

Json = dict[str, Any]


def jobset(namespace: str) -> Json:
    """Two ranks that train without end, one on each node, opted in."""
    master = {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/coordinator']"}
    container = {
        "name": "trainer",
        "image": "localhost/np:1",
        "command": ["python3", "-u", "/opt/trainer.py"],
        "env": [
            {"name": "WORLD_SIZE", "value": "2"},
            {"name": "PACE_S", "value": "0.05"},
            {"name": "MASTER_ADDR", "valueFrom": {"fieldRef": master}},
        ],
    }
    chosen = {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": "train"}}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": chosen,
    }
    pod = {
        "metadata": {"labels": {optin.LABEL: optin.ENABLED}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "topologySpreadConstraints": [spread],
            "containers": [container],
        },
    }
    job = {
        "parallelism": 2,
        "completions": 2,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "train", "namespace": namespace},
        "spec": {
            "coordinator": {"replicatedJob": "worker"},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": "worker", "template": {"spec": job}}],
        },
    }


class Training:
    """A JobSet that trains."""

    def __init__(self, cluster: Cluster, namespace: str, document: Json | None = None) -> None:
        self.cluster, self.namespace = cluster, namespace
        cluster.apply(document or jobset(namespace))
        cluster.wait_for("two ranks", lambda: len(self.pods()) == 2, 60)
        self.goes_on()

    def pods(self) -> dict[str, Json]:
        """The pods that run, by completion index."""
        found = self.cluster.get("pods", "-n", self.namespace)["items"]
        return {
            each["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: each
            for each in found
            if each["status"].get("phase") == "Running"
        }

    def lines(self, rank: str) -> list[str]:
        name = self.pods()[rank]["metadata"]["name"]
        return self.cluster.logs(name, self.namespace, "-c", "trainer").splitlines()

    def goes_on(self) -> None:
        """Both ranks take further steps, every step once, with the same weights."""
        before = {rank: len(self.lines(rank)) for rank in ("0", "1")}
        self.cluster.wait_for(
            "further steps",
            lambda: all(len(self.lines(rank)) > count + 3 for rank, count in before.items()),
            60,
        )
        told = [self.lines(rank) for rank in ("0", "1")]
        steps = [[int(line.split()[1]) for line in each] for each in told]
        assert steps[0] == list(range(1, len(steps[0]) + 1))
        assert steps[1] == list(range(1, len(steps[1]) + 1))
        weights = [[line.split(" params ")[1] for line in each] for each in told]
        assert all(a == b for a, b in zip(*weights, strict=False))

    def images(self) -> list[str]:
        found = ckpt(self.cluster, "list", "-n", self.namespace).document()
        return [each["name"] for each in found["items"]]


@pytest.fixture
def training(agents: Cluster, namespace: str) -> Training:
    return Training(agents, namespace)


def test_all_pods_are_cut_at_one_instant_and_the_job_goes_on(
    agents: Cluster, namespace: str, training: Training
) -> None:
    before = leftovers.of_all(agents)
    first = ckpt(agents, "dump", "jobset/train", "-n", namespace).document()
    training.goes_on()
    watched = ckpt(agents, "watch", "jobset/train", "-n", namespace, "--count", "1")
    second = json.loads(watched.out)
    assert "the job goes on; images: 1" in watched.err
    training.goes_on()
    members = ["worker-0-0.trainer", "worker-0-1.trainer"]
    for report in (first, second):
        assert report["jobset"] == "train"
        assert [each["name"] for each in report["members"]] == members
        assert report["connections"] == 1
        assert report["leaving"] == []
    assert second["newBytes"] < first["newBytes"]
    assert training.images() == [first["name"], second["name"]]
    assert ckpt(agents, "verify", "--all", "-n", namespace).document()["good"]
    leftovers.assert_none(agents, before)


def begun(training: Training) -> subprocess.Popen[str]:
    return subprocess.Popen(
        training.cluster.in_control_plane(
            [*PROGRAM, "dump", "jobset/train", "-n", training.namespace, "-o", "json"]
        ),
        env=os.environ
        | {"PYTHONPATH": str(CHECKOUT), "KUBECONFIG": str(training.cluster.kubeconfig)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def killed_agent(training: Training, node: str) -> Callable[[], None]:
    agents = training.cluster
    chosen = ("-l", "app.kubernetes.io/name=ckpt-agent-node")
    (agent,) = agents.get("pods", "-n", PROJECT, *chosen, f"--field-selector=spec.nodeName={node}")[
        "items"
    ]
    name = agent["metadata"]["name"]

    def kill() -> None:
        agents.kubectl("delete", "pod", name, "-n", PROJECT, "--grace-period=0", "--force")
        status = ("rollout", "status", "daemonset/ckpt-agent-node", "-n", PROJECT)
        agents.kubectl(*status, "--timeout=100s", timeout_s=110)

    return kill


@pytest.mark.parametrize("after_s", [0.5, 0.8, 1.1])
def test_an_agent_that_is_killed_costs_the_job_no_step(
    agents: Cluster, namespace: str, training: Training, after_s: float
) -> None:
    kill = killed_agent(training, "n2")
    process = begun(training)
    time.sleep(after_s)
    kill()
    status, out, err = told(process)
    # Whether it was committed before depends on the instant; half of it never is.
    assert status in (exits.DONE, exits.ENVIRONMENT, exits.FAILED), err
    training.goes_on()
    assert len(training.images()) == (1 if status == exits.DONE else 0), (out, err)
    again = ckpt(agents, "dump", "jobset/train", "-n", namespace).document()
    assert ckpt(agents, "verify", again["name"], "-n", namespace).document()["good"]


def test_a_jobset_that_does_not_run_whole_is_refused_with_every_reason(
    agents: Cluster, namespace: str
) -> None:
    document = jobset(namespace)
    document["spec"]["suspend"] = True
    agents.apply(document)
    error = ckpt(agents, "dump", "jobset/train", "-n", namespace).error()
    assert error["code"] == "target-unsuitable"
    assert error["facts"]["reasons"] == ["it is suspended"]
    missing = ckpt(agents, "dump", "jobset/none", "-n", namespace).error()
    assert missing["code"] == "not-found"
