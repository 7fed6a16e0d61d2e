"""Who may make a pod wait for a restore, on the real cluster: the policy beside the webhook."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.model import optin
from tests.cluster.admission import admission, create, is_held, pod
from tests.cluster.cluster import Cluster, ClusterError

__all__ = ["admission"]  # a fixture

IMAGE_NAME = "job@20260131-235959-0a1b2c"


@pytest.fixture
def alice(cluster: Cluster, namespace: str) -> Path:
    """Somebody who may do in the namespace what the role "edit" allows."""
    return bound(cluster, namespace, "edit")


def bound(cluster: Cluster, namespace: str, role: str) -> Path:
    cluster.kubectl(
        "create", "rolebinding", role, f"--clusterrole={role}", "--user=alice", "-n", namespace
    )
    return cluster.user_kubeconfig("alice")


def may_create(cluster: Cluster, body: dict[str, object], who: Path) -> bool:
    try:
        create(cluster, body, "--dry-run=server", kubeconfig=who)
    except ClusterError as error:
        if "is reserved" not in str(error):
            raise
        return False
    return True


def test_an_ordinary_user_opts_in_but_cannot_make_a_pod_wait(
    admission: Cluster, cluster: Cluster, namespace: str, alice: Path
) -> None:
    assert is_held(create(cluster, pod("job", namespace), kubeconfig=alice))
    waiting = pod("again", namespace, annotations={optin.RESTORE: IMAGE_NAME})
    with pytest.raises(ClusterError, match="is reserved: alice may not restore"):
        create(cluster, waiting, kubeconfig=alice)
    with pytest.raises(ClusterError, match="is reserved"):
        cluster.kubectl(
            "annotate", "pod", "job", "-n", namespace, f"{optin.RESTORE}=x", kubeconfig=alice
        )


def test_whoever_may_restore_in_a_namespace_makes_placeholders_there_only(
    admission: Cluster, cluster: Cluster, namespace: str, alice: Path
) -> None:
    waiting = pod("job", namespace, annotations={optin.RESTORE: IMAGE_NAME})
    assert not may_create(cluster, waiting, alice)
    bound(cluster, namespace, "ckpt-agent-restorer")
    # Rights reach the API server's authorizer a moment later.
    cluster.wait_for("alice's right", lambda: may_create(cluster, waiting, alice), 10)
    create(cluster, waiting, kubeconfig=alice)
    cluster.wait_for_pod("job", namespace)
    words = ["exec", "job", "-n", namespace, "-c", "main", "--", "cat", "/proc/1/cmdline"]
    assert cluster.kubectl(*words).startswith("hold: waiting")
    assert cluster.logs("job", namespace, "-c", "main") == ""
    elsewhere = pod("job", "default", annotations={optin.RESTORE: IMAGE_NAME})
    with pytest.raises(ClusterError, match="forbidden"):
        create(cluster, elsewhere, kubeconfig=alice)


def test_a_template_cannot_smuggle_the_annotation_in(
    admission: Cluster, cluster: Cluster, namespace: str, alice: Path
) -> None:
    template = pod("x", namespace, annotations={optin.RESTORE: IMAGE_NAME})
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "forged", "namespace": namespace},
        "spec": {
            "template": {
                "metadata": {key: template["metadata"][key] for key in ("labels", "annotations")},
                "spec": template["spec"],
            }
        },
    }
    create(cluster, job, kubeconfig=alice)

    def refused() -> bool:
        events = cluster.get("events", "-n", namespace)["items"]
        return any("is reserved" in each["message"] for each in events)

    cluster.wait_for("the refusal to be told", refused, 30)
    assert cluster.get("pods", "-n", namespace)["items"] == []


def test_a_misspelt_key_is_warned_of_and_the_known_ones_are_not(
    admission: Cluster, cluster: Cluster, namespace: str
) -> None:
    known = {optin.CONTAINERS: "main", optin.STORE: "default"}
    for keys, warned in ((known, False), ({"ckpt-agent.dev/container": "main"}, True)):
        body = json.dumps(pod("job", namespace, annotations=keys))
        done = cluster.run_in_control_plane(
            cluster.bin / "kubectl", "create", "--dry-run=server", "-f", "-", stdin=body
        )
        assert ("unknown annotation" in done.stderr) == warned, done.stderr
