"""A pod that is watched on the real cluster: what becomes of it, of its images and of what follows
its memory when the watch's caller and its agent are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from tests.cluster import midway
from tests.cluster.cluster import Cluster
from tests.cluster.test_node_agent import (
    agent_pids,
    answered,
    assert_clean,
    assert_goes_on,
    ckpt,
    images,
    kill,
    operations,
    start,
    wait_until_ready,
)

MEBIBYTES = 64


def followed(pids: list[int]) -> bool:
    """Whether the agent holds what follows others' memory."""
    for each in (each for pid in pids for each in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            if "userfaultfd" in os.readlink(each):
                return True
    return False


def test_a_watched_pod_goes_on_whoever_ends_and_its_last_image_is_restored_elsewhere(
    agents: Cluster, namespace: str
) -> None:
    start(agents, namespace, mebibytes=MEBIBYTES)
    node, where = agents.node("n1"), ("-n", namespace)
    agent = agent_pids(node)
    watch = midway.begun(agents, "watch", "pod/counter", *where, "--every", "2s")
    midway.meet(watch, lambda: len(images(agents, namespace)) >= 3)
    for each in images(agents, namespace)[:3]:
        shown = answered(ckpt(agents, "show", each, *where))
        assert shown["detail"][0]["stop"]["path"] == "precopy"
        # All of it is in each, whatever was read for it.
        assert shown["rawBytes"] > MEBIBYTES << 20
    # Its caller is gone without a word: the agent lets go of the pod by itself.
    watch.kill()
    watch.communicate()
    agents.wait_for("the watch's end", lambda: not followed(agent) and not operations(node), 90)
    assert_goes_on(agents, namespace)
    # The agent is killed while it follows the pod's memory.
    watch = midway.begun(
        agents, "watch", "pod/counter", *where, "--every", "2s", "--keep-last", "1"
    )
    midway.meet(watch, lambda: len(images(agents, namespace)) == 1 and followed(agent))
    kill(agent)
    _, err = watch.communicate(timeout=60)
    assert watch.returncode != 0
    assert json.loads(err)["code"] == "unreachable", err
    assert_goes_on(agents, namespace)
    wait_until_ready(agents)
    assert_clean(agents)
    last = images(agents, namespace)[-1]
    assert answered(ckpt(agents, "verify", last, *where))["good"]
    before = int(agents.logs("counter", namespace, "-c", "c").splitlines()[-1].split()[0])
    answered(ckpt(agents, "restore", last, *where, "--node", "n2", "--replace"))

    def counted() -> list[str]:
        return agents.logs("counter", namespace, "-c", "c").splitlines()

    agents.wait_for("the count", lambda: len(counted()) > 60, 30)
    numbers = [int(each.split()[0]) for each in counted()]
    assert 0 < numbers[0] <= before
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert all(each.endswith(" True") for each in counted())
