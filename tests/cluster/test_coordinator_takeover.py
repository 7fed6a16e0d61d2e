"""The coordinator's leader is killed in the middle of moves of a training, on the real cluster, and
the other replica brings each to its end: no step is lost, none is computed otherwise.
"""

from __future__ import annotations

from typing import Any

from agent.coordination import leading
from tests.cluster import leftovers, test_coordinator
from tests.cluster.cluster import Cluster
from tests.cluster.midway import processes
from tests.cluster.test_cli_cluster import PROJECT, ckpt
from tests.cluster.test_coordinator import Service
from tests.cluster.test_jobset_restore import (
    RANKS,
    await_step,
    intent,
    pods,
    steps_of,
    suspended,
    training,
)

service = test_coordinator.service

Json = dict[str, Any]

# Asks for a move, and kills the replica that does it at a step of it.
MOVE = """
import os, signal
begun = replica.migrate(client.Asking(asked["namespace"], ""), "train", {nodes})
for each in replica.watch(asked["namespace"], begun.id):
    if each.step == "{step}" and (each.image is not None) == {committed}:
        os.kill({pid}, signal.SIGKILL)
        break
print(json.dumps({{"id": begun.id, "step": each.step, "over": each.over}}))
"""

# What is under way, and whether the epoch is committed.
POINTS = (("capturing", False), ("suspend", True), ("start", True), ("standing", True))


def killed_at(
    cluster: Cluster, namespace: str, service: Service, nodes: list[str], step: str, committed: bool
) -> Json:
    """The operation that lost its coordinator at that step, in the end."""
    leader, holder = service.leader()["metadata"]["name"], service.holder()
    (*_, pid) = processes(cluster, PROJECT, leader, "ckpt-agent", "python3", "python")
    token = cluster.kubectl("create", "token", "mover", "-n", namespace).strip()
    do = MOVE.format(nodes=nodes, step=step, committed=committed, pid=pid)
    met = service.call(namespace, token, do)
    assert (met["step"], met["over"]) == (step, False)
    # What happens by itself after fifteen seconds.
    patch = '{"spec": {"holderIdentity": ""}}'
    lease = ("lease", leading.LEASE_NAME, "-n", PROJECT)
    cluster.kubectl("patch", *lease, "--type=merge", "-p", patch)
    cluster.wait_for("another leader", lambda: service.holder() not in ("", holder), 30)
    seen: list[Json] = []

    def over() -> bool:
        ran = ckpt(cluster, "operations", "show", met["id"], "-n", namespace)
        seen.extend([ran.document()] if ran.status == 0 else [])
        return bool(seen and seen[-1]["state"] not in ("queued", "running"))

    cluster.wait_for("the end of the operation", over, 90)
    return seen[-1]


def test_a_leader_killed_in_the_middle_of_moves_costs_no_step(
    agents: Cluster, namespace: str, service: Service
) -> None:
    before = leftovers.of_all(agents)
    agents.kubectl("create", "serviceaccount", "mover", "-n", namespace)
    who = f"--serviceaccount={namespace}:mover"
    agents.kubectl(
        "create", "rolebinding", "mover", "-n", namespace, "--clusterrole=cluster-admin", who
    )
    agents.apply(training(namespace, 5000))
    await_step(agents, namespace, 10)
    said: dict[str, dict[int, str]] = {rank: {} for rank in RANKS}
    for step, committed in POINTS:
        here = {rank: each["spec"]["nodeName"] for rank, each in pods(agents, namespace).items()}
        for rank in RANKS:
            said[rank] |= steps_of(agents, namespace, rank)
        nodes = [agents.other_node(here[rank]).name for rank in RANKS]
        operation = killed_at(agents, namespace, service, nodes, step, committed)
        assert (operation["state"], operation["takeovers"]) == ("succeeded", 1), operation
        now = {rank: each["spec"]["nodeName"] for rank, each in pods(agents, namespace).items()}
        assert now == dict(zip(RANKS, nodes, strict=True))
        assert not suspended(agents, namespace)
        assert intent(agents, namespace) is None
        last = max(said[RANKS[0]])
        await_step(agents, namespace, last + 5)
        for rank in RANKS:
            new = steps_of(agents, namespace, rank)
            # It went on from where it was cut, which is after what it had said by then.
            assert min(new) > 1
            both = said[rank].keys() & new.keys()
            assert all(said[rank][each] == new[each] for each in both)
    agents.delete("jobset", "train", namespace)
    leftovers.assert_none(agents, before)
