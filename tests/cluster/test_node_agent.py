"""The node agent on the real cluster: who may do what, and what becomes of pods when the agent, the
runtime or the API server is killed in the middle.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.model import optin
from agent.model.access import API_GROUP
from tests.cluster.cluster import Cluster, Node

CHECKOUT = Path(__file__).resolve().parents[2]
SELECTOR = "app.kubernetes.io/name=ckpt-agent-node"
OWN = "ckpt-agent"
# A process with that many MiB, which counts aloud ten times a second and must miss nothing.
COUNTING = """
import sys, time, numpy
block = numpy.random.default_rng(7).bytes(int(sys.argv[1]) << 20)
known = hash(block)
step = 0
while True:
    good = hash(bytes(block)) == known if step % 50 == 0 else True
    # At once: of a runtime that is killed between a line's parts the log would have half of it.
    print(f"{step} {good}\\n", end="", flush=True)
    step += 1
    time.sleep(0.1)
"""


def counting(namespace: str, name: str, node: str = "n1", *, mebibytes: int = 1) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {optin.LABEL: optin.ENABLED},
        },
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "c",
                    "image": "localhost/np:1",
                    "imagePullPolicy": "Never",
                    "command": ["python3", "-u", "-c", COUNTING, str(mebibytes)],
                }
            ],
        },
    }


def start(cluster: Cluster, namespace: str, name: str = "counter", **more: Any) -> str:
    """Start a counting pod, wait until it counts, and return its uid."""
    cluster.apply(counting(namespace, name, **more))
    cluster.wait_for_pod(name, namespace, timeout_s=120)
    cluster.wait_for("the count", lambda: steps(cluster, namespace, name), 60)
    uid: str = cluster.get("pod", name, "-n", namespace)["metadata"]["uid"]
    return uid


def steps(cluster: Cluster, namespace: str, name: str = "counter") -> int:
    """How far it has counted; fails if a number is missing or its memory has changed."""
    lines = cluster.logs(name, namespace, "-c", "c").splitlines()
    for number, line in enumerate(lines):
        assert line == f"{number} True"
    return len(lines)


def assert_goes_on(cluster: Cluster, namespace: str, name: str = "counter") -> None:
    before = steps(cluster, namespace, name)
    cluster.wait_for("the count", lambda: steps(cluster, namespace, name) > before + 3, 30)
    status = cluster.get("pod", name, "-n", namespace)["status"]
    assert [each["restartCount"] for each in status["containerStatuses"]] == [0]


def ckpt(
    cluster: Cluster, *arguments: str, kubeconfig: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The program on the command line, as a person would run it."""
    environment = {"KUBECONFIG": str(kubeconfig)} if kubeconfig else {}
    return cluster.run_in_control_plane(
        CHECKOUT / ".venv/bin/ckpt-agent",
        *arguments,
        "-o",
        "json",
        "--quiet",
        environment=environment,
        check=False,
        timeout_s=180,
    )


def refused(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a refusal said."""
    assert done.returncode != 0, done.stdout
    said: dict[str, Any] = json.loads(done.stderr)
    return said


def answered(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def images(cluster: Cluster, namespace: str) -> list[str]:
    listed = answered(ckpt(cluster, "list", "-n", namespace))
    return [item["name"] for item in listed["items"]]


def agent_pod(cluster: Cluster, node: str = "n1") -> dict[str, Any]:
    found = cluster.get("pods", "-n", OWN, "-l", SELECTOR)["items"]
    here: dict[str, Any] = next(
        pod
        for pod in found
        if pod["spec"]["nodeName"] == node and "deletionTimestamp" not in pod["metadata"]
    )
    return here


def log(cluster: Cluster, node: str = "n1", *arguments: str) -> list[dict[str, Any]]:
    """The agent's log, line by line."""
    text = cluster.logs(agent_pod(cluster, node)["metadata"]["name"], OWN, *arguments)
    return [json.loads(line) for line in text.splitlines()]


def wait_until_ready(cluster: Cluster, node: str = "n1", *, but: str = "") -> None:
    def ready() -> bool:
        pod = agent_pod(cluster, node)
        conditions = {each["type"]: each["status"] for each in pod["status"]["conditions"]}
        return pod["metadata"]["uid"] != but and conditions.get("Ready") == "True"

    cluster.wait_for("the agent", ready, 90)


def reasons(cluster: Cluster, namespace: str, uid: str) -> list[str]:
    found = cluster.get("events", "-n", namespace)["items"]
    return [event["reason"] for event in found if event["involvedObject"].get("uid") == uid]


def agent_pids(node: Node) -> list[int]:
    """The agent's own process on a node, as this machine numbers it."""
    numbers = os.stat(f"/proc/{node.pid}/ns/pid").st_ino
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = b"bin/ckpt-agent\0node\0" in (entry / "cmdline").read_bytes()
            if ours and os.stat(entry / "ns/pid").st_ino == numbers:
                found.append(int(entry.name))
    return found


def kill(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def operations(node: Node) -> list[Path]:
    return list((node.root / "run/ckpt-agent/ops").glob("*.json"))


def assert_clean(cluster: Cluster, node: str = "n1") -> None:
    """Nothing of an operation is left on the node."""
    found = cluster.node(node)

    def clean() -> bool:
        kept = [
            each
            for place in ("run/ckpt-agent/ops", "run/ckpt-agent/locks", "run/ckpt-agent/pods")
            if (found.root / place).is_dir()
            for each in (found.root / place).iterdir()
        ]
        kept += list((found.root / "var/lib/ckpt-agent/work").iterdir())
        return not kept and not found.exec("pgrep", "-x", "criu", check=False).stdout

    cluster.wait_for("a clean node", clean, 30)


@pytest.fixture
def users(agents: Cluster, namespace: str) -> Iterator[Callable[..., Path]]:
    """Makes a kubeconfig of a user with these roles in the test's namespace."""
    bound: list[str] = []

    def user(name: str, *roles: str, namespace: str = namespace) -> Path:
        agents.kubectl(
            *("create", "rolebinding", f"test-{name}", "-n", OWN),
            *("--role=ckpt-agent-client", f"--user={name}"),
        )
        bound.append(f"test-{name}")
        for role in roles:
            agents.kubectl(
                *("create", "rolebinding", f"{name}-{role}", "-n", namespace),
                *(f"--clusterrole={role}", f"--user={name}"),
            )
        return agents.user_kubeconfig(name)

    yield user
    for name in bound:
        agents.delete("rolebinding", name, OWN)


class TestRights:
    def test_a_namespaces_user_acts_in_that_namespace_only(
        self, agents: Cluster, namespace: str, users: Callable[..., Path]
    ) -> None:
        uid = start(agents, namespace)
        ada = users("ada", "edit")
        bob = users("bob", "view")
        dumped = answered(ckpt(agents, "dump", "pod/counter", "-n", namespace, kubeconfig=ada))
        assert images(agents, namespace) == [dumped["name"]]
        for verb in (["dump", "pod/counter"], ["list"], ["delete", dumped["name"]]):
            said = refused(ckpt(agents, *verb, "-n", namespace, kubeconfig=bob))
            assert said["code"] == "forbidden"
            assert "bob" in said["message"]
        said = refused(ckpt(agents, "list", "-n", "kube-system", kubeconfig=ada))
        assert said["code"] == "forbidden"
        # A right of its own: who may dump may not therefore restore.
        arguments = ("restore", dumped["name"], "--pod", "counter", "-n", namespace)
        said = refused(ckpt(agents, *arguments, kubeconfig=ada))
        assert said["code"] == "forbidden"
        assert "restore images" in said["message"]
        assert images(agents, namespace) == [dumped["name"]]
        agents.wait_for(
            "the event", lambda: "CheckpointCompleted" in reasons(agents, namespace, uid), 20
        )
        assert_goes_on(agents, namespace)

    def test_tokens_count_for_whom_they_were_made(self, agents: Cluster, namespace: str) -> None:
        agents.kubectl("create", "serviceaccount", "robot", "-n", namespace)
        agents.kubectl(
            *("create", "rolebinding", "robot", "-n", namespace),
            *("--clusterrole=ckpt-agent-user", f"--serviceaccount={namespace}:robot"),
        )
        token = ("create", "token", "robot", "-n", namespace)
        ours = agents.kubectl(*token, f"--audience={API_GROUP}").strip()
        usual = agents.kubectl(*token).strip()
        other = agents.kubectl(*token, "--audience=somebody-else").strip()
        head, body, signature = usual.split(".")
        forged = ".".join((head, body, signature[::-1]))
        said = {
            name: listed(agents, namespace, value)
            for name, value in (("ours", ours), ("usual", usual), ("other", other))
        }
        assert said == {"ours": "0 images", "usual": "0 images", "other": "Unauthenticated"}
        assert listed(agents, namespace, forged) == "Unauthenticated"
        assert listed(agents, "default", usual) == "Forbidden"
        agents.kubectl("delete", "serviceaccount", "robot", "-n", namespace)
        agents.wait_for(
            "the token's end",
            lambda: listed(agents, namespace, usual) == "Unauthenticated",
            30,
        )
        written = json.dumps(log(agents))
        for value in (ours, usual, other, forged):
            assert value not in written


def listed(cluster: Cluster, namespace: str, token: str) -> str:
    """What the agent itself answers to a token, without kubectl's rights on the way."""
    program = f"""
        import base64, sys
        from agent import errors
        from agent.rpc import client
        name = "ckpt-agent-node.ckpt-agent.svc"
        authority = base64.b64decode(sys.argv[2])
        credentials = client.Credentials(authority, name, token=lambda: sys.argv[3])
        with client.connect(sys.argv[1], credentials, peer="the agent") as agent:
            try:
                print(len(agent.images({namespace!r})), "images")
            except errors.CkptError as exc:
                print(type(exc).__name__)
    """
    address = f"{agent_pod(cluster)['status']['podIP']}:7443"
    authority = cluster.get("configmap", "ckpt-agent-ca", "-n", OWN)["data"]["ca.crt"]
    done = cluster.run_in_control_plane(
        CHECKOUT / ".venv/bin/python",
        *("-c", textwrap.dedent(program), address),
        *(subprocess.check_output(["base64", "-w0"], input=authority.encode()).decode(), token),
    )
    return done.stdout.strip()


class TestFaults:
    def dumping(
        self, cluster: Cluster, namespace: str, name: str = "counter"
    ) -> subprocess.Popen[str]:
        """A dump that has begun on n1."""
        node = cluster.node("n1")
        return self.running(cluster, node, "dump", f"pod/{name}", "-n", namespace)

    def running(self, cluster: Cluster, node: Node, *arguments: str) -> subprocess.Popen[str]:
        """The program, as soon as an engine works for it on ``node``."""
        argv = cluster.in_control_plane(
            [
                "env",
                f"KUBECONFIG={cluster.kubeconfig}",
                CHECKOUT / ".venv/bin/ckpt-agent",
                *(*arguments, "-o", "json", "--quiet"),
            ]
        )
        popen = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not operations(node):
            assert popen.poll() is None, popen.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return popen

    def test_an_agent_that_is_killed_leaves_the_pod_as_it_was_and_its_successor_says_so(
        self, agents: Cluster, namespace: str
    ) -> None:
        uid = start(agents, namespace, mebibytes=300)
        agent = agent_pids(agents.node("n1"))
        dump = self.dumping(agents, namespace)
        kill(agent)
        _, said = dump.communicate(timeout=60)
        assert dump.returncode == 7, said
        assert_goes_on(agents, namespace)
        wait_until_ready(agents)
        agents.wait_for(
            "the event", lambda: "CheckpointFailed" in reasons(agents, namespace, uid), 60
        )
        told = [line for line in log(agents) if "was killed in the middle" in line["msg"]]
        assert [line["pod"] for line in told] == [f"{namespace}/counter"]
        assert_clean(agents)
        assert images(agents, namespace) == []
        answered(ckpt(agents, "dump", "pod/counter", "-n", namespace))
        assert_goes_on(agents, namespace)

    def test_an_agent_that_is_told_to_end_gives_up_in_time(
        self, agents: Cluster, namespace: str
    ) -> None:
        start(agents, namespace, mebibytes=300)
        dump = self.dumping(agents, namespace)
        old = agent_pod(agents)["metadata"]
        agents.kubectl("delete", "pod", old["name"], "-n", OWN, "--wait=false")
        _, said = dump.communicate(timeout=60)
        # Whichever came first, the end of the dump or the end of the agent.
        assert dump.returncode in (0, 7, 130), said
        agents.wait_for(
            "the old agent's end",
            lambda: old["name"] not in agents.kubectl("get", "pods", "-n", OWN),
            35,
        )
        wait_until_ready(agents, but=old["uid"])
        assert_clean(agents)
        assert_goes_on(agents, namespace)
        assert len(images(agents, namespace)) == (1 if dump.returncode == 0 else 0)

    def test_a_caller_who_is_killed_gives_the_dump_up(
        self, agents: Cluster, namespace: str
    ) -> None:
        start(agents, namespace, mebibytes=300)
        dump = self.dumping(agents, namespace)
        dump.kill()
        dump.communicate(timeout=60)
        assert_clean(agents)
        assert_goes_on(agents, namespace)
        answered(ckpt(agents, "dump", "pod/counter", "-n", namespace))

    def test_an_agent_that_is_killed_in_a_restore_leaves_a_placeholder_that_can_be_asked_again(
        self, agents: Cluster, namespace: str
    ) -> None:
        start(agents, namespace, mebibytes=300)
        dumped = answered(ckpt(agents, "dump", "pod/counter", "-n", namespace, "--stop"))
        agents.delete("pod", "counter", namespace)
        node = agents.node("n2")
        agent = agent_pids(node)
        restore = self.running(
            agents, node, "restore", dumped["name"], "--node", "n2", "-n", namespace
        )
        kill(agent)
        _, said = restore.communicate(timeout=120)
        wait_until_ready(agents, "n2")
        uid = agents.get("pod", "counter", "-n", namespace)["metadata"]["uid"]
        agents.wait_for("the event", lambda: "RestoreFailed" in reasons(agents, namespace, uid), 60)
        # The command itself may have asked the successor again.
        if restore.returncode != 0:
            assert agents.logs("counter", namespace, "-c", "c") == "", said
            again = ("restore", dumped["name"], "--pod", "counter", "-n", namespace)
            answered(ckpt(agents, *again))
        assert_clean(agents, "n2")
        agents.wait_for("the count", lambda: agents.logs("counter", namespace, "-c", "c"), 30)
        lines = agents.logs("counter", namespace, "-c", "c").splitlines()
        first = int(lines[0].split()[0])
        assert first > 0
        assert lines == [f"{first + number} True" for number in range(len(lines))]

    def test_a_runtime_that_restarts_is_found_again(self, agents: Cluster, namespace: str) -> None:
        start(agents, namespace)
        before = agent_pod(agents)["metadata"]["uid"]
        agents.node("n1").kill("containerd")
        agents.wait_for(
            "a dump",
            lambda: ckpt(agents, "dump", "pod/counter", "-n", namespace).returncode == 0,
            60,
        )
        assert agent_pod(agents)["metadata"]["uid"] == before
        assert_goes_on(agents, namespace)

    def test_while_the_api_server_is_away_nobody_is_let_in_and_then_everybody_again(
        self, agents: Cluster, namespace: str
    ) -> None:
        start(agents, namespace)
        agents.kubectl("create", "serviceaccount", "robot", "-n", namespace)
        agents.kubectl(
            *("create", "rolebinding", "robot", "-n", namespace),
            *("--clusterrole=ckpt-agent-user", f"--serviceaccount={namespace}:robot"),
        )
        token = agents.kubectl("create", "token", "robot", "-n", namespace).strip()
        before = agent_pod(agents)["status"]["containerStatuses"][0]["restartCount"]
        agents.control_plane.kill("kube-apiserver")
        agents.wait_for("the API server", lambda: agents.get("nodes")["items"], 60)
        agents.wait_for("an answer", lambda: listed(agents, namespace, token) == "0 images", 60)
        # A pod that came meanwhile is known: the watch has begun again.
        start(agents, namespace, "later")
        answered(ckpt(agents, "dump", "pod/later", "-n", namespace))
        assert agent_pod(agents)["status"]["containerStatuses"][0]["restartCount"] == before
        assert_goes_on(agents, namespace)

    def test_a_volume_that_takes_nothing_fails_the_dump_and_the_pod_goes_on(
        self, agents: Cluster, namespace: str
    ) -> None:
        uid = start(agents, namespace)
        store = str(agents.shared / "store")
        subprocess.run(["chattr", "+i", store], check=True)
        try:
            done = ckpt(agents, "dump", "pod/counter", "-n", namespace)
        finally:
            subprocess.run(["chattr", "-i", store], check=True)
        assert done.returncode == 6, done.stderr
        agents.wait_for(
            "the event", lambda: "CheckpointFailed" in reasons(agents, namespace, uid), 20
        )
        assert_clean(agents)
        answered(ckpt(agents, "dump", "pod/counter", "-n", namespace))
        assert_goes_on(agents, namespace)


class TestAnswers:
    def test_the_log_is_json_and_the_agent_says_that_it_serves(self, agents: Cluster) -> None:
        pod = agent_pod(agents)["metadata"]["name"]
        agents.kubectl("exec", pod, "-n", OWN, "--", "ckpt-agent", "node", "--health")
        lines = log(agents)
        assert all({"ts", "level", "logger", "msg"} <= set(line) for line in lines)
        assert "serving" in [line["msg"] for line in lines]

    def test_a_pod_that_is_gone_or_elsewhere_is_not_found(
        self, agents: Cluster, namespace: str
    ) -> None:
        said = refused(ckpt(agents, "dump", "pod/nothing", "-n", namespace))
        assert said["code"] == "not-found"

    def test_a_plan_of_a_held_pod_sees_nothing_in_the_way(
        self, agents: Cluster, namespace: str
    ) -> None:
        start(agents, namespace, mebibytes=50)
        plan = answered(ckpt(agents, "plan", "pod/counter", "-n", namespace))
        assert plan["blockers"] == []
        assert plan["feasible"] is True
        assert plan["estimate"]["rawBytes"] > 50 << 20
        assert {"python3", "hold"} <= {process["program"] for process in plan["processes"]}
