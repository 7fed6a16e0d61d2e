"""Several storages on the real cluster: the words of pods and namespaces, the agents' right to read
them, and two real volumes.
"""

from __future__ import annotations

from tests.cluster.cluster import SHARED, Cluster
from tests.cluster.test_node_agent import answered, assert_goes_on, ckpt, refused, start

FAST = f"{SHARED}/store-fast"


def test_images_go_where_pod_or_namespace_say_and_are_found_from_the_other_node(
    agents: Cluster, namespace: str
) -> None:
    start(agents, namespace)

    def say(kind: str, name: str, storage: str) -> None:
        word = f"ckpt-agent.dev/storage={storage}" if storage else "ckpt-agent.dev/storage-"
        agents.kubectl("annotate", "--overwrite", kind, name, "-n", namespace, word)

    def dumped() -> tuple[str, str]:
        found = answered(ckpt(agents, "dump", "pod/counter", "-n", namespace))
        return found["name"], found["storage"]

    usual = dumped()
    assert usual[1] == "default"
    say("namespace", namespace, "fast")
    fast = dumped()
    assert fast[1] == "fast"
    say("pod", "counter", "slow")

    def refusal() -> str:
        done = ckpt(agents, "dump", "pod/counter", "-n", namespace)
        return str(refused(done)["message"]) if done.returncode else ""

    # The agent hears of the pod's new word a moment later.
    agents.wait_for("a refusal", lambda: "'slow'" in refusal(), 20)
    assert_goes_on(agents, namespace)
    say("pod", "counter", "")

    for node in ("n1", "n2"):
        there = agents.node(node).exec("find", f"{FAST}/{namespace}/groups/counter").stdout
        assert fast[0].partition("@")[2] in there
    listed = answered(ckpt(agents, "list", "-n", namespace))
    assert listed["unread"] == []
    assert (listed["items"][0]["name"], listed["items"][0]["storage"]) == usual
    assert all(each["storage"] == "fast" for each in listed["items"][1:])

    # Dumped here, restored there, by the storage's own volume.
    moved = answered(ckpt(agents, "migrate", "pod/counter", "--to", "n2", "-n", namespace))
    assert (moved["storage"], moved["target"]) == ("fast", "n2")

    def counts() -> list[str]:
        return agents.logs("counter", namespace, "-c", "c").splitlines()

    agents.wait_for("the count", lambda: len(counts()) > 3, 30)
    first = int(counts()[0].split()[0])
    assert first > 0
    assert all(line == f"{number} True" for number, line in enumerate(counts(), first))
    pruned = answered(
        ckpt(agents, "prune", "--keep-last", "1", "--storage", "fast", "-n", namespace)
    )
    assert {each["storage"] for each in pruned["items"]} == {"fast"}
    left = answered(ckpt(agents, "list", "-n", namespace))["items"]
    assert [(each["name"], each["storage"]) for each in left] == [usual, (moved["name"], "fast")]

    checks = answered(ckpt(agents, "doctor", "-n", namespace))["checks"]
    states = {each["name"]: each["status"] for each in checks}
    for name in ("n1/store", "n1/store fast", "n2/store", "n2/store fast"):
        assert states[name] == "ok"
