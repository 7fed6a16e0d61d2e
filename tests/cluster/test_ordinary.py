"""Pods that were never opted in, on the real cluster: moved, restored from a kubelet's archive, and
what cannot be.
"""

from __future__ import annotations

from typing import Any

from agent.cli import exits
from agent.model import optin
from tests.cluster.cluster import Cluster
from tests.cluster.test_cli_cluster import ckpt, counter, logged


def ordinary(name: str, namespace: str, **environment: str) -> dict[str, Any]:
    """A pod that counts on n1, of somebody who never heard of checkpoints."""
    pod = counter(name, namespace, **environment)
    del pod["metadata"]["labels"]
    pod["spec"]["restartPolicy"] = "Never"
    return pod


def inside(cluster: Cluster, namespace: str, *argv: str) -> str:
    return cluster.kubectl("exec", "job", "-n", namespace, "-c", "main", "--", *argv).strip()


def counted(cluster: Cluster, namespace: str, path: str) -> list[int]:
    return [int(line) for line in inside(cluster, namespace, "cat", path).splitlines()]


def goes_on(cluster: Cluster, namespace: str, path: str) -> None:
    """The pod counts, in its log and in its file, and the file has every number once."""
    last = int(logged(cluster, namespace)[-1])
    cluster.wait_for("the count", lambda: int(logged(cluster, namespace)[-1]) > last, 20)
    numbers = counted(cluster, namespace, path)
    assert numbers == list(range(len(numbers)))


def test_one_is_moved_twice_and_ends_as_it_would_have(agents: Cluster, namespace: str) -> None:
    path = "/dev/shm/count"
    pod = ordinary("job", namespace, FILE=path)
    main = pod["spec"]["containers"][0]
    main["readinessProbe"] = {"exec": {"command": ["test", "-s", path]}, "periodSeconds": 1}
    agents.apply(pod)
    agents.wait_for_pod("job", namespace)
    for node in ("n2", "n1"):
        before = len(counted(agents, namespace, path))
        moved = ckpt(agents, "migrate", "pod/job", "--to", node, "-n", namespace).document()
        assert moved["target"] == node
        goes_on(agents, namespace, path)
        # Nothing ran beside it, and nothing again.
        first = int(logged(agents, namespace)[0])
        assert first >= before
        agents.wait_for_pod("job", namespace)
    script = "import os; print(os.readlink('/proc/1/exe'), os.uname().nodename)"
    assert inside(agents, namespace, "python3", "-c", script) == "/.ckpt-agent/hold job"
    inside(agents, namespace, "sh", "-c", "kill -INT 1")

    def ended() -> int | None:
        found = agents.get("pod", "job", "-n", namespace)
        (status,) = found["status"]["containerStatuses"]
        code: int | None = status["state"].get("terminated", {}).get("exitCode")
        return code

    agents.wait_for("the end", lambda: ended() is not None, 30)
    # Python's own, of an interrupt as the first process of a pid namespace.
    assert ended() == 130
    assert "KeyboardInterrupt" in agents.logs("job", namespace, "-c", "main")


def test_one_goes_on_from_a_kubelets_archive_where_that_has_all_of_it(
    agents: Cluster, namespace: str
) -> None:
    path = "/var/tmp/count"
    agents.apply(ordinary("job", namespace))
    agents.wait_for_pod("job", namespace)
    agents.wait_for("the counter", lambda: len(logged(agents, namespace)) > 5, 30)
    done = ckpt(agents, "dump", "pod/job", "-n", namespace, "--engine", "kubelet").document()
    assert done["engine"] == "kubelet"
    restored = ckpt(agents, "restore", done["name"], "--node", "n2", "-n", namespace, "--replace")
    assert restored.status == 0, restored.err
    goes_on(agents, namespace, path)
    found = agents.get("pod", "job", "-n", namespace)
    assert found["spec"]["nodeName"] == "n2"
    assert found["metadata"]["labels"] == {optin.LABEL: optin.ENABLED}

    # A file that is open in a volume is not in such an archive: nothing is deleted for it.
    agents.kubectl("delete", "pod", "job", "-n", namespace, "--grace-period=0", "--force")
    agents.apply(ordinary("job", namespace, FILE="/dev/shm/count"))
    agents.wait_for_pod("job", namespace)
    agents.wait_for("the counter", lambda: len(logged(agents, namespace)) > 5, 30)
    ckpt(agents, "dump", "pod/job", "-n", namespace, "--engine", "kubelet").document()
    refused = ckpt(agents, "restore", "job", "--node", "n2", "-n", namespace, "--replace")
    assert refused.status == exits.REFUSED
    assert "/dev/shm/count is open and lies in a volume" in refused.err
    goes_on(agents, namespace, "/dev/shm/count")
