"""A JobSet that comes back: on exchanged nodes, with new addresses, made by the real controller."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from agent.cli import exits
from agent.model import optin
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import ckpt
from tests.cluster.test_jobset import jobset

Json = dict[str, Any]

RANKS = ("worker-0-0", "worker-0-1")
NUMPY = "localhost/np:1"


def training(namespace: str, steps: int, image: str = NUMPY, world: int = 2) -> Json:
    """So many ranks, spread over the nodes, that end after ``steps``."""
    document = jobset(namespace)
    (job,) = document["spec"]["replicatedJobs"]
    job["template"]["spec"] |= {"parallelism": world, "completions": world}
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    container["env"][0]["value"] = str(world)
    container |= {"image": image, "imagePullPolicy": "Never"}
    container["env"].append({"name": "STEPS", "value": str(steps)})
    return document


def uninterrupted(namespace: str, steps: int, image: str, world: int = 2) -> Json:
    """All ranks in one pod, as fast as they can."""
    env = {"WORLD_SIZE": str(world), "PACE_S": "0", "STEPS": str(steps), "MASTER_ADDR": "localhost"}
    containers = [
        {
            "name": f"worker-0-{rank}",
            "image": image,
            "imagePullPolicy": "Never",
            "command": ["python3", "-u", "/opt/trainer.py"],
            "env": [
                {"name": key, "value": value}
                for key, value in {**env, "JOB_COMPLETION_INDEX": str(rank)}.items()
            ],
        }
        for rank in range(world)
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "uninterrupted", "namespace": namespace},
        "spec": {"restartPolicy": "Never", "containers": containers},
    }


def pods(cluster: Cluster, namespace: str) -> dict[str, Json]:
    """The JobSet's pods, by what they are called in it."""
    found = cluster.get("pods", "-n", namespace, "-l", "jobset.sigs.k8s.io/jobset-name=train")
    completion = "batch.kubernetes.io/job-completion-index"
    return {
        f"worker-0-{each['metadata']['labels'][completion]}": each
        for each in found["items"]
        if not each["metadata"].get("deletionTimestamp")
    }


def steps_of(cluster: Cluster, namespace: str, rank: str) -> dict[int, str]:
    """What a rank has said of each step."""
    found = pods(cluster, namespace).get(rank)
    if found is None or found["status"]["phase"] == "Pending":
        return {}
    return steps_in(cluster.logs(found["metadata"]["name"], namespace, "-c", "trainer"))


def steps_in(text: str) -> dict[int, str]:
    """What is said of each step; nothing is said twice or left out."""
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    numbers = [int(line.split()[1]) for line in lines]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    return dict(zip(numbers, lines, strict=True))


def await_step(cluster: Cluster, namespace: str, step: int, ranks: Sequence[str] = RANKS) -> None:
    cluster.wait_for(
        f"step {step} of all ranks",
        lambda: all(max(steps_of(cluster, namespace, rank), default=0) >= step for rank in ranks),
        240,
    )


def suspended(cluster: Cluster, namespace: str) -> bool:
    return bool(cluster.get("jobset", "train", "-n", namespace)["spec"].get("suspend"))


def intent(cluster: Cluster, namespace: str) -> str | None:
    metadata = cluster.get("jobset", "train", "-n", namespace)["metadata"]
    return (metadata.get("annotations") or {}).get(optin.RESTORE)


def killed_and_moved(
    agents: Cluster, namespace: str, image: str, steps: int, world: int = 2
) -> None:
    """A JobSet loses all of its pods at a random step after a dump, comes back on exchanged nodes,
    moves back, and ends; each step is as if nothing had happened.
    """
    before = leftovers.of_all(agents)
    ranks = [f"worker-0-{rank}" for rank in range(world)]
    document = training(namespace, steps, image, world)
    # A lost pod makes JobSet start all over, as it would for a user.
    document["spec"]["failurePolicy"] = {"maxRestarts": 3}
    agents.apply(document)
    await_step(agents, namespace, 20, ranks)
    taken = ckpt(agents, "dump", "jobset/train", "-n", namespace).document()["name"]
    cut = max(steps_of(agents, namespace, "worker-0-0"))
    await_step(agents, namespace, cut + random.randrange(1, 20), ranks)
    lost = pods(agents, namespace)
    names = [each["metadata"]["name"] for each in lost.values()]
    agents.kubectl("delete", "pods", "-n", namespace, "--grace-period=0", "--force", *names)

    ran = ckpt(agents, "restore", "jobset/train", "-n", namespace).error()
    assert (ran["code"], "--replace" in ran["hint"]) == ("restore-conflict", True)
    here = lost[ranks[0]]["spec"]["nodeName"]
    there = agents.other_node(here).name
    assert {each["spec"]["nodeName"] for each in lost.values()} == {here, there}
    words = ("restore", "jobset/train", "-n", namespace, "--replace")
    report = ckpt(agents, *words, "--node", there, "--node", here).document()
    assert (report["name"], report["created"], report["passedOver"]) == (taken, False, [])
    for each in report["pods"]:
        old, new = each["was"], each["now"]
        assert old["pod"] == lost[each["member"]]["metadata"]["name"]
        assert {old["node"], new["node"]} == {here, there}
        assert set(old["addresses"]).isdisjoint(new["addresses"])
    await_step(agents, namespace, cut + 10, ranks)
    assert min(steps_of(agents, namespace, "worker-0-0")) <= cut + 1
    said = [(rank, steps_of(agents, namespace, rank)) for rank in ranks]

    back = ("migrate", "jobset/train", "-n", namespace, "--to", here, "--to", there)
    moved = ckpt(agents, *back)
    assert [each["was"] for each in moved.document()["pods"]] == [
        each["now"] for each in report["pods"]
    ]
    assert intent(agents, namespace) is None
    agents.wait_for(
        "the end of the training",
        lambda: all(
            each["status"]["phase"] == "Succeeded" for each in pods(agents, namespace).values()
        ),
        240,
    )
    said += [(rank, steps_of(agents, namespace, rank)) for rank in ranks]
    # Whoever was moved after its last step has none to tell of.
    last = {
        rank: max(step for who, lines in said if who == rank for step in lines) for rank in ranks
    }
    assert set(last.values()) == {steps}
    leftovers.assert_none(agents, before)
    agents.apply(uninterrupted(namespace, steps, image, world))
    agents.wait_for_pod("uninterrupted", namespace, "Succeeded", timeout_s=240)
    for rank, lines in said:
        whole = steps_in(agents.logs("uninterrupted", namespace, "-c", rank))
        assert len(whole) == steps
        assert lines == {step: whole[step] for step in lines}


def test_a_jobset_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    agents: Cluster, namespace: str
) -> None:
    killed_and_moved(agents, namespace, NUMPY, 250)


def test_four_ranks_two_on_each_node_that_were_killed_end_bit_for_bit_as_if_they_were_not(
    agents: Cluster, namespace: str
) -> None:
    killed_and_moved(agents, namespace, NUMPY, 300, world=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_jobset_of_pytorch_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    agents: Cluster, torch_image: str, namespace: str
) -> None:
    killed_and_moved(agents, namespace, torch_image, 600)


def damage(cluster: Cluster, namespace: str, image: str) -> None:
    """Change a byte in the middle of everything that only this image has."""
    epoch = image.partition("@")[2]
    store = cluster.node("n1").root / "srv/shared/store" / namespace
    packs = [path for path in store.glob(f"packs/{epoch}-*/*") if path.stat().st_size]
    assert packs
    for path in packs:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def test_a_deleted_jobset_is_made_again_waits_for_room_and_comes_back_from_an_image_that_is_whole(
    agents: Cluster, namespace: str
) -> None:
    document = training(namespace, 0)
    template = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    apart = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": "train"}},
    }
    template["spec"]["affinity"] = {
        "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}
    }
    agents.apply(document)
    await_step(agents, namespace, 5)
    older = ckpt(agents, "dump", "jobset/train", "-n", namespace).document()["name"]
    await_step(agents, namespace, max(steps_of(agents, namespace, RANKS[0])) + 5)
    newer = ckpt(agents, "dump", "jobset/train", "-n", namespace).document()["name"]
    damage(agents, namespace, newer)
    agents.kubectl("delete", "jobset", "train", "-n", namespace)
    agents.wait_for("no pods", lambda: not pods(agents, namespace), 30)

    # One node has no room for both of its pods.
    words = ("restore", "jobset/train", "-n", namespace, "--node", "n1")
    ran = ckpt(agents, *words, CKPT_AGENT_SCHEDULE_DEADLINE="4s")
    # After what it says on its way.
    error = json.loads(ran.err[ran.err.index("{") :])
    assert (ran.status, error["code"]) == (exits.MOVE_INCOMPLETE, "move-incomplete")
    assert any("has no node" in reason for reason in error["facts"]["reasons"])
    command = f"ckpt-agent restore jobset/train@{newer.partition('@')[2]} -n {namespace} --node n1"
    assert error["facts"]["next"] == [command]
    assert suspended(agents, namespace)
    assert newer in (intent(agents, namespace) or "")

    report = ckpt(agents, "restore", "jobset/train", "-n", namespace).document()
    assert report["name"] == older
    assert [each["name"] for each in report["passedOver"]] == [newer]
    # The nodes that were chosen before count no more.
    assert {each["now"]["node"] for each in report["pods"]} == {"n1", "n2"}
    last = max(steps_of(agents, namespace, RANKS[0]), default=0)
    await_step(agents, namespace, last + 5)
    weights = [
        {
            step: line.split(" params ")[1]
            for step, line in steps_of(agents, namespace, rank).items()
        }
        for rank in RANKS
    ]
    both = weights[0].keys() & weights[1].keys()
    assert len(both) > 3
    assert all(weights[0][step] == weights[1][step] for step in both)
