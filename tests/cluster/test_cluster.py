"""The test cluster is a real one: what the project's tests stand on is proved here."""

from __future__ import annotations

import json
import tarfile
from typing import Any

import pytest

from tests.cluster.cluster import NODE_IPS, SHARED, Cluster

JOBSET = """
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata: {{name: train, namespace: {namespace}}}
spec:
  coordinator: {{replicatedJob: worker}}
  network: {{enableDNSHostnames: true, publishNotReadyAddresses: true}}
  replicatedJobs:
  - name: worker
    template:
      spec:
        parallelism: 2
        completions: 2
        completionMode: Indexed
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 0
            topologySpreadConstraints:
            - maxSkew: 1
              topologyKey: kubernetes.io/hostname
              whenUnsatisfiable: DoNotSchedule
              labelSelector: {{matchLabels: {{jobset.sigs.k8s.io/jobset-name: train}}}}
            containers:
            - name: trainer
              image: {image}
              command: [python3, -u, /opt/trainer.py]
              env:
              - {{name: WORLD_SIZE, value: "2"}}
              - {{name: STEPS, value: "12"}}
              - {{name: PACE_S, value: "0"}}
              - name: MASTER_ADDR
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['jobset.sigs.k8s.io/coordinator']
"""


def pod(name: str, namespace: str, node: str, command: list[str] | None = None) -> dict[str, Any]:
    """A pod of one container ``c`` on ``node``; it counts unless told otherwise."""
    container: dict[str, Any] = {"name": "c", "image": "localhost/np:1"}
    if command:
        container["command"] = command
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
        },
    }


def test_both_nodes_are_ready_and_run_containerd(cluster: Cluster) -> None:
    nodes = cluster.get("nodes")["items"]

    assert {node["metadata"]["name"] for node in nodes} == set(NODE_IPS)
    for node in nodes:
        conditions = {c["type"]: c["status"] for c in node["status"]["conditions"]}
        assert conditions["Ready"] == "True"
        assert node["status"]["nodeInfo"]["containerRuntimeVersion"].startswith("containerd://2.")
        criu = cluster.node(node["metadata"]["name"]).exec("criu", "--version").stdout
        assert criu.startswith("Version: 4.2")


def test_a_pod_reaches_another_nodes_pod_by_its_services_name(
    cluster: Cluster, namespace: str
) -> None:
    server = pod("server", namespace, "n2", ["python3", "-m", "http.server", "8000"])
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": namespace},
        "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    cluster.apply([server, service, pod("client", namespace, "n1")])
    cluster.wait_for_pod("server", namespace)
    cluster.wait_for_pod("client", namespace)
    fetch = "import urllib.request as r; print(r.urlopen('http://web/', timeout=2).status)"

    def answered() -> bool:
        command = ["exec", "client", "-n", namespace, "--", "python3", "-c", fetch]
        return cluster.kubectl(*command).strip() == "200"

    cluster.wait_for("an answer over the Service", answered, 30)


def train(cluster: Cluster, namespace: str, image: str, timeout_s: float) -> None:
    """Twelve steps by two ranks of ``image``'s trainer, one on each node."""
    cluster.apply(JOBSET.format(namespace=namespace, image=image))

    def end() -> str:
        jobset = cluster.get("jobset", "train", "-n", namespace)
        return str(jobset.get("status", {}).get("terminalState", ""))

    cluster.wait_for("the JobSet's end", end, timeout_s)

    assert end() == "Completed"
    pods = cluster.get("pods", "-n", namespace)["items"]
    assert {p["spec"]["nodeName"] for p in pods} == set(NODE_IPS)
    last = [cluster.logs(p["metadata"]["name"], namespace).splitlines()[-1] for p in pods]
    assert all(line.startswith("step 12 ") for line in last)
    # Both ranks hold the same weights to the last bit.
    assert len({line.split(" params ")[1] for line in last}) == 1


def test_a_jobset_trains_on_two_nodes(cluster: Cluster, namespace: str) -> None:
    train(cluster, namespace, "localhost/np:1", 90)


@pytest.mark.slow
def test_pytorch_trains_on_two_nodes(cluster: Cluster, torch_image: str, namespace: str) -> None:
    train(cluster, namespace, torch_image, 150)


def test_a_shared_volume_written_on_one_node_is_read_on_the_other(
    cluster: Cluster, namespace: str
) -> None:
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": namespace},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "claimRef": {"namespace": namespace, "name": "shared"},
            "hostPath": {"path": f"{SHARED}/{namespace}", "type": "DirectoryOrCreate"},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "shared", "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeName": namespace,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    writer = pod("writer", namespace, "n1", ["sh", "-c", "echo $HOSTNAME > /shared/file"])
    reader = pod("reader", namespace, "n2", ["cat", "/shared/file"])
    for each in (writer, reader):
        each["spec"]["volumes"] = [
            {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}
        ]
        each["spec"]["containers"][0]["volumeMounts"] = [{"name": "shared", "mountPath": "/shared"}]
    try:
        cluster.apply([volume, claim, writer])
        cluster.wait_for_pod("writer", namespace, "Succeeded")
        cluster.apply(reader)
        cluster.wait_for_pod("reader", namespace, "Succeeded")

        assert cluster.logs("reader", namespace).strip() == "writer"
    finally:
        cluster.delete("pv", namespace, "default", "--wait=false")


def test_kubelet_checkpoints_a_running_container(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("counter", namespace, "n1"))
    cluster.wait_for_pod("counter", namespace)
    node = cluster.node("n1")

    answer = json.loads(
        cluster.kubectl(
            *("create", "--raw", f"/api/v1/nodes/n1/proxy/checkpoint/{namespace}/counter/c"),
            *("-f", "/dev/null"),
        )
    )

    (archive,) = answer["items"]
    with tarfile.open(node.root / archive.lstrip("/")) as content:
        names = content.getnames()
    assert "checkpoint/inventory.img" in names
    node.exec("rm", archive)
    before = cluster.logs("counter", namespace).splitlines()[-1]
    cluster.wait_for(
        "the counter to count on",
        lambda: int(cluster.logs("counter", namespace).splitlines()[-1]) > int(before),
        10,
    )


def test_a_port_is_forwarded_through_the_api_server(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("server", namespace, "n2", ["python3", "-m", "http.server", "8000"]))
    cluster.wait_for_pod("server", namespace)
    script = (
        '"$0" port-forward -n "$1" pod/server 18000:8000 & trap "kill $!" EXIT; sleep 1; '
        'exec 3<> /dev/tcp/127.0.0.1/18000; printf "GET / HTTP/1.0\r\n\r\n" >&3; head -1 <&3'
    )

    def answer() -> str:
        kubectl = cluster.bin / "kubectl"
        return cluster.run_in_control_plane("bash", "-c", script, kubectl, namespace).stdout

    cluster.wait_for("an answer through the API server", lambda: "200 OK" in answer(), 30)


def test_who_has_no_rights_gets_nothing(cluster: Cluster, namespace: str) -> None:
    nobody = cluster.user_kubeconfig("nobody")

    question = ["auth", "can-i", "create", "nodes/checkpoint"]
    done = cluster.run_in_control_plane(
        cluster.bin / "kubectl", "--kubeconfig", nobody, *question, check=False
    )

    assert done.stdout.strip() == "no"
    assert cluster.kubectl(*question).strip() == "yes"


def test_the_front_proxys_authority_is_published(cluster: Cluster) -> None:
    published = cluster.get("configmap", "extension-apiserver-authentication", "-n", "kube-system")

    assert "client-ca-file" in published["data"]
    assert "requestheader-client-ca-file" in published["data"]


def test_a_kubelet_that_was_killed_comes_back_and_its_pods_live(
    cluster: Cluster, namespace: str
) -> None:
    cluster.apply(pod("counter", namespace, "n2"))
    cluster.wait_for_pod("counter", namespace)
    started = cluster.get("pod", "counter", "-n", namespace)["status"]["containerStatuses"]

    cluster.node("n2").kill("kubelet")
    cluster.node("n2").kill("containerd")

    cluster.wait_for(
        "kubelet to answer again",
        lambda: cluster.kubectl("exec", "counter", "-n", namespace, "--", "true") == "",
        60,
    )
    found = cluster.get("pod", "counter", "-n", namespace)["status"]["containerStatuses"]
    assert found[0]["containerID"] == started[0]["containerID"]
    assert found[0]["restartCount"] == 0


def test_both_nodes_see_the_shared_directory(cluster: Cluster) -> None:
    (cluster.shared / "here").write_text("x")
    try:
        for node in cluster.nodes.values():
            assert node.exec("cat", f"{SHARED}/here").stdout == "x"
    finally:
        (cluster.shared / "here").unlink()
