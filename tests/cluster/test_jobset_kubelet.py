"""A JobSet whose pods are captured by their kubelets while the network between them is held: one
cut, or none.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import leftovers, midway
from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import ckpt
from tests.cluster.test_jobset import Training
from tests.cluster.test_jobset_restore import (
    NUMPY,
    RANKS,
    await_step,
    pods,
    steps_in,
    steps_of,
    training,
    uninterrupted,
)

STEPS = 160
KUBELET = ("--engine", "kubelet")


def test_pods_captured_by_their_kubelets_end_elsewhere_bit_for_bit_as_if_nothing_had_been(
    agents: Cluster, namespace: str
) -> None:
    before = leftovers.of_all(agents)
    document = training(namespace, STEPS)
    document["spec"]["failurePolicy"] = {"maxRestarts": 3}
    agents.apply([document, uninterrupted(namespace, STEPS, NUMPY)])
    await_step(agents, namespace, 10)
    stopping = ckpt(agents, "dump", "jobset/train", "-n", namespace, *KUBELET, "--stop").error()
    assert stopping["code"] == "target-unsuitable"
    report = ckpt(agents, "dump", "jobset/train", "-n", namespace, *KUBELET).document()
    assert (report["engine"], report["connections"], report["leaving"]) == ("kubelet", 1, [])
    cut = max(steps_of(agents, namespace, RANKS[0]))
    await_step(agents, namespace, cut + 5)
    lost = pods(agents, namespace)
    names = [each["metadata"]["name"] for each in lost.values()]
    agents.kubectl("delete", "pods", "-n", namespace, "--grace-period=0", "--force", *names)
    here = lost[RANKS[0]]["spec"]["nodeName"]
    there = agents.other_node(here).name

    words = ("restore", "jobset/train", "-n", namespace, "--replace")
    back = ckpt(agents, *words, "--node", there, "--node", here).document()

    assert (back["name"], back["passedOver"]) == (report["name"], [])
    for each in back["pods"]:
        assert {each["was"]["node"], each["now"]["node"]} == {here, there}
        assert set(each["was"]["addresses"]).isdisjoint(each["now"]["addresses"])
    agents.wait_for(
        "the end of the training",
        lambda: all(
            each["status"]["phase"] == "Succeeded" for each in pods(agents, namespace).values()
        ),
        120,
    )
    agents.wait_for_pod("uninterrupted", namespace, "Succeeded", timeout_s=120)
    for rank in RANKS:
        whole = steps_in(agents.logs("uninterrupted", namespace, "-c", rank))
        lines = steps_of(agents, namespace, rank)
        assert min(lines) <= cut + 1
        assert max(lines) == STEPS == len(whole)
        assert lines == {step: whole[step] for step in lines}
    leftovers.assert_none(agents, before)


@pytest.fixture
def no_criu_on_n2(agents: Cluster) -> Iterator[Callable[[], int]]:
    """Takes CRIU's options on the node for something else, and gives them back."""
    conf = agents.node("n2").root / "etc/criu/runc.conf"
    content = conf.read_bytes()
    yield lambda: conf.write_bytes(content + b"no-such-option\n")
    conf.write_bytes(content)


def test_a_kubelet_that_fails_or_hangs_costs_the_job_nothing(
    agents: Cluster, namespace: str, no_criu_on_n2: Callable[[], int]
) -> None:
    training = Training(agents, namespace)
    before = leftovers.of_all(agents)
    at = {each["spec"]["nodeName"]: each["metadata"]["name"] for each in training.pods().values()}
    near, *_ = midway.processes(agents, namespace, at["n1"])
    *_, far = midway.processes(agents, namespace, at["n2"])
    words = ("dump", "jobset/train", "-n", namespace, *KUBELET)

    hung = midway.begun(agents, *words)
    midway.meet(hung, lambda: tracer(far))
    criu = tracer(far)
    os.kill(criu, signal.SIGSTOP)
    try:
        assert tables(near)
        hung.send_signal(signal.SIGINT)
        # Nobody waits for the one that hangs.
        agents.wait_for("an end of the hold", lambda: not tables(near), 20)
    finally:
        os.kill(criu, signal.SIGCONT)
    assert midway.told(hung)["code"] == "interrupted"
    training.goes_on()

    no_criu_on_n2()
    failed = ckpt(agents, *words).error()
    assert (failed["code"], failed["facts"]["member"][:-1]) == ("criu-failed", "worker-0-")
    training.goes_on()

    assert training.images() == []
    for each in training.pods().values():
        (status,) = each["status"]["containerStatuses"]
        assert not status["restartCount"]
    assert [*tables(near), *tables(far)] == []
    leftovers.assert_none(agents, before)


def tracer(pid: int) -> int:
    """Who traces a process; 0 if nobody."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nTracerPid:")[2].split()[0])


def tables(pid: int) -> list[str]:
    """The agent's tables in the network namespace of a process."""
    listed = ["nsenter", f"--net=/proc/{pid}/ns/net", "nft", "list", "tables"]
    lines = subprocess.check_output(listed, text=True).splitlines()
    return [each for each in lines if "ckpt-agent" in each]
