"""The admission service on the real cluster, deployed as users deploy it, called for real."""

from __future__ import annotations

import base64
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.admission import certificates
from agent.model import optin
from tests.cluster.admission import (
    COUNTER,
    PROJECT,
    ROOT,
    SERVICE,
    called,
    create,
    is_held,
    pod,
)
from tests.cluster.cluster import Cluster, ClusterError


def lines(cluster: Cluster, name: str, namespace: str) -> list[str]:
    return cluster.logs(name, namespace, "-c", "main").splitlines()


def test_an_opted_in_pod_starts_under_hold_and_does_its_work(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    created = create(cluster, pod("job", namespace))
    assert is_held(created)
    assert [c["name"] for c in created["spec"]["initContainers"]] == [optin.INIT_CONTAINER]
    found = cluster.wait_for_pod("job", namespace)
    assert found["status"]["qosClass"] == "BestEffort"
    first = cluster.kubectl(
        "exec", "job", "-n", namespace, "-c", "main", "--", "cat", "/proc/1/cmdline"
    )
    assert first.startswith("hold: following")
    cluster.wait_for("the counter", lambda: len(lines(cluster, "job", namespace)) > 2, 20)


def test_a_pod_without_the_label_is_not_touched(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    body = pod("job", namespace)
    body["metadata"]["labels"] = {"app": "job"}
    assert create(cluster, body)["spec"]["containers"][0]["command"] == COUNTER


def test_a_dry_run_shows_the_same_and_leaves_nothing(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    dry = create(cluster, pod("job", namespace), "--dry-run=server")
    real = create(cluster, pod("job", namespace))
    for found in (dry, real):  # the ServiceAccount's volume has a random name
        for volume in found["spec"]["volumes"]:
            if volume["name"].startswith("kube-api-access-"):
                volume["name"] = "kube-api-access"
        for part in [*found["spec"]["containers"], *found["spec"]["initContainers"]]:
            for mount in part["volumeMounts"]:
                if mount["name"].startswith("kube-api-access-"):
                    mount["name"] = "kube-api-access"
    assert dry["spec"] == real["spec"]


def test_the_restricted_level_of_pod_security_admits_and_runs_it(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    cluster.kubectl(
        "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"
    )
    body = pod("job", namespace)
    body["spec"]["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    body["spec"]["containers"][0]["securityContext"] = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    body["spec"]["containers"][0]["resources"] = {"limits": {"cpu": "1", "memory": "64Mi"}}
    assert is_held(create(cluster, body))
    assert cluster.wait_for_pod("job", namespace)["status"]["qosClass"] == "Guaranteed"
    cluster.wait_for("the counter", lambda: len(lines(cluster, "job", namespace)) > 2, 20)


def test_a_pod_that_cannot_be_held_starts_and_says_why(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    created = create(cluster, pod("job", namespace, shareProcessNamespace=True))
    assert created["spec"]["containers"][0]["command"] == COUNTER
    assert "shareProcessNamespace" in created["metadata"]["annotations"][optin.NOT_HELD]
    cluster.wait_for_pod("job", namespace)


def test_a_pod_made_from_another_ones_template_is_not_changed_again(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    first = create(cluster, pod("job", namespace))
    template = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "again",
            "namespace": namespace,
            "labels": first["metadata"]["labels"],
        },
        "spec": {k: v for k, v in first["spec"].items() if k != "nodeName"},
    }
    second = create(cluster, template)
    for field in ("containers", "initContainers", "volumes"):
        assert second["spec"][field] == first["spec"][field]


def test_a_pod_of_the_same_template_with_the_reserved_annotation_waits(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    image = "job@20260131-235959-0a1b2c"
    create(cluster, pod("job", namespace, annotations={optin.RESTORE: image}))
    cluster.wait_for_pod("job", namespace)
    first = cluster.kubectl(
        "exec", "job", "-n", namespace, "-c", "main", "--", "cat", "/proc/1/cmdline"
    )
    assert first.startswith("hold: waiting")
    assert lines(cluster, "job", namespace) == []


@pytest.fixture
def sidecar_webhook(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """Another webhook, which the API server calls after ours (they go by name)."""
    ca = certificates.new_authority(time.time(), 3600)
    leaf = certificates.new_leaf(ca, ["localhost"], time.time(), 3600)
    (tmp_path / "crt").write_bytes(leaf.certificate)
    (tmp_path / "key").write_bytes(leaf.key)
    port = 18443
    name = "zz.sidecar.test"
    command = [sys.executable, "-m", "tests.cluster.sidecar_webhook", str(port)]
    process = subprocess.Popen(
        cluster.in_control_plane([*command, tmp_path / "crt", tmp_path / "key"]), cwd=ROOT
    )
    configuration = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": name},
        "webhooks": [
            {
                "name": name,
                "clientConfig": {
                    "url": f"https://localhost:{port}/mutate",
                    "caBundle": base64.b64encode(ca.certificate).decode(),
                },
                "rules": [
                    {
                        "apiGroups": [""],
                        "apiVersions": ["v1"],
                        "resources": ["pods"],
                        "operations": ["CREATE"],
                    }
                ],
                "objectSelector": {"matchLabels": {"sidecar": "wanted"}},
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "failurePolicy": "Fail",
            }
        ],
    }
    try:
        cluster.apply(configuration)
        yield
    finally:
        with contextlib.suppress(ClusterError):
            cluster.kubectl("delete", "mutatingwebhookconfiguration", name)
        process.kill()
        process.wait()


def test_a_container_that_another_webhook_adds_afterwards_is_held_too(
    agents: Cluster, cluster: Cluster, namespace: str, sidecar_webhook: None
) -> None:
    body = pod("job", namespace)
    body["metadata"]["labels"]["sidecar"] = "wanted"
    found: dict[str, Any] = {}

    def created() -> bool:  # the API server learns of the other webhook a moment later
        nonlocal found
        found = create(cluster, body, "--dry-run=server")
        return len(found["spec"]["containers"]) == 2

    cluster.wait_for("the other webhook", created, 30)
    assert [c["name"] for c in found["spec"]["containers"]] == ["barrier", "main"]
    assert is_held(found)
    assert [c["name"] for c in found["spec"]["initContainers"]] == [optin.INIT_CONTAINER]


def test_the_pods_of_a_jobset_are_held(agents: Cluster, cluster: Cluster, namespace: str) -> None:
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "train", "namespace": namespace},
        "spec": {
            "coordinator": {"replicatedJob": "worker"},
            "replicatedJobs": [
                {
                    "name": "worker",
                    "template": {
                        "spec": {
                            "parallelism": 2,
                            "completions": 2,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "template": {
                                "metadata": {"labels": {optin.LABEL: optin.ENABLED}},
                                "spec": pod("x", "x")["spec"],
                            },
                        }
                    },
                }
            ],
        },
    }
    cluster.apply(jobset)

    def running() -> bool:
        pods = cluster.get("pods", "-n", namespace)["items"]
        return [each["status"]["phase"] for each in pods] == ["Running"] * 2

    cluster.wait_for("both pods of the JobSet", running, 60)
    pods = cluster.get("pods", "-n", namespace)["items"]
    assert all(is_held(each) for each in pods)
    # JobSet's own webhook has done its part as well.
    key = "jobset.sigs.k8s.io/coordinator"
    assert all(each["metadata"]["labels"][key] for each in pods)


@contextlib.contextmanager
def creating(cluster: Cluster) -> Iterator[list[bool]]:
    """Create pods without end, dry, and note whether each came back held."""
    held: list[bool] = []
    stop = threading.Event()
    failures: list[ClusterError] = []

    def go_on() -> None:
        try:
            while not stop.wait(0.1):
                held.append(called(cluster))
        except ClusterError as error:
            failures.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        thread.join(60)
    assert failures == []


def test_a_replica_can_end_without_a_pod_being_missed(agents: Cluster, cluster: Cluster) -> None:
    with creating(cluster) as held:
        before = {p["metadata"]["uid"] for p in replicas(cluster)}
        cluster.kubectl("rollout", "restart", f"deployment/{SERVICE}", "-n", PROJECT)
        cluster.kubectl(
            "rollout", "status", f"deployment/{SERVICE}", "-n", PROJECT, "--timeout=90s"
        )
        cluster.wait_for(
            "the old replicas' end",
            lambda: not before & {p["metadata"]["uid"] for p in replicas(cluster)},
            60,
        )
    assert len(held) > 10
    assert all(held), complaints(cluster)


def complaints(cluster: Cluster) -> list[str]:
    """Why the API server went on without the webhook."""
    log = cluster.control_plane.tail("kube-apiserver", 1000).splitlines()
    return [line for line in log if "failing open" in line]


def replicas(cluster: Cluster) -> list[dict[str, Any]]:
    selector = f"app.kubernetes.io/name={SERVICE}"
    found: list[dict[str, Any]] = cluster.get("pods", "-n", PROJECT, "-l", selector)["items"]
    return found


def test_while_the_service_is_down_pods_start_as_they_are(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    scale(cluster, 0)
    try:
        created = create(cluster, pod("job", namespace))
        assert created["spec"]["containers"][0]["command"] == COUNTER
        cluster.wait_for_pod("job", namespace)
    finally:
        scale(cluster, 2)
    cluster.wait_for("the webhook to be called again", lambda: called(cluster), 30)


def scale(cluster: Cluster, replicas_: int) -> None:
    cluster.kubectl("scale", f"deployment/{SERVICE}", "-n", PROJECT, f"--replicas={replicas_}")
    if replicas_:
        cluster.wait_for_deployment(SERVICE, PROJECT)
    else:
        cluster.wait_for("the replicas' end", lambda: not replicas(cluster), 60)


@pytest.fixture
def short_lives(agents: Cluster, cluster: Cluster) -> Iterator[None]:
    """Certificates that live for seconds; the usual ones afterwards."""
    lives = {
        "LEAF_LIFETIME": "70s",
        "LEAF_RENEW_BEFORE": "45s",
        "CA_LIFETIME": "110s",
        "CA_RENEW_BEFORE": "80s",
        "TRUST_OVERLAP": "15s",
    }
    set_variables(cluster, [f"CKPT_AGENT_{key}={value}" for key, value in lives.items()])
    try:
        yield
    finally:
        # A new authority with the usual life, which signs soon; then the usual overlap.
        set_variables(cluster, [f"CKPT_AGENT_{key}-" for key in lives if key != "TRUST_OVERLAP"])
        new_authority(cluster)
        set_variables(cluster, ["CKPT_AGENT_TRUST_OVERLAP-"])
        # The kubelet brings a changed Secret into pods at once when it looks at them anyway.
        of_agents = ["pods", "-n", PROJECT, "-l", "app.kubernetes.io/name=ckpt-agent-node"]
        mark = f"looked-at={time.time():.0f}"
        cluster.kubectl("annotate", *of_agents, mark, "--overwrite")


def set_variables(cluster: Cluster, variables: list[str]) -> None:
    """Set the service's environment."""
    target = [f"deployment/{SERVICE}", "-n", PROJECT]
    cluster.kubectl("set", "env", *target, *variables)
    cluster.kubectl("rollout", "status", *target, "--timeout=90s")


def new_authority(cluster: Cluster) -> None:
    """Lose the authority, and wait until another one signs, an overlap later."""
    before = signer(cluster)
    cluster.kubectl("delete", "secret", "ckpt-agent-ca", "-n", PROJECT)
    cluster.wait_for("a new authority", lambda: signer(cluster) != before, 90)


def trusted(cluster: Cluster) -> bytes:
    """The authorities that clients trust."""
    found = cluster.get("configmap", "ckpt-agent-ca", "-n", PROJECT)
    return str(found["data"]["ca.crt"]).encode()


def signer(cluster: Cluster) -> str:
    """The identity of the authority that signed what is served."""
    data = cluster.get("secret", "ckpt-agent-tls", "-n", PROJECT)["data"]
    return certificates.Pair(base64.b64decode(data["tls.crt"])).issued.signer


@pytest.mark.slow
def test_authorities_are_lost_and_replaced_without_a_pod_being_missed(
    agents: Cluster, cluster: Cluster, short_lives: None
) -> None:
    bundles: set[bytes] = set()
    signers: set[str] = set()
    with creating(cluster) as held:
        new_authority(cluster)
        end = time.monotonic() + 180
        while len(signers) < 3 and time.monotonic() < end:
            bundles.add(trusted(cluster))
            signers.add(signer(cluster))
            time.sleep(1)
    assert all(held), complaints(cluster)
    assert len(held) > 30
    assert len(signers) == 3
    assert max(len(certificates.read_bundle(text)) for text in bundles) > 1


def may(cluster: Cluster, verb: str, *what: str) -> bool:
    user = f"system:serviceaccount:{PROJECT}:{SERVICE}"
    try:
        return cluster.kubectl("auth", "can-i", verb, *what, "--as", user).strip() == "yes"
    except ClusterError:
        return False


def test_the_service_may_do_no_more_than_it_needs(
    agents: Cluster, cluster: Cluster, namespace: str
) -> None:
    assert may(cluster, "update", "secret/ckpt-agent-ca", "-n", PROJECT)
    for verb, *what in (
        ("get", "secrets", "-n", PROJECT),
        ("list", "secrets", "-n", PROJECT),
        ("get", "secret/other", "-n", PROJECT),
        ("delete", "secret/ckpt-agent-ca", "-n", PROJECT),
        ("create", "secrets", "-n", namespace),
        ("get", "pods", "-n", namespace),
        ("create", "pods", "-n", PROJECT),
        ("update", "mutatingwebhookconfigurations/jobset-mutating-webhook-configuration"),
        ("create", "mutatingwebhookconfigurations"),
        ("get", "nodes"),
    ):
        assert not may(cluster, verb, *what), (verb, what)
