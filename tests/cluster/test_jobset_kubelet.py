"""A JobSet whose pods are captured by their kubelets while the network between them is held: one
cut, or none.
"""

from __future__ import annotations

from tests.cluster import leftovers
from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import ckpt
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
