"""Real kubelets checkpoint real containers for the agent: the image is whole, the archive is gone,
the job goes on; and when something fails, nothing is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli import exits
from agent.model import optin
from tests.cluster.cluster import Cluster
from tests.cluster.test_cluster import pod

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-c", "from agent.cli.main import main; main()")
CHECKPOINTS = "var/lib/kubelet/checkpoints"
RUNC_CONF = "etc/criu/runc.conf"
PROJECT = "ckpt-agent"
# A server and a client in one container: a connection that is open while it is checkpointed.
TALK = """
import socket, time
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
end, _ = server.accept()
number = 0
while True:
    client.sendall(b"%8d" % number)
    assert int(end.recv(8)) == number
    print(number, flush=True)
    number += 1
    time.sleep(0.05)
"""


def ckpt(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user of the cluster would."""
    return cluster.run_in_control_plane(
        *(*PROGRAM, *arguments),
        check=False,
        environment={"PYTHONPATH": str(CHECKOUT), "CKPT_AGENT_OUTPUT": "json"},
        timeout_s=180,
    )


def dump(cluster: Cluster, name: str, namespace: str, *more: str) -> dict[str, Any]:
    done = ckpt(cluster, "dump", f"pod/{name}", "-n", namespace, "--engine", "kubelet", *more)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def archives(cluster: Cluster, node: str = "n1") -> set[str]:
    """Everything in the kubelet's directory, notes of the agent included."""
    return {path.name for path in (cluster.node(node).root / CHECKPOINTS).iterdir()}


def count(cluster: Cluster, name: str, namespace: str, container: str = "c") -> int:
    lines = cluster.logs(name, namespace, "-c", container, "--tail=1").split()
    return int(lines[-1]) if lines else -1


def assert_counts_on(cluster: Cluster, name: str, namespace: str, container: str = "c") -> None:
    before = count(cluster, name, namespace, container)
    cluster.wait_for(
        f"{name} to count on", lambda: count(cluster, name, namespace, container) > before + 3, 20
    )
    (status,) = [
        each
        for each in cluster.get("pod", name, "-n", namespace)["status"]["containerStatuses"]
        if each["name"] == container
    ]
    assert status["restartCount"] == 0


@pytest.fixture
def before(agents: Cluster) -> Iterator[set[str]]:
    """The archives that others left; after the test there are no others."""
    found = archives(agents)
    yield found
    assert archives(agents) <= found


def detail(cluster: Cluster, image: str, namespace: str) -> dict[str, Any]:
    done = ckpt(cluster, "show", image, "-n", namespace)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_pod_is_stored_and_goes_on(agents: Cluster, namespace: str, before: set[str]) -> None:
    agents.apply(pod("counter", namespace, "n1"))
    agents.wait_for_pod("counter", namespace)

    first = dump(agents, "counter", namespace)
    assert first["stopSeconds"] > 0
    assert_counts_on(agents, "counter", namespace)
    second = dump(agents, "counter", namespace)

    # Its memory is mostly what it was: the second image adds little.
    assert second["newBytes"] < first["newBytes"] / 2
    verified = ckpt(agents, "verify", second["name"], "-n", namespace)
    assert json.loads(verified.stdout)["good"]
    (member,) = detail(agents, second["name"], namespace)["detail"]
    assert [each["program"] for each in member["processes"]] == ["python3"]
    assert archives(agents) == before


def test_an_open_connection_is_no_obstacle(
    agents: Cluster, namespace: str, before: set[str]
) -> None:
    agents.apply(pod("talk", namespace, "n1", ["python3", "-u", "-c", TALK]))
    agents.wait_for_pod("talk", namespace)
    conf = (agents.node("n1").root / RUNC_CONF).read_text()
    assert "tcp-established" in conf.split()

    dump(agents, "talk", namespace)

    assert_counts_on(agents, "talk", namespace)


def test_containers_sidecars_and_inits_of_a_pod(
    agents: Cluster, namespace: str, before: set[str]
) -> None:
    several = pod("several", namespace, "n1")
    spec = several["spec"]
    spec["containers"].append({**spec["containers"][0], "name": "second"})
    spec["initContainers"] = [
        {**spec["containers"][0], "name": "sidecar", "restartPolicy": "Always"}
    ]
    agents.apply(several)
    agents.wait_for_pod("several", namespace)

    report = dump(agents, "several", namespace)

    assert {each["name"] for each in report["members"]} == {"c", "second", "sidecar"}
    only = dump(agents, "several", namespace, "-c", "sidecar")
    assert {each["name"] for each in only["members"]} == {"sidecar"}
    for name in ("c", "second"):
        assert_counts_on(agents, "several", namespace, name)


# What the agent does for a container, done for one that pods' owners are not offered.
CAPTURE = """
import os, sys
from agent.engines.base import CaptureOptions
from agent.engines.kubelet import client, engine
from agent.model.container import Container
from tests.host.image import MemoryImage

namespace, trust, token, directory = sys.argv[1:]
kubelet = client.Kubelet("10.201.0.2", client.Trust.parse(trust), token_file=token)
made = engine.KubeletEngine(
    kubelet, namespace, "starting", [Container("", "init", os.getpid(), "")], directory=directory
)
image = MemoryImage()
made.capture(os.getpid(), image, None, CaptureOptions(deadline_s=60))
print([process["comm"] for process in image.known["processes"]], image.memory_bytes > 1 << 20)
"""


def test_an_init_container_can_be_captured(
    agents: Cluster, namespace: str, before: set[str], tmp_path: Path
) -> None:
    starting = pod("starting", namespace, "n1")
    starting["spec"]["initContainers"] = [
        {
            "name": "init",
            "image": "localhost/np:1",
            "command": ["python3", "-c", "import time; time.sleep(600)"],
        }
    ]
    agents.apply(starting)
    agents.wait_for(
        "the init container",
        lambda: "running" in _init_state(agents, "starting", namespace),
        60,
    )
    token = tmp_path / "token"
    token.write_text(agents.kubectl("create", "token", "ckpt-agent-node", "-n", PROJECT))

    done = agents.run_in_control_plane(
        *(sys.executable, "-c", CAPTURE, namespace),
        f"ca:{agents.state / 'pki/ca.crt'}",
        *(token, agents.node("n1").root / CHECKPOINTS),
        environment={"PYTHONPATH": str(CHECKOUT)},
        timeout_s=90,
    )

    assert done.stdout.split("\n")[0] == "['python3'] True"
    assert "running" in _init_state(agents, "starting", namespace)


def _init_state(cluster: Cluster, name: str, namespace: str) -> dict[str, Any]:
    statuses = cluster.get("pod", name, "-n", namespace)["status"].get("initContainerStatuses")
    state: dict[str, Any] = statuses[0]["state"] if statuses else {}
    return state


def test_ending_the_job_at_the_cut_is_refused(
    agents: Cluster, namespace: str, before: set[str]
) -> None:
    agents.apply(pod("counter", namespace, "n1"))
    agents.wait_for_pod("counter", namespace)

    done = ckpt(agents, "dump", "pod/counter", "-n", namespace, "--engine", "kubelet", "--stop")

    assert done.returncode == exits.REFUSED
    assert "container engine" in json.loads(done.stderr)["hint"]
    assert_counts_on(agents, "counter", namespace)


def test_a_checkpoint_that_criu_refuses_leaves_the_job_and_no_archive(
    agents: Cluster, namespace: str, before: set[str]
) -> None:
    # io_uring_setup: a descriptor of a kind that CRIU does not know.
    script = (
        "import ctypes, time\n"
        "assert ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)) >= 0\n"
        "n = 0\n"
        "while True:\n"
        "    print(n, flush=True); n += 1; time.sleep(0.05)\n"
    )
    agents.apply(pod("odd", namespace, "n1", ["python3", "-u", "-c", script]))
    agents.wait_for_pod("odd", namespace)

    done = ckpt(agents, "dump", "pod/odd", "-n", namespace, "--engine", "kubelet")

    assert done.returncode == exits.FAILED
    told = json.loads(done.stderr)
    assert told["code"] == "criu-failed"
    assert "io_uring" in told["message"] + told["hint"]
    assert_counts_on(agents, "odd", namespace)
    listed = ckpt(agents, "list", "odd", "-n", namespace)
    assert json.loads(listed.stdout)["items"] == []


def kill_agent(cluster: Cluster, node: str) -> None:
    """Kill the agent's process on a node, as the kernel does when memory is short."""
    (pod_uid,) = [
        each["metadata"]["uid"]
        for each in cluster.get(
            "pods", "-n", PROJECT, "-l", "app.kubernetes.io/name=ckpt-agent-node"
        )["items"]
        if each["spec"]["nodeName"] == node
    ]
    killed = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if pod_uid in (folder / "cgroup").read_text() and b"node" in words:
                os.kill(int(folder.name), signal.SIGKILL)
                killed += 1
    assert killed


def test_the_archive_of_an_agent_that_was_killed_is_removed(
    agents: Cluster, namespace: str, before: set[str]
) -> None:
    agents.apply(pod("counter", namespace, "n1"))
    agents.wait_for_pod("counter", namespace)
    conf = agents.node("n1").root / RUNC_CONF
    process = subprocess.Popen(
        agents.in_control_plane(
            [*PROGRAM, "dump", "pod/counter", "-n", namespace, "--engine", "kubelet"]
        ),
        cwd=CHECKOUT,
        env={"KUBECONFIG": str(agents.state / "admin.kubeconfig"), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    agents.wait_for(
        "the kubelet to be asked",
        lambda: any(name.startswith(".ckpt-agent-call-") for name in archives(agents) - before),
        30,
    )
    kill_agent(agents, "n1")
    process.wait(60)
    # The kubelet gives up when nobody listens any more; an archive that was whole by then stays.
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    left = archives(agents) - before
    assert any(each.startswith(".ckpt-agent-call-") for each in left)
    if not any(each.endswith(".tar") for each in left):
        late = agents.node("n1").root / CHECKPOINTS
        (late / f"checkpoint-counter_{namespace}-c-{stamp}.tar").write_bytes(b"half of it")

    agents.kubectl(
        *("rollout", "status", "daemonset/ckpt-agent-node", "-n", PROJECT, "--timeout=120s"),
        timeout_s=130,
    )
    dump(agents, "counter", namespace)

    assert archives(agents) == before
    assert_counts_on(agents, "counter", namespace)
    assert "tcp-established" in conf.read_text().split()


def test_an_opted_in_pod_goes_on_on_the_other_node(
    agents: Cluster, namespace: str, before: set[str]
) -> None:
    job = pod("job", namespace, "n1", ["python3", "-u", "/opt/counter.py"])
    job["metadata"]["labels"][optin.LABEL] = optin.ENABLED
    del job["spec"]["nodeSelector"]
    here = {"key": "metadata.name", "operator": "In", "values": ["n1"]}
    required = {"nodeSelectorTerms": [{"matchFields": [here]}]}
    job["spec"]["affinity"] = {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}
    }
    agents.apply(job)
    agents.wait_for_pod("job", namespace)
    agents.wait_for("the job to count", lambda: count(agents, "job", namespace) > 20, 30)

    image = dump(agents, "job", namespace)["name"]
    reached = count(agents, "job", namespace)
    done = ckpt(agents, "restore", image, "-n", namespace, "--node", "n2", "--replace")

    assert done.returncode == 0, done.stderr
    moved = agents.get("pod", "job", "-n", namespace)
    assert moved["spec"]["nodeName"] == "n2"
    first = int(agents.logs("job", namespace).split()[0])
    # It goes on from where it was checkpointed, which is before it was last seen to be.
    assert 20 <= first <= reached
    assert_counts_on(agents, "job", namespace)


def test_an_image_goes_out_and_another_store_takes_it_in(
    agents: Cluster, namespace: str, before: set[str], tmp_path: Path
) -> None:
    agents.apply(pod("counter", namespace, "n1"))
    agents.wait_for_pod("counter", namespace)
    kubelet_made = json.loads(
        agents.kubectl(
            *("create", "--raw", f"/api/v1/nodes/n1/proxy/checkpoint/{namespace}/counter/c"),
            *("-f", "/dev/null"),
        )
    )["items"][0]
    original = agents.node("n1").root / kubelet_made.lstrip("/")
    store = ("--store", str(tmp_path / "store"))
    exported = tmp_path / "again.tar"
    try:
        environment = {"PYTHONPATH": str(CHECKOUT), "PATH": "/usr/bin:/bin"}
        (imported,) = _run([*PROGRAM, "import", str(original), *store], environment).split()
        _run([*PROGRAM, "export", imported, str(exported), *store], environment)

        def pages(path: Path) -> dict[str, bytes]:
            with tarfile.open(path) as tar:
                return {
                    info.name: file.read()
                    for info in tar
                    if "/pages-" in info.name and (file := tar.extractfile(info))
                }

        assert pages(exported) == pages(original)
    finally:
        original.unlink()


def _run(argv: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout
