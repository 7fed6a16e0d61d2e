"""Faults in the middle of dumps and restores on the real cluster: what breaks is told within a
minute or two, the dumped pod counts on without a gap, and nothing is left on either node.

One pod is dumped by all of these tests, and must have outlived them all.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli import exits
from agent.model import optin
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster, Node
from tests.cluster.midway import begun, meet, processes, told
from tests.cluster.ownvolume import Fault, OwnVolume
from tests.cluster.test_node_agent import (
    OWN,
    agent_pids,
    agent_pod,
    answered,
    assert_goes_on,
    ckpt,
    counting,
    kill,
    log,
    operations,
    refused,
    start,
    steps,
    wait_until_ready,
)

POD = "counter"


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
        return node.alive(service) and state["Ready"] == "True" and bool(log(cluster, node.name))

    cluster.wait_for(f"{service} on {node.name}", back, 60)
    wait_until_ready(cluster, node.name)


def frozen(uid: str) -> bool:
    """Whether the runtime holds the container of the pod with this uid."""
    for state in Path("/sys/fs/cgroup").glob(f"freezer/*/kubepods/**/*{uid}*/*/freezer.state"):
        if state.read_text().strip() == "FROZEN":
            return True
    return False


def tracer(pid: int) -> int:
    """Who traces the process, as the runtime's CRIU does while it dumps it; 0 if nobody."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nTracerPid:")[2].split()[0])


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
        uid = agents.get("pod", POD, "-n", team)["metadata"]["uid"]
        for _ in range(5):
            dump = begun(agents, "dump", f"pod/{POD}", "-n", team, "--engine", "kubelet")
            meet(dump, lambda: leftovers.crius(node))
            # Then it packs, and holds the container meanwhile; not for long.
            meet(dump, lambda: not leftovers.crius(node))
            if frozen(uid):
                break
            told(dump)
        else:
            pytest.fail("the container was never seen frozen after CRIU's end")
        node.kill("containerd", "TERM")
        assert told(dump)["code"] == "unreachable"
        ready(agents, node, "containerd")
        # Nothing comes after it: the kubelet takes some seconds to end what it does not understand.
        agents.wait_for("the kubelet", lambda: _synced(agents, team), 30)

    def test_a_runtime_that_is_back_while_its_criu_still_works(
        self, agents: Cluster, team: str
    ) -> None:
        node = agents.node("n1")
        member = processes(agents, team, POD, "python3")[0]
        dump = begun(agents, "dump", f"pod/{POD}", "-n", team, "--engine", "kubelet")
        meet(dump, lambda: tracer(member))
        criu = tracer(member)
        # However fast the machine is, and however little the pod has in memory.
        os.kill(criu, signal.SIGSTOP)
        try:
            node.kill("containerd")
            ready(agents, node, "containerd")
            assert tracer(member) == criu
        finally:
            os.kill(criu, signal.SIGCONT)
        assert told(dump)["code"] == "unreachable"
        agents.wait_for("CRIU's end", lambda: not leftovers.crius(node), 60)
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
            meet(program, functools.partial(operations, node))
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


@contextlib.contextmanager
def cut_off(cluster: Cluster, *nodes: str) -> Iterator[None]:
    """Without the way between these nodes and everybody else."""
    try:
        for name in nodes:
            cluster.run_in_control_plane("ip", "link", "set", name, "down")
        yield
    finally:
        for name in nodes:
            cluster.run_in_control_plane("ip", "link", "set", name, "up")


class TestNetwork:
    """The way to a node, and the API server."""

    def test_nodes_that_fall_off_the_network(
        self, agents: Cluster, team: str, image: str, placeholder: str
    ) -> None:
        dump = begun(agents, "dump", f"pod/{POD}", "-n", team)
        restore = begun(agents, "restore", image, "--pod", placeholder, "-n", team, "--again")
        meet(dump, lambda: operations(agents.node("n1")))
        meet(restore, lambda: operations(agents.node("n2")))
        with cut_off(agents, "n1", "n2"):
            began_s = time.monotonic()
            for program in (dump, restore):
                said = told(program)
                assert (program.returncode, said["code"]) == (exits.ENVIRONMENT, "unreachable")
                # It had begun: what became of it is not known here, and that is said.
                assert said["facts"]["begun"], said
            assert time.monotonic() - began_s < 60
        for node in agents.nodes.values():
            ready(agents, node, "kubelet")
        assert all(each["damage"] is None for each in found_images(agents, team))
        assert_restored(agents, team, placeholder, image)

    def test_without_the_api_server_what_has_begun_is_finished(
        self, agents: Cluster, team: str, image: str, placeholder: str
    ) -> None:
        before = len(found_images(agents, team))
        dump = begun(agents, "dump", f"pod/{POD}", "-n", team, **direct(agents, "n1"))
        there = direct(agents, "n2")
        words = ("restore", image, "--pod", placeholder, "-n", team, "--again")
        restore = begun(agents, *words, **there)
        meet(dump, lambda: operations(agents.node("n1")))
        meet(restore, lambda: operations(agents.node("n2")))
        agents.control_plane.stop("kube-apiserver", "KILL")
        try:
            results = [(told(program), program.returncode) for program in (dump, restore)]
        finally:
            agents.control_plane.resume("kube-apiserver")
        agents.wait_for("the API server", lambda: agents.get("nodes")["items"], 60)
        assert [status for _, status in results] == [0, 0], results
        agents.wait_for("an answer", lambda: len(found_images(agents, team)) == before + 1, 60)
        for node in agents.nodes.values():
            ready(agents, node, "kubelet")
        assert_restored(agents, team, placeholder, image)


def direct(cluster: Cluster, node: str) -> dict[str, str]:
    """Settings that reach a node's agent at its own address, not through the API server."""
    return {"CKPT_AGENT_AGENT_ADDRESS": f"{agent_pod(cluster, node)['status']['podIP']}:7444"}


def found_images(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = answered(ckpt(cluster, "list", "-n", namespace))["items"]
    return items


class TestPods:
    """What happens to pods, and to agents, at the wrong moment."""

    @pytest.fixture
    def victim(self, agents: Cluster, team: str) -> Iterator[str]:
        """A pod that need not outlive the test."""
        name = f"victim-{secrets.token_hex(2)}"
        start(agents, team, name, mebibytes=200)
        yield name
        agents.delete("pod", name, team, "--wait=true", "--grace-period=0", "--force")

    @pytest.mark.parametrize("engine", ["container", "kubelet"])
    def test_a_pod_deleted_while_it_is_dumped(
        self, agents: Cluster, team: str, victim: str, engine: str
    ) -> None:
        node = agents.node("n1")
        before = found_images(agents, team)
        agent = agent_pids(node)
        dump = begun(agents, "dump", f"pod/{victim}", "-n", team, "--engine", engine)
        members = processes(agents, team, victim)
        meet(dump, lambda: operations(node) if engine == "container" else leftovers.crius(node))
        agents.delete("pod", victim, team, "--wait=false", "--grace-period=0", "--force")
        if engine == "container":  # before the kubelet comes to it
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        said = told(dump)
        new = [each for each in found_images(agents, team) if each not in before]
        if engine == "kubelet" and dump.returncode == 0:  # it was done before the pod went
            assert [each["name"] for each in new] == [said["name"]]
            assert answered(ckpt(agents, "verify", said["name"], "-n", team))["good"]
        else:
            # A kubelet that has forgotten the pod meanwhile says that there is none.
            gone = engine == "kubelet" and said["code"] == "not-found"
            assert gone or dump.returncode == exits.FAILED, said
            assert new == []
        assert agent_pids(node) == agent

    def test_a_container_restarted_while_it_is_dumped(
        self, agents: Cluster, team: str, victim: str
    ) -> None:
        (first, *_) = processes(agents, team, victim, "hold")
        dump = begun(agents, "dump", f"pod/{victim}", "-n", team)
        meet(dump, lambda: operations(agents.node("n1")))
        os.kill(first, signal.SIGKILL)
        said = told(dump)
        assert (dump.returncode, said["code"]) == (exits.FAILED, "target-exited"), said

        def again() -> bool:
            (status,) = agents.get("pod", victim, "-n", team)["status"]["containerStatuses"]
            return bool(status["restartCount"] == 1 and status["ready"])

        agents.wait_for("the restart", again, 60)
        agents.wait_for("the count", lambda: steps(agents, team, victim), 30)
        answered(ckpt(agents, "dump", f"pod/{victim}", "-n", team))

    def test_a_placeholder_deleted_while_it_is_filled(
        self, agents: Cluster, team: str, image: str, placeholder: str
    ) -> None:
        words = ("restore", image, "--pod", placeholder, "-n", team, "--again")
        restore = begun(agents, *words)
        meet(restore, lambda: operations(agents.node("n2")))
        agents.delete("pod", placeholder, team, "--wait=false", "--grace-period=0", "--force")
        said = told(restore)
        assert restore.returncode != 0, said

    @pytest.mark.parametrize("moment", ["capturing", "committing"])
    def test_an_agent_killed_while_it_dumps_and_stops(
        self, agents: Cluster, team: str, victim: str, moment: str
    ) -> None:
        """The pod runs on, or waits for the image that is then there."""
        node = agents.node("n1")
        agent = agent_pids(node)
        dump = begun(agents, "dump", f"pod/{victim}", "-n", team, "--stop")
        meet(dump, lambda: operations(node))
        if moment == "committing":
            group = agents.shared / "store" / team / "groups" / victim
            meet(dump, lambda: list(group.glob("*/epoch")))
        kill(agent)
        told(dump)
        wait_until_ready(agents)
        stored = [each for each in found_images(agents, team) if each["group"] == victim]
        before = steps(agents, team, victim)
        time.sleep(1)
        if steps(agents, team, victim) == before:
            (image,) = stored
            answered(ckpt(agents, "restore", image["name"], "--pod", victim, "-n", team))
        assert_goes_on(agents, team, victim)


class TestVolume:
    """The store's volume fails at the node that restores."""

    @pytest.fixture
    def volume(self, agents: Cluster, team: str, image: str) -> Iterator[OwnVolume]:
        (agent,) = agent_pids(agents.node("n2"))
        volume = OwnVolume(agent, team)
        with volume.mounted():
            yield volume

    def assert_waits(self, cluster: Cluster, namespace: str, name: str) -> None:
        """Nothing of the image ran or runs, and the placeholder is what it was."""
        assert cluster.logs(name, namespace, "-c", "c") == ""
        assert len(processes(cluster, namespace, name)) == 1
        (status,) = cluster.get("pod", name, "-n", namespace)["status"]["containerStatuses"]
        assert (status["restartCount"], status["ready"]) == (0, True)

    @pytest.mark.parametrize(
        ("fault", "code"), [(OwnVolume.full, "volume-full"), (OwnVolume.read_only, "volume-gone")]
    )
    def test_one_that_takes_nothing_refuses_a_restore_and_does_not_harm_one_that_has_begun(
        self,
        agents: Cluster,
        team: str,
        image: str,
        placeholder: str,
        volume: OwnVolume,
        fault: Fault,
        code: str,
    ) -> None:
        words = ("restore", image, "--pod", placeholder, "-n", team)
        with fault(volume):
            done = ckpt(agents, *words)
            said = refused(done)
            assert (done.returncode, said["code"]) == (exits.VOLUME, code)
            assert said["hint"]
            self.assert_waits(agents, team, placeholder)
        restore = begun(agents, *words)
        meet(restore, lambda: volume.claimed(image))
        with volume.broken_at_once(fault):
            said = told(restore)
        assert restore.returncode == 0, said
        assert volume.claimed(image)
        assert_restored(agents, team, placeholder, image)

    def test_one_that_is_gone_ends_a_restore_which_then_can_be_tried_again(
        self, agents: Cluster, team: str, image: str, placeholder: str, volume: OwnVolume
    ) -> None:
        words = ("restore", image, "--pod", placeholder, "-n", team)
        restore = begun(agents, *words)
        meet(restore, lambda: volume.claimed(image))
        with volume.broken_at_once(OwnVolume.gone):
            said = told(restore)
            assert (restore.returncode, said["code"]) == (exits.VOLUME, "volume-gone"), said
            assert said["hint"]
            self.assert_waits(agents, team, placeholder)
        answered(ckpt(agents, *words))
        assert_restored(agents, team, placeholder, image)


# io_uring_setup; a mount of its own; a process that somebody stopped.
URING = "import ctypes; ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120))"
MOUNT = "import ctypes; assert not ctypes.CDLL(None).mount(b'own', b'/mnt', b'tmpfs', 0, None)"
COUNT = "\nimport time\nn = 0\nwhile True: print(n, True, flush=True); n += 1; time.sleep(0.1)\n"


class TestRefused:
    """What cannot be dumped as it is, or not now."""

    def odd(self, namespace: str, name: str, first: str = "", **spec: Any) -> dict[str, Any]:
        made = counting(namespace, name)
        made["spec"] |= spec
        (container,) = made["spec"]["containers"]
        container["command"] = ["python3", "-u", "-c", first + COUNT]
        if first == MOUNT:
            container["securityContext"] = {"privileged": True}
        return made

    def test_pods_that_cannot_be_dumped_are_told_why_and_run_on(
        self, agents: Cluster, team: str
    ) -> None:
        wanted = {"uring": "io_uring", "mount": "/mnt", "host": "the node's own network"}
        agents.apply(
            [
                self.odd(team, "uring", URING),
                self.odd(team, "mount", MOUNT),
                self.odd(team, "host", hostNetwork=True),
                self.odd(team, "crash", "raise SystemExit(3)\n"),
            ]
        )
        for name in wanted:
            agents.wait_for_pod(name, team)
            agents.wait_for("the count", functools.partial(steps, agents, team, name), 30)
        try:
            for name, words in wanted.items():
                done = ckpt(agents, "dump", f"pod/{name}", "-n", team, "--engine", "container")
                said = refused(done)
                assert (done.returncode, said["code"]) == (exits.REFUSED, "target-unsuitable")
                assert words in said["message"], said
                assert said["hint"]
                assert_goes_on(agents, team, name)

            def crashes() -> bool:
                (status,) = agents.get("pod", "crash", "-n", team)["status"]["containerStatuses"]
                return "waiting" in status["state"]

            agents.wait_for("the crash loop", crashes, 60)
            said = refused(ckpt(agents, "dump", "pod/crash", "-n", team))
            assert said["code"] in ("target-unsuitable", "not-found"), said
        finally:
            for name in (*wanted, "crash"):
                agents.delete("pod", name, team, "--grace-period=0", "--force", "--wait=false")

    def test_a_second_dump_of_the_same_pod_is_refused_at_once(
        self, agents: Cluster, team: str
    ) -> None:
        node = agents.node("n1")
        first = begun(agents, "dump", f"pod/{POD}", "-n", team, "--engine", "kubelet")
        meet(first, lambda: leftovers.crius(node))
        second = ckpt(agents, "dump", f"pod/{POD}", "-n", team)
        # It may have come too late to be in the way.
        assert second.returncode == 0 or refused(second)["code"] == "target-busy", second.stderr
        assert told(first)["kind"] == "DumpReport"

    def test_a_process_that_somebody_stopped_holds_nobody_up(
        self, agents: Cluster, team: str
    ) -> None:
        agents.apply(self.odd(team, "stopped"))
        agents.wait_for_pod("stopped", team)
        agents.wait_for("the count", lambda: steps(agents, team, "stopped"), 30)
        workload = processes(agents, team, "stopped", "python3")
        for pid in workload:
            os.kill(pid, signal.SIGSTOP)
        try:
            answered(ckpt(agents, "dump", "pod/stopped", "-n", team))
            # runc would never end.
            done = ckpt(agents, "dump", "pod/stopped", "-n", team, "--engine", "kubelet")
            assert "is stopped" in refused(done)["message"], done.stderr
            states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in workload]
            assert set(states) == {"T"}
            for pid in workload:
                os.kill(pid, signal.SIGCONT)
            assert_goes_on(agents, team, "stopped")
        finally:
            agents.delete("pod", "stopped", team, "--grace-period=0", "--force", "--wait=false")
