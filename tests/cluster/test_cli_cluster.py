"""The command line against the real cluster: every verb as its users have it, a pod that moves,
callers with and without rights.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli import exits
from agent.model import optin
from tests.cluster.cluster import Cluster

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-c", "from agent.cli.main import main; main()")
PROJECT = "ckpt-agent"
COUNT = "/var/tmp/count"


class Ran:
    """What a command left."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr

    def document(self) -> dict[str, Any]:
        assert self.status == 0, self.err
        found: dict[str, Any] = json.loads(self.out)
        return found

    def error(self) -> dict[str, Any]:
        assert self.status != 0, self.out
        found: dict[str, Any] = json.loads(self.err)
        return found


def ckpt(cluster: Cluster, *arguments: str, kubeconfig: Path | None = None, **more: str) -> Ran:
    """Run the program as a user of the cluster would; ``more`` goes into its environment."""
    environment = {"PYTHONPATH": str(CHECKOUT), "CKPT_AGENT_OUTPUT": "json"} | more
    if kubeconfig:
        environment["KUBECONFIG"] = str(kubeconfig)
    done = cluster.run_in_control_plane(
        *PROGRAM, *arguments, check=False, environment=environment, timeout_s=180
    )
    return Ran(done)


def counter(name: str, namespace: str, node: str = "n1", **environment: str) -> dict[str, Any]:
    variables = {"PERIOD_S": "0.05"} | environment
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {optin.LABEL: optin.ENABLED},
        },
        "spec": {
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [
                            {
                                "matchFields": [
                                    {"key": "metadata.name", "operator": "In", "values": [node]}
                                ]
                            }
                        ]
                    }
                }
            },
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "main",
                    "image": "localhost/np:1",
                    "command": ["python3", "-u", "/opt/counter.py"],
                    "env": [{"name": key, "value": each} for key, each in variables.items()],
                }
            ],
        },
    }


@pytest.fixture
def job(agents: Cluster, namespace: str) -> str:
    """A pod that counts on n1, and has counted a little."""
    agents.apply(counter("job", namespace))
    agents.wait_for_pod("job", namespace)
    agents.wait_for("the counter", lambda: len(logged(agents, namespace)) > 5, 30)
    return "job"


def logged(cluster: Cluster, namespace: str, name: str = "job") -> list[str]:
    return cluster.logs(name, namespace, "-c", "main").splitlines()


class Follower:
    """Everything that a pod logs until it ends, as ``kubectl logs -f`` shows it."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, container: str) -> None:
        words = ("logs", "-f", "-n", namespace, name, "-c", container)
        program = [str(cluster.bin / "kubectl"), "--kubeconfig", str(cluster.kubeconfig), *words]
        self._process = subprocess.Popen(
            cluster.in_control_plane(program), stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def text(self) -> str:
        """All of it, once the pod has ended."""
        out, _ = self._process.communicate(timeout=60)
        return str(out)


@contextlib.contextmanager
def followed(
    cluster: Cluster, namespace: str, name: str, container: str = "main"
) -> Iterator[Follower]:
    made = Follower(cluster, namespace, name, container)
    try:
        yield made
    finally:
        made.close()


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def counted(cluster: Cluster, namespace: str, name: str = "job") -> list[int]:
    """The counter's own file, which travels with the pod."""
    words = ("exec", name, "-n", namespace, "-c", "main", "--", "cat", COUNT)
    return numbers(cluster.kubectl(*words))


def test_a_pod_that_is_moved_goes_on_counting_on_the_other_node_without_a_gap(
    agents: Cluster, namespace: str, job: str
) -> None:
    with followed(agents, namespace, job) as log:
        document = ckpt(agents, "migrate", f"pod/{job}", "--to", "n2", "-n", namespace).document()
        before = log.text()
    assert (document["source"], document["target"]) == ("n1", "n2")
    assert list(document["stepSeconds"]) == ["dump", "delete", "create", "schedule", "restore"]
    found = agents.get("pod", job, "-n", namespace)
    assert found["spec"]["nodeName"] == "n2"
    assert found["metadata"]["uid"] == document["podUid"]
    assert found["metadata"]["annotations"][optin.RESTORE] == document["name"]
    had = len(numbers(before))
    agents.wait_for("more numbers", lambda: counted(agents, namespace)[-1] > had + 20, 30)
    assert (
        agents.get("pod", job, "-n", namespace)["status"]["containerStatuses"][0]["restartCount"]
        == 0
    )
    everything = numbers(before + "\n".join(["", *logged(agents, namespace)]))
    in_file = counted(agents, namespace)
    assert in_file == list(range(len(in_file)))
    assert everything == list(range(len(everything)))


def test_a_pod_can_be_moved_there_and_back_and_there_again(
    agents: Cluster, namespace: str, job: str
) -> None:
    for node in ("n2", "n1", "n2"):
        done = ckpt(agents, "migrate", f"pod/{job}", "--to", node, "-n", namespace).document()
        assert done["target"] == node
        before = counted(agents, namespace)[-1]
        agents.wait_for("more", lambda: counted(agents, namespace)[-1] > before + 5, 30)  # noqa: B023
    in_file = counted(agents, namespace)
    assert in_file == list(range(len(in_file)))
    images = ckpt(agents, "list", job, "-n", namespace).document()["items"]
    assert len(images) == 3
    assert images[2]["newBytes"] < images[0]["newBytes"] / 2


def test_a_stopped_pod_waits_and_goes_on_where_it_is(
    agents: Cluster, namespace: str, job: str
) -> None:
    name = ckpt(agents, "dump", f"pod/{job}", "--stop", "-n", namespace).document()["name"]
    stood = counted(agents, namespace)
    done = ckpt(agents, "restore", name, "--pod", job, "-n", namespace).document()
    assert (done["pod"], done["node"]) == (job, "n1")
    agents.wait_for("more", lambda: counted(agents, namespace)[-1] > stood[-1] + 5, 30)
    in_file = counted(agents, namespace)
    assert in_file == list(range(len(in_file)))
    statuses = agents.get("pod", job, "-n", namespace)["status"]["containerStatuses"]
    assert [each["restartCount"] for each in statuses] == [0]


def test_an_image_is_listed_shown_verified_and_deleted_and_the_pod_counts_on(
    agents: Cluster, namespace: str, job: str
) -> None:
    dumped = ckpt(agents, "dump", f"pod/{job}", "-n", namespace).document()
    name = dumped["name"]
    assert (dumped["pod"], dumped["engine"], dumped["stopped"]) == (job, "container", False)
    listed = ckpt(agents, "list", "-n", namespace).document()
    assert [each["name"] for each in listed["items"]] == [name]
    shown = ckpt(agents, "show", job, "-n", namespace).document()
    assert shown["detail"][0]["name"] == "main"
    assert ckpt(agents, "verify", "--all", "-n", namespace).document()["good"]
    second = ckpt(agents, "dump", f"pod/{job}", "-n", namespace).document()
    assert second["newBytes"] < dumped["newBytes"] / 2
    pruned = ckpt(agents, "prune", "-n", namespace, "--keep-last", "1").document()
    assert [each["name"] for each in pruned["items"]] == [name]
    deleted = ckpt(agents, "delete", second["name"], "-n", namespace).document()
    assert deleted["name"] == namespace
    assert ckpt(agents, "list", "-n", namespace).document()["items"] == []
    in_file = counted(agents, namespace)
    assert in_file == list(range(len(in_file)))


def test_plan_of_a_held_pod_has_no_objection(agents: Cluster, namespace: str, job: str) -> None:
    document = ckpt(agents, "plan", f"pod/{job}", "-n", namespace).document()
    assert document["feasible"], document["blockers"]


def test_restore_on_another_node_beside_a_pod_of_the_name_is_refused(
    agents: Cluster, namespace: str, job: str
) -> None:
    name = ckpt(agents, "dump", f"pod/{job}", "-n", namespace).document()["name"]
    refused = ckpt(agents, "restore", name, "--node", "n2", "-n", namespace)
    assert refused.status == exits.REFUSED
    assert "--replace" in refused.error()["hint"]
    done = ckpt(agents, "restore", name, "--node", "n2", "--replace", "-n", namespace).document()
    assert done["node"] == "n2"
    twice = ckpt(agents, "restore", name, "--node", "n1", "--replace", "-n", namespace)
    assert twice.status == exits.REFUSED
    assert "--again" in twice.error()["hint"]


def test_doctor_examines_every_node_and_names_no_missing_right(agents: Cluster) -> None:
    ran = ckpt(agents, "doctor", "-n", "default")
    lines = {each["name"]: each for each in json.loads(ran.out)["checks"]}
    assert all(each["status"] == "ok" for name, each in lines.items() if name.startswith("right "))
    for node in agents.nodes:
        assert lines[f"{node}/agent"]["status"] == "ok"
        assert lines[f"{node}/criu"]["status"] == "ok"
        assert lines[f"{node}/store"]["status"] == "ok"


# Callers.


def token_of(cluster: Cluster, namespace: str, account: str, seconds: int = 600) -> str:
    cluster.kubectl("create", "serviceaccount", account, "-n", namespace)
    span = f"--duration={seconds}s"
    return cluster.kubectl("create", "token", account, "-n", namespace, span).strip()


def kubeconfig_with(cluster: Cluster, folder: Path, token: str, namespace: str) -> Path:
    """The administrator's kubeconfig with another identity, and the namespace as its default."""
    text = cluster.kubectl("config", "view", "--raw", "-o", "json")
    found = json.loads(text)
    found["users"][0]["user"] = {"token": token}
    found["contexts"][0]["context"]["namespace"] = namespace
    path = folder / "kubeconfig"
    path.write_text(json.dumps(found))
    return path


def bind(cluster: Cluster, kind: str, role: str, where: str, account: str, namespace: str) -> None:
    name = f"{role}-{namespace}"
    words = ("create", "rolebinding", name, "-n", where, f"--{kind}={role}")
    cluster.kubectl(*words, f"--serviceaccount={namespace}:{account}")


@pytest.fixture
def tenant(agents: Cluster, namespace: str, tmp_path: Path) -> Iterator[Path]:
    """A namespace's user: may edit there, restore there and reach agents, and nothing else."""
    token = token_of(agents, namespace, "tenant")
    bind(agents, "clusterrole", "edit", namespace, "tenant", namespace)
    bind(agents, "clusterrole", "ckpt-agent-restorer", namespace, "tenant", namespace)
    bind(agents, "role", "ckpt-agent-client", PROJECT, "tenant", namespace)
    yield kubeconfig_with(agents, tmp_path, token, namespace)
    agents.kubectl("delete", "rolebinding", f"ckpt-agent-client-{namespace}", "-n", PROJECT)


def test_a_namespaces_user_moves_a_pod_with_a_token_and_the_documented_roles(
    agents: Cluster, namespace: str, job: str, tenant: Path
) -> None:
    document = ckpt(agents, "migrate", f"pod/{job}", "--to", "n2", kubeconfig=tenant).document()
    assert document["namespace"] == namespace
    assert agents.get("pod", job, "-n", namespace)["spec"]["nodeName"] == "n2"


def test_a_namespaces_user_has_no_rights_in_another(
    agents: Cluster, job: str, tenant: Path
) -> None:
    for verb in (("list",), ("show", "x"), ("restore", "x", "--node", "n2")):
        refused = ckpt(agents, *verb, "-n", "default", kubeconfig=tenant)
        assert refused.status == exits.REFUSED
        assert refused.error()["code"] == "forbidden"


def test_without_the_right_to_restore_nothing_stops(
    agents: Cluster, namespace: str, job: str, tenant: Path
) -> None:
    agents.kubectl("delete", "rolebinding", f"ckpt-agent-restorer-{namespace}", "-n", namespace)
    refused = ckpt(agents, "migrate", f"pod/{job}", "--to", "n2", kubeconfig=tenant)
    assert refused.error()["code"] == "forbidden", refused.err
    assert any("restore images" in each for each in refused.error()["facts"]["reasons"])
    assert agents.get("pod", job, "-n", namespace)["spec"]["nodeName"] == "n1"
    assert ckpt(agents, "list", "-n", namespace, kubeconfig=tenant).document()["items"] == []


def test_a_caller_without_any_right_is_told_what_is_missing(
    agents: Cluster, namespace: str, job: str
) -> None:
    nobody = agents.user_kubeconfig("nobody")
    refused = ckpt(agents, "dump", f"pod/{job}", "-n", namespace, kubeconfig=nobody)
    assert refused.status == exits.REFUSED
    assert 'User "nobody" cannot get resource "pods"' in refused.error()["message"]


def test_a_token_that_was_never_valid_is_told_as_such(
    agents: Cluster, namespace: str, tmp_path: Path
) -> None:
    config = kubeconfig_with(agents, tmp_path, "rubbish", namespace)
    refused = ckpt(agents, "list", "-n", namespace, kubeconfig=config)
    assert (refused.status, refused.error()["code"]) == (exits.REFUSED, "unauthenticated")
    assert "rubbish" not in refused.err


# What is in the way.


def test_a_pod_of_a_controller_is_not_moved(agents: Cluster, namespace: str) -> None:
    template = counter("x", namespace)
    metadata = {"labels": template["metadata"]["labels"]}
    spec = template["spec"] | {"restartPolicy": "Never"}
    agents.apply(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "train", "namespace": namespace},
            "spec": {"template": {"metadata": metadata, "spec": spec}},
        }
    )
    agents.wait_for("the job's pod", lambda: agents.get("pods", "-n", namespace)["items"], 30)
    (found,) = agents.get("pods", "-n", namespace)["items"]
    name = found["metadata"]["name"]
    agents.wait_for_pod(name, namespace)
    refused = ckpt(agents, "migrate", f"pod/{name}", "--to", "n2", "-n", namespace)
    assert refused.status == exits.REFUSED
    assert any("Job train controls it" in each for each in refused.error()["facts"]["reasons"])
    assert ckpt(agents, "dump", f"pod/{name}", "-n", namespace).status == 0
    # The way out that the message tells.
    agents.kubectl("delete", "job", "train", "--cascade=orphan", "-n", namespace)
    agents.wait_for(
        "the pod to be nobody's",
        lambda: (
            not {"ownerReferences", "finalizers"}
            & set(agents.get("pod", name, "-n", namespace)["metadata"])
        ),
        30,
    )
    done = ckpt(agents, "migrate", f"pod/{name}", "--to", "n2", "-n", namespace).document()
    assert done["target"] == "n2"


def test_a_cordoned_node_is_refused_before_anything_stops(
    agents: Cluster, namespace: str, job: str
) -> None:
    agents.kubectl("cordon", "n2")
    try:
        refused = ckpt(agents, "migrate", f"pod/{job}", "--to", "n2", "-n", namespace)
    finally:
        agents.kubectl("uncordon", "n2")
    assert any("cordoned" in each for each in refused.error()["facts"]["reasons"])
    in_file = counted(agents, namespace)
    assert in_file == list(range(len(in_file)))


def test_a_policy_that_would_refuse_the_replacement_is_met_before_anything_stops(
    agents: Cluster, namespace: str, job: str
) -> None:
    quota = {"hard": {"count/pods": "1"}}
    metadata = {"name": "one", "namespace": namespace}
    agents.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": quota})
    # A quota for exactly this pod is no objection: the old one goes first.
    document = ckpt(agents, "migrate", f"pod/{job}", "--to", "n2", "-n", namespace).document()
    assert document["target"] == "n2"


# The way to an agent.


ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 7000))
while True:
    inner, _ = server.accept()
    with inner:
        while part := inner.recv(1 << 16):
            inner.sendall(part)
"""


def test_bytes_flow_both_ways_through_the_real_api_server_and_kubelet(
    cluster: Cluster, namespace: str
) -> None:
    pod = counter("echo", namespace)
    pod["metadata"]["labels"] = {}
    pod["spec"]["containers"][0]["command"] = ["python3", "-u", "-c", ECHO]
    cluster.apply(pod)
    cluster.wait_for_pod("echo", namespace)
    done = cluster.run_in_control_plane(
        *(sys.executable, "-c", _EXCHANGE, namespace),
        environment={"PYTHONPATH": str(CHECKOUT)},
        timeout_s=120,
    )
    assert done.stdout.split() == ["same", "16777216"]


_EXCHANGE = """
import socket, sys, threading
from agent.kube import connection, portforward
api = connection.connect()
sent = bytes(range(256)) * (64 << 10)
got = bytearray()
to = (sys.argv[1], "echo", 7000)
with portforward.forward(api, *to) as made, socket.socket(socket.AF_UNIX) as s:
    s.settimeout(60)
    s.connect(made.path)
    writer = threading.Thread(target=s.sendall, args=(sent,))
    writer.start()
    while len(got) < len(sent):
        part = s.recv(1 << 16)
        assert part, made.reason
        got += part
    writer.join()
print("same" if got == sent else "differs", len(got))
"""


# kubectl.


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """A PATH with the two programs that kubectl looks for."""
    for name, entry in (("kubectl-ckpt", "main"), ("kubectl_complete-ckpt", "complete")):
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\nfrom agent.cli import kubectl\nkubectl.{entry}()\n")
        path.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}


def test_kubectl_ckpt_is_the_same_program_and_completes(
    agents: Cluster, namespace: str, job: str, plugin: dict[str, str]
) -> None:
    kubectl = str(agents.bin / "kubectl")

    def run(*words: str) -> str:
        return agents.run_in_control_plane(kubectl, *words, environment=plugin).stdout

    image = run("ckpt", "dump", f"pod/{job}", "-n", namespace).strip()
    assert run("ckpt", "list", "-n", namespace, "-o", "name").strip() == image
    assert run("__complete", "ckpt", "migrate", "-n", namespace, "pod/").split("\n")[0] == "pod/job"
    assert run("__complete", "ckpt", "restore", "-n", namespace, "job@").split("\n")[0] == image


def begun(cluster: Cluster, namespace: str, folder: Path) -> subprocess.Popen[str]:
    """A dump of a large pod ``job`` that has reached its agent."""
    cluster.apply(counter("job", namespace, MEMORY_MB="300"))
    cluster.wait_for_pod("job", namespace)
    cluster.wait_for("the counter", lambda: len(logged(cluster, namespace)) > 1, 60)
    settings = {"PYTHONPATH": str(CHECKOUT), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        cluster.in_control_plane([*PROGRAM, "dump", "pod/job", "-n", namespace, "-o", "json"]),
        env=os.environ | {"KUBECONFIG": str(cluster.kubeconfig)} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    cluster.wait_for("the port-forward", lambda: list(folder.glob("ckpt-agent-*/agent")), 60)
    return process


def goes_on(cluster: Cluster, namespace: str) -> None:
    before = counted(cluster, namespace)[-1]
    cluster.wait_for("the count to go on", lambda: counted(cluster, namespace)[-1] > before, 30)
    in_file = counted(cluster, namespace)
    assert in_file == list(range(len(in_file)))


@pytest.mark.parametrize("after_s", [0.3, 0.9])
def test_ctrl_c_whenever_it_comes_lets_the_pod_go_on(
    agents: Cluster, namespace: str, after_s: float, tmp_path: Path
) -> None:
    process = begun(agents, namespace, tmp_path)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (exits.INTERRUPTED, exits.DONE), err
    assert (out == "") == (process.returncode == exits.INTERRUPTED)
    assert ckpt(agents, "verify", "--all", "-n", namespace).document()["good"]
    goes_on(agents, namespace)


def test_an_agent_killed_during_a_dump_is_told_and_the_pod_goes_on(
    agents: Cluster, namespace: str, tmp_path: Path
) -> None:
    process = begun(agents, namespace, tmp_path)
    time.sleep(0.3)
    label = ("-l", "app.kubernetes.io/name=ckpt-agent-node")
    (agent,) = agents.get("pods", "-n", PROJECT, *label, "--field-selector=spec.nodeName=n1")[
        "items"
    ]
    name = agent["metadata"]["name"]
    agents.kubectl("delete", "pod", name, "-n", PROJECT, "--grace-period=0", "--force")
    out, err = process.communicate(timeout=60)
    assert process.returncode == exits.ENVIRONMENT, (out, err)
    assert json.loads(err)["code"] == "unreachable"
    goes_on(agents, namespace)
    status = ("rollout", "status", "daemonset/ckpt-agent-node", "-n", PROJECT, "--timeout=100s")
    agents.kubectl(*status)
    dumped = ckpt(agents, "dump", "pod/job", "-n", namespace).document()
    assert ckpt(agents, "verify", dumped["name"], "-n", namespace).document()["good"]
    goes_on(agents, namespace)
