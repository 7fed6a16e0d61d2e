"""Pods that a label selector makes a group: cut at one instant, stopped, and back again, where they
are and on exchanged nodes with other addresses.
"""

from __future__ import annotations

from typing import Any

from agent.model import optin
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import ckpt, counter
from tests.cluster.test_jobset_restore import steps_in

Json = dict[str, Any]
RANKS = ("rank-0", "rank-1")


def rank(name: str, namespace: str, node: str, master: str, image: str = "") -> Json:
    """A rank of a training that two bare pods do; with ``image`` it waits for that."""
    environment = {
        "WORLD_SIZE": "2",
        "PACE_S": "0.05",
        "JOB_COMPLETION_INDEX": name[-1],
        "MASTER_ADDR": master,
    }
    found = counter(name, namespace, node, **environment)
    found["metadata"]["labels"]["app"] = "solver"
    if image:
        found["metadata"]["annotations"] = {optin.RESTORE: image}
    found["spec"]["terminationGracePeriodSeconds"] = 0
    found["spec"]["containers"][0]["command"] = ["python3", "-u", "/opt/trainer.py"]
    return found


def steps(cluster: Cluster, namespace: str) -> list[dict[int, str]]:
    return [steps_in(cluster.logs(each, namespace, "-c", "main")) for each in RANKS]


def goes_on(cluster: Cluster, namespace: str) -> int:
    """Both ranks take further steps with the same weights; the last that both have taken."""
    before = [max(each, default=0) for each in steps(cluster, namespace)]
    cluster.wait_for(
        "further steps",
        lambda: all(
            max(now, default=0) > was + 3
            for now, was in zip(steps(cluster, namespace), before, strict=True)
        ),
        60,
    )
    one, other = steps(cluster, namespace)
    both = one.keys() & other.keys()
    assert all(one[n].split(" params ")[1] == other[n].split(" params ")[1] for n in both)
    return max(both)


def test_the_pods_of_a_selector_are_stopped_and_moved_at_one_instant(
    agents: Cluster, namespace: str
) -> None:
    before = leftovers.of_all(agents)
    agents.apply(rank("rank-0", namespace, "n1", "localhost"))
    agents.wait_for_pod("rank-0", namespace)
    master = agents.get("pod", "rank-0", "-n", namespace)["status"]["podIP"]
    agents.apply(rank("rank-1", namespace, "n2", master))
    agents.wait_for_pod("rank-1", namespace)
    goes_on(agents, namespace)
    chosen = ("group/solver", "-l", "app=solver", "-n", namespace)
    stopped = ckpt(agents, "dump", *chosen, "--stop").document()
    assert [each["name"] for each in stopped["members"]] == ["rank-0.main", "rank-1.main"]
    assert (stopped["stopped"], stopped["connections"], stopped["leaving"]) == (True, 1, [])
    here = ckpt(agents, "restore", "group/solver", "-n", namespace).document()
    assert all(each["was"] == each["now"] for each in here["pods"])
    goes_on(agents, namespace)

    taken = ckpt(agents, "dump", *chosen).document()
    assert not taken["stopped"]
    cut = goes_on(agents, namespace)
    agents.kubectl("delete", "pods", "-n", namespace, "--grace-period=0", "--force", *RANKS)
    gone = ckpt(agents, "restore", "group/solver", "-n", namespace).error()
    assert gone["facts"]["reasons"] == ["there is no pod rank-0", "there is no pod rank-1"]
    for name, node in zip(RANKS, ("n2", "n1"), strict=True):
        agents.apply(rank(name, namespace, node, "nobody", taken["name"]))
    back = ckpt(agents, "restore", "group/solver", "-n", namespace).document()
    assert back["name"] == taken["name"]
    for each in back["pods"]:
        assert each["was"]["node"] != each["now"]["node"]
        assert set(each["was"]["addresses"]).isdisjoint(each["now"]["addresses"])
        assert each["lost"] == []
    goes_on(agents, namespace)
    # From the step of the cut on, none twice and none left out.
    assert all(min(each) <= cut for each in steps(agents, namespace))
    agents.kubectl("delete", "pods", "-n", namespace, "--grace-period=0", "--force", *RANKS)
    leftovers.assert_none(agents, before)
