"""PyTorch that trains data-parallel goes on, on another node, as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import ckpt, counter, followed

RANKS = ("rank-0", "rank-1")
STEPS = 150


def training(name: str, namespace: str, node: str, image: str) -> dict[str, Any]:
    """Two ranks as the containers of one pod, which add up gradients over TCP."""
    pod = counter(name, namespace, node)
    pod["spec"]["restartPolicy"] = "Never"
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "STEPS": str(STEPS), "PACE_S": "0.1"}
    pod["spec"]["containers"] = [
        {
            "name": rank,
            "image": image,
            "imagePullPolicy": "Never",
            "command": ["python3", "-u", "/opt/trainer.py"],
            "env": [
                {"name": key, "value": value}
                for key, value in {**shared, "JOB_COMPLETION_INDEX": str(number)}.items()
            ],
        }
        for number, rank in enumerate(RANKS)
    ]
    return pod


def steps(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_that_moves_in_the_middle_ends_bit_for_bit_as_one_that_does_not(
    agents: Cluster, torch_image: str, namespace: str
) -> None:
    whole, moving = (
        training(name, namespace, node, torch_image)
        for name, node in (("stays", "n2"), ("moves", "n1"))
    )
    agents.apply([whole, moving])
    agents.wait_for_pod("moves", namespace, timeout_s=120)

    def under_way() -> bool:
        return len(steps(agents.logs("moves", namespace, "-c", "rank-0"))) >= STEPS // 4

    with (
        followed(agents, namespace, "moves", "rank-0") as zero,
        followed(agents, namespace, "moves", "rank-1") as one,
    ):
        agents.wait_for("a quarter of the steps", under_way, 300)
        ckpt(agents, "migrate", "pod/moves", "--to", "n2", "-n", namespace).document()
        before = dict(zip(RANKS, (steps(zero.text()), steps(one.text())), strict=True))
    for pod in ("moves", "stays"):
        agents.wait_for_pod(pod, namespace, "Succeeded", timeout_s=400)
    for rank in RANKS:
        after = steps(agents.logs("moves", namespace, "-c", rank))
        assert STEPS // 4 <= len(before[rank]) < STEPS
        uninterrupted = steps(agents.logs("stays", namespace, "-c", rank))
        assert len(uninterrupted) == STEPS
        # Loss and parameters of every step as exact hexadecimal floats.
        assert before[rank] + after == uninterrupted
