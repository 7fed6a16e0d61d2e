"""The annotation that makes a pod wait is for those who may restore; the API server sees to it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from agent.model import optin
from tests.cluster.cluster import Cluster, ClusterError

DEPLOY = Path(__file__).parents[2] / "deploy/daemonset"
# The API server begins to enforce a policy soon after it was told of it.
ENFORCED_S = 30.0


@pytest.fixture
def policed(cluster: Cluster, namespace: str) -> str:
    """A namespace where alice may edit, and bob may restore as well."""
    for name in ("roles.yaml", "policy.yaml"):
        text = (DEPLOY / name).read_text()
        # A role of the project's own namespace has nothing to do with the policy.
        cluster.apply("\n---\n".join(d for d in text.split("\n---\n") if "\nkind: Role\n" not in d))
    for user, roles in (("alice", ["edit"]), ("bob", ["edit", "ckpt-agent-restorer"])):
        for role in roles:
            cluster.kubectl(
                *("create", "rolebinding", f"{user}-{role}", "-n", namespace),
                *(f"--clusterrole={role}", f"--user={user}"),
            )
    cluster.wait_for(
        "the policy's enforcement",
        lambda: "reserved" in refusal(cluster, "alice", pod(namespace, {optin.RESTORE: "x@1"})),
        ENFORCED_S,
    )
    return namespace


def pod(
    namespace: str,
    annotations: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "forged",
            "namespace": namespace,
            "annotations": annotations or {},
            "labels": labels or {},
        },
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "localhost/pause:1"}],
        },
    }


def create(cluster: Cluster, user: str, found: dict[str, Any]) -> str:
    """What kubectl says to a dry run, which goes through all of admission."""
    return cluster.kubectl(
        *("create", "--dry-run=server", f"--as={user}", "-f", "-"), stdin=json.dumps(found)
    )


def refusal(cluster: Cluster, user: str, found: dict[str, Any]) -> str:
    try:
        create(cluster, user, found)
    except ClusterError as exc:
        return str(exc)
    return ""


def test_only_who_may_restore_makes_a_placeholder(cluster: Cluster, policed: str) -> None:
    placeholder = pod(policed, {optin.RESTORE: "job@20261122T030000Z-abcd"})
    said = refusal(cluster, "alice", placeholder)
    assert "alice may not restore images.ckpt-agent.dev in namespace " + policed in said
    assert refusal(cluster, "bob", placeholder) == ""
    assert refusal(cluster, "alice", pod(policed)) == ""


def test_the_right_is_one_of_the_pods_namespace(
    cluster: Cluster, policed: str, namespace: str
) -> None:
    other = f"{namespace}-other"
    cluster.kubectl("create", "namespace", other)
    try:
        cluster.kubectl(
            *("create", "rolebinding", "edit", "-n", other, "--clusterrole=edit", "--user=bob")
        )
        said = refusal(cluster, "bob", pod(other, {optin.RESTORE: "job@1"}))
        assert f"bob may not restore images.ckpt-agent.dev in namespace {other}" in said
    finally:
        cluster.kubectl("delete", "namespace", other, "--wait=false")


def test_a_pod_that_runs_can_neither_be_made_to_wait_nor_told_another_image(
    cluster: Cluster, policed: str
) -> None:
    def annotate(user: str, value: str) -> str:
        try:
            return cluster.kubectl(
                *("annotate", "pod", "forged", "-n", policed, "--overwrite", f"--as={user}"),
                f"{optin.RESTORE}{value}",
            )
        except ClusterError as exc:
            return str(exc)

    cluster.kubectl("create", "--as=alice", "-f", "-", stdin=json.dumps(pod(policed)))
    assert "alice may not restore" in annotate("alice", "=job@1")
    assert "annotated" in annotate("bob", "=job@1")
    assert "cannot be changed" in annotate("bob", "=job@2")
    assert "may not restore" in annotate("alice", "-")
    assert "cannot be changed" in annotate("bob", "-")
    # The kubelet goes on telling of such a pod.
    cluster.wait_for_pod("forged", policed)
    assert "annotated" in cluster.kubectl(
        "annotate", "pod", "forged", "-n", policed, "--as=alice", "other=x"
    )


def test_hooks_of_a_pod_are_changed_only_by_who_may_exec(cluster: Cluster, policed: str) -> None:
    change = ("--verb=get,patch,update", "--resource=pods,pods/status")
    cluster.kubectl("create", "role", "changes", "-n", policed, *change)
    bound = ("--role=changes", "--user=carol")
    cluster.kubectl("create", "rolebinding", "carol", "-n", policed, *bound)

    def annotate(user: str, key: str, value: str | None, *more: str) -> str:
        patch = json.dumps({"metadata": {"annotations": {key: value}}})
        told = ("patch", "pod", "forged", "-n", policed, f"--as={user}", "--type=merge", *more)
        try:
            return cluster.kubectl(*told, "-p", patch)
        except ClusterError as exc:
            return str(exc)

    forged = pod(policed, {optin.HOOKS: "{}"})
    cluster.kubectl("create", "--as=alice", "-f", "-", stdin=json.dumps(forged))
    cluster.wait_for(
        "the policy's enforcement",
        lambda: "may not create pods/exec" in annotate("carol", optin.HOOKS, '{"pre": []}'),
        ENFORCED_S,
    )
    for value in ('{"post": []}', None):
        for more in ((), ("--subresource=status",)):
            assert "carol may not create pods/exec" in annotate("carol", optin.HOOKS, value, *more)
    assert "patched" in annotate("carol", "other", "x", "--subresource=status")
    assert cluster.get("pod", "forged", "-n", policed)["metadata"]["annotations"]["other"] == "x"
    assert "patched" in annotate("carol", "other", "y")
    # May edit, and so exec.
    assert "patched" in annotate("alice", optin.HOOKS, '{"post": []}')
    assert "patched" in annotate("alice", optin.HOOKS, None)
    # The kubelet goes on telling of such a pod.
    cluster.wait_for_pod("forged", policed)


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("job@1", {}),
        # As if it were one of a JobSet's, which comes back.
        (
            "jobset.train@20261122-030000-0a1b2c",
            {
                "jobset.sigs.k8s.io/jobset-name": "train",
                "jobset.sigs.k8s.io/replicatedjob-name": "worker",
                "jobset.sigs.k8s.io/job-index": "0",
            },
        ),
    ],
    ids=["of its own", "with a JobSet's labels"],
)
def test_a_template_does_not_lend_its_controllers_rights(
    cluster: Cluster, policed: str, image: str, labels: dict[str, str]
) -> None:
    template = pod(policed, {optin.RESTORE: image}, labels)
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "forged", "namespace": policed},
        "spec": {
            "template": {
                "metadata": {key: template["metadata"][key] for key in ("annotations", "labels")},
                "spec": template["spec"] | {"restartPolicy": "Never"},
            }
        },
    }
    cluster.kubectl("create", "--as=alice", "-f", "-", stdin=json.dumps(job))
    cluster.wait_for(
        "the refusal of its pods",
        lambda: "reserved" in json.dumps(cluster.get("events", "-n", policed)),
        30,
    )
    assert cluster.get("pods", "-n", policed)["items"] == []


@pytest.mark.parametrize(
    ("annotations", "labels", "warned"),
    [
        ({"ckpt-agent.dev/container": "c"}, {}, "unknown annotation"),
        ({}, {"ckpt-agent.dev/checkpiont": "enabled"}, "unknown label"),
        ({}, {optin.LABEL: "true"}, "has one meaning"),
        ({optin.CONTAINERS: "c"}, {optin.LABEL: optin.ENABLED}, ""),
    ],
)
def test_what_is_misspelt_is_warned_of_and_runs(
    cluster: Cluster,
    policed: str,
    annotations: dict[str, str],
    labels: dict[str, str],
    warned: str,
) -> None:
    found = pod(policed, annotations, labels)
    # Warnings are on stderr; made errors, they can be seen from here.
    try:
        cluster.kubectl(
            *("create", "--dry-run=server", "--warnings-as-errors", "-f", "-"),
            stdin=json.dumps(found),
        )
        said = ""
    except ClusterError as exc:
        said = str(exc)
    ours = "ckpt-agent-keys" in said
    assert ours is bool(warned)
    assert warned in said
    assert refusal(cluster, "alice", found) == ""


def jobset(namespace: str, of_itself: str = "", of_its_pods: str = "") -> dict[str, Any]:
    def said(value: str) -> dict[str, str]:
        return {optin.RESTORE: value} if value else {}

    template = {
        "metadata": {"annotations": said(of_its_pods)},
        "spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "c", "image": "localhost/pause:1"}],
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": "train", "namespace": namespace, "annotations": said(of_itself)},
        "spec": {
            "suspend": True,
            "replicatedJobs": [{"name": "worker", "template": {"spec": {"template": template}}}],
        },
    }


def test_only_who_may_restore_says_what_a_jobset_comes_back_as(
    cluster: Cluster, policed: str
) -> None:
    may_edit = ("--verb=create,patch,get", "--resource=jobsets.jobset.x-k8s.io")
    cluster.kubectl("create", "role", "jobsets", "-n", policed, *may_edit)
    for user in ("alice", "bob"):
        bound = ("--role=jobsets", f"--user={user}")
        cluster.kubectl("create", "rolebinding", f"{user}-jobsets", "-n", policed, *bound)
    cluster.wait_for(
        "alice's JobSets", lambda: refusal(cluster, "alice", jobset(policed)) == "", ENFORCED_S
    )
    waits = "jobset.train@20261122-030000-0a1b2c"
    for found in (jobset(policed, of_itself=waits), jobset(policed, of_its_pods=waits)):
        refused = functools.partial(refusal, cluster, "alice", found)
        cluster.wait_for("the refusal", refused, ENFORCED_S)
        assert "reserved" in refused()
        assert refusal(cluster, "bob", found) == ""
    # Called off by anybody who may change it, and changed otherwise as it pleases them.
    cluster.apply(jobset(policed, of_itself="x"))
    patch = ("patch", "jobset", "train", "-n", policed, "--as=alice", "--type=merge", "-p")
    cluster.kubectl(*patch, json.dumps({"metadata": {"labels": {"a": "b"}}}))
    with pytest.raises(ClusterError, match="reserved"):
        cluster.kubectl(*patch, json.dumps({"metadata": {"annotations": {optin.RESTORE: "y"}}}))
    cluster.kubectl(*patch, json.dumps({"metadata": {"annotations": {optin.RESTORE: None}}}))
