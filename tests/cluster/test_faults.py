"""Faults in the middle of dumps and restores on the real cluster: what breaks is told within a
minute or two, the dumped pod counts on without a gap, and nothing is left on either node.

One pod is dumped by all of these tests, and must have outlived them all.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.model import optin
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster, Node
from tests.cluster.test_node_agent import (
    CHECKOUT,
    OWN,
    agent_pod,
    answered,
    assert_goes_on,
    ckpt,
    counting,
    log,
    operations,
    start,
    wait_until_ready,
)

POD = "counter"
TOLD_S = 120


@pytest.fixture(scope="module")
def team(agents: Cluster) -> Iterator[str]:
    """A namespace with a counting pod on n1 that all tests here dump."""
    name = f"faults-{secrets.token_hex(4)}"
    agents.kubectl("create", "namespace", name)
    account = ("serviceaccount", "default", "-n", name)
    agents.wait_for("the default ServiceAccount", lambda: agents.get(*account), 30)
    try:
        start(agents, name, POD, mebibytes=200)
        yield name
    finally:
        agents.kubectl("delete", "namespace", name, "--wait=false")
        agents.kubectl("delete", "pods", "--all", "-n", name, "--timeout=90s")


@pytest.fixture(scope="module")
def image(agents: Cluster, team: str) -> str:
    """An image of that pod."""
    name: str = answered(ckpt(agents, "dump", f"pod/{POD}", "-n", team))["name"]
    return name


@pytest.fixture(autouse=True)
def unharmed(agents: Cluster, team: str) -> Iterator[None]:
    """After the test the pod counts on without a gap, and both nodes have what they had before."""
    before = leftovers.of_all(agents)
    yield
    assert_goes_on(agents, team, POD)
    leftovers.assert_none(agents, before)
    members = processes(agents, team, POD)
    rules = ["nsenter", f"--net=/proc/{members[0]}/ns/net", "nft", "list", "ruleset"]
    # The runtime's CRIU leaves iptables' empty tables; nothing may be kept from passing.
    text = subprocess.check_output(rules, text=True)
    assert not [word for word in ("drop", "ckpt-agent", "CRIU") if word in text], text
    for pid in members:
        assert "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text()


def processes(cluster: Cluster, namespace: str, name: str, program: str = "") -> list[int]:
    """The processes of a pod's containers, as this machine numbers them."""
    uid = cluster.get("pod", name, "-n", namespace)["metadata"]["uid"]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            named = (entry / "comm").read_text().strip()
            if uid in (entry / "cgroup").read_text() and named.startswith(program):
                found.append(int(entry.name))
    return sorted(found)


@pytest.fixture
def placeholder(agents: Cluster, team: str, image: str) -> Iterator[str]:
    """A pod on n2 that waits for the image."""
    name = f"copy-{secrets.token_hex(2)}"
    made = counting(team, name, "n2", mebibytes=200)
    made["metadata"]["annotations"] = {optin.RESTORE: image}
    agents.apply(made)
    agents.wait_for_pod(name, team)
    yield name
    agents.delete("pod", name, team, "--wait=true")


def begun(cluster: Cluster, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The program at work, as a person started it."""
    words = [f"{name}={value}" for name, value in environment.items()]
    program = [CHECKOUT / ".venv/bin/ckpt-agent", *arguments, "-o", "json", "--quiet"]
    argv = ["env", f"KUBECONFIG={cluster.kubeconfig}", *words, *program]
    return subprocess.Popen(
        cluster.in_control_plane(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def meet(popen: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait for the moment at which something is to break; the program must not have ended."""
    deadline = time.monotonic() + 60
    while not condition():
        assert popen.poll() is None, popen.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def told(popen: subprocess.Popen[str]) -> dict[str, Any]:
    """What it said in the end: a result, or an error with its ``code``."""
    out, err = popen.communicate(timeout=TOLD_S)
    said: dict[str, Any] = json.loads(out if popen.returncode == 0 else err)
    assert popen.returncode == 0 or (said["code"] and said["message"]), (out, err)
    return said


def assert_restored(cluster: Cluster, namespace: str, name: str, image: str) -> None:
    """The copy counts from where the image was taken; restores it if that was not reached."""

    def lines() -> list[str]:
        return cluster.logs(name, namespace, "-c", "c").splitlines()

    if not lines():
        again = ("restore", image, "--pod", name, "-n", namespace, "--again")
        answered(ckpt(cluster, *again))
    cluster.wait_for("the copy to count", lambda: len(lines()) > 3, 30)
    found = lines()
    first = int(found[0].split()[0])
    assert first > 0
    assert found == [f"{first + number} True" for number in range(len(found))]


def ready(cluster: Cluster, node: Node, service: str) -> None:
    """Wait until a service that was killed is back, and the node with it."""

    def back() -> bool:
        found = cluster.get("node", node.name)["status"]["conditions"]
        state = {each["type"]: each["status"] for each in found}
        # It answers for its pods again, and the runtime for it.
        agent = agent_pod(cluster, node.name)["metadata"]["name"]
        cluster.kubectl("exec", agent, "-n", OWN, "--", "true")
        return node.alive(service) and state["Ready"] == "True" and log(cluster, node.name)

    cluster.wait_for(f"{service} on {node.name}", back, 60)
    wait_until_ready(cluster, node.name)


def frozen(cluster: Cluster, namespace: str, name: str) -> bool:
    """Whether the runtime holds the pod's container."""
    uid = cluster.get("pod", name, "-n", namespace)["metadata"]["uid"]
    for state in Path("/sys/fs/cgroup").glob(f"freezer/*/kubepods/**/*{uid}*/*/freezer.state"):
        if state.read_text().strip() == "FROZEN":
            return True
    return False


class TestComponents:
    """The node's own programs."""

    def test_a_kubelet_killed_while_it_checkpoints(self, agents: Cluster, team: str) -> None:
        node = agents.node("n1")
        dump = begun(agents, "dump", f"pod/{POD}", "-n", team, "--engine", "kubelet")
        meet(dump, lambda: leftovers.crius(node))
        node.kill("kubelet")
        # The way to the agent leads through the kubelet.
        assert told(dump)["code"] == "unreachable"
        ready(agents, node, "kubelet")

    def test_a_runtime_restarted_while_it_checkpoints(self, agents: Cluster, team: str) -> None:
        node = agents.node("n1")
        dump = begun(agents, "dump", f"pod/{POD}", "-n", team, "--engine", "kubelet")
        meet(dump, lambda: leftovers.crius(node))
        # Then it packs, and holds the container meanwhile.
        meet(dump, lambda: not leftovers.crius(node))
        assert frozen(agents, team, POD)
        node.kill("containerd", "TERM")
        assert told(dump)["code"] == "unreachable"
        ready(agents, node, "containerd")
        # Nothing comes after it: the kubelet takes some seconds to end what it does not understand.
        agents.wait_for("the kubelet", lambda: _synced(agents, team), 30)

    @pytest.mark.parametrize("service", ["kubelet", "containerd"])
    def test_the_container_engine_needs_neither(
        self, agents: Cluster, team: str, image: str, placeholder: str, service: str
    ) -> None:
        here, there = agents.node("n1"), agents.node("n2")
        restarts = agent_pod(agents)["status"]["containerStatuses"][0]["restartCount"]
        dump = begun(agents, "dump", f"pod/{POD}", "-n", team)
        restore = begun(agents, "restore", image, "--pod", placeholder, "-n", team, "--again")
        for node, program in ((here, dump), (there, restore)):
            meet(program, lambda node=node: operations(node))
            node.kill(service)
        for program in (dump, restore):
            said = told(program)
            assert program.returncode == 0 or said["code"] == "unreachable", said
        for node in (here, there):
            ready(agents, node, service)
        assert_restored(agents, team, placeholder, image)
        assert agent_pod(agents)["status"]["containerStatuses"][0]["restartCount"] == restarts


def _synced(cluster: Cluster, namespace: str) -> bool:
    """Whether the kubelet has looked at its pods since now."""
    name = f"probe-{secrets.token_hex(2)}"
    made = counting(namespace, name)
    made["metadata"]["labels"] = {}
    cluster.apply(made)
    cluster.wait_for_pod(name, namespace)
    cluster.delete("pod", name, namespace)
    return True
