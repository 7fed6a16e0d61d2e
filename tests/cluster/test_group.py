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


# Two lines of numbers: one that the pod says to whoever calls it, one that it hears where it calls.
TALKS = """
import contextlib, socket, sys, threading, time
def serve():
    server = socket.create_server(('', 7000))
    while True:
        peer = server.accept()[0]
        threading.Thread(target=say, args=(peer,), daemon=True).start()
def say(peer):
    number = 0
    with contextlib.suppress(OSError):
        while True:
            number += 1
            peer.sendall(b'%d\\n' % number)
            time.sleep(0.05)
threading.Thread(target=serve).start()
while sys.argv[1:]:
    try:
        heard = socket.create_connection((sys.argv[1], 7000), timeout=5)
        heard.settimeout(None)
        for line in heard.makefile():
            print(line, end='', flush=True)
    except OSError:
        time.sleep(0.1)
"""


def talking(name: str, namespace: str, node: str, calls: str = "", image: str = "") -> Json:
    found = counter(name, namespace, node)
    if image:
        found["metadata"]["annotations"] = {optin.RESTORE: image}
    found["metadata"]["labels"]["app"] = name
    found["spec"]["terminationGracePeriodSeconds"] = 0
    found["spec"]["containers"][0]["command"] = ["python3", "-c", TALKS, *calls.split()]
    return found


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


def test_a_pod_is_cut_with_all_that_are_connected_with_it_also_through_a_service(
    agents: Cluster, namespace: str
) -> None:
    """front calls middle by its Service, middle calls back by its address; a pod that never opted
    in calls back, too. They come back on exchanged nodes.
    """

    def numbers(name: str) -> list[int]:
        return [int(each) for each in agents.logs(name, namespace, "-c", "main").splitlines()]

    def heard(name: str) -> int:
        return len(numbers(name))

    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "middle", "namespace": namespace},
        "spec": {"selector": {"app": "middle"}, "ports": [{"port": 7000}]},
    }
    agents.apply(service)
    agents.apply(talking("back", namespace, "n1"))
    agents.apply(talking("aside", namespace, "n2"))
    agents.wait_for_pod("back", namespace)
    back = agents.get("pod", "back", "-n", namespace)["status"]["podIP"]
    agents.apply(talking("middle", namespace, "n2", back))
    agents.wait_for_pod("middle", namespace)
    through = agents.get("service", "middle", "-n", namespace)["spec"]["clusterIP"]
    agents.apply(talking("front", namespace, "n1", through))
    stranger = talking("stranger", namespace, "n2", back)
    del stranger["metadata"]["labels"][optin.LABEL]
    agents.apply(stranger)
    for name in ("front", "middle", "stranger"):
        agents.wait_for_pod(name, namespace)
        agents.wait_for("numbers", lambda name=name: heard(name) > 3, 60)  # type: ignore[misc]

    before = leftovers.of_all(agents)
    ran = ckpt(agents, "dump", "pod/front", "--follow", "-n", namespace)
    taken = ran.document()
    assert taken["name"].startswith("followed.front@")
    assert [each["name"] for each in taken["members"]] == ["back.main", "front.main", "middle.main"]
    assert "also cuts pod middle: connected with front through a Service" in ran.err
    assert "also cuts pod back: connected with middle (" in ran.err
    assert "pod stranger is not opted in" in ran.err
    # Both ends of it are in the image; those of the other see different addresses.
    assert taken["connections"] == 1
    assert ckpt(agents, "verify", taken["name"], "-n", namespace).document()["good"]
    for name in ("front", "middle", "stranger"):
        was = heard(name)
        agents.wait_for("more", lambda name=name, was=was: heard(name) > was + 3, 30)  # type: ignore[misc]

    last, members = max(numbers("middle")), ("back", "front", "middle")
    agents.kubectl("delete", "pods", "-n", namespace, "--grace-period=0", "--force", *members)
    for name, node in zip(members, ("n2", "n2", "n1"), strict=True):
        agents.apply(talking(name, namespace, node, image=taken["name"]))
    done = ckpt(agents, "restore", "group/followed.front", "-n", namespace).document()
    assert done["name"] == taken["name"]
    lost = {each["member"]: each["lost"] for each in done["pods"]}
    # What a Service's address hid has no other end at the new ones, as a stranger's has not.
    assert lost["front"] == [f"{through}:7000"]
    assert len(lost["back"]) == 1
    agents.wait_for("numbers after the cut", lambda: max(numbers("middle"), default=0) > last, 30)
    again = numbers("middle")
    assert again == list(range(again[0], again[0] + len(again)))
    agents.wait_for("front to call again", lambda: 1 in numbers("front"), 30)
    agents.kubectl("delete", "pods", "-n", namespace, "--grace-period=0", "--force", *members)
    leftovers.assert_none(agents, before)
