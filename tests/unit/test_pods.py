"""What an agent reads of a pod, and the template that makes another one like it."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.model import optin, pods
from agent.model.container import HOLD

FOUND: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "w-0",
        "namespace": "team-a",
        "uid": "u",
        "resourceVersion": "7",
        "generation": 1,
        "generateName": "w-",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "deletionTimestamp": "2026-01-02T00:00:00Z",
        "deletionGracePeriodSeconds": 30,
        "managedFields": [{}],
        "labels": {optin.LABEL: optin.ENABLED, "job-name": "w"},
        "annotations": {
            optin.CONTAINERS: "main",
            optin.RESTORE: "w-0@old",
            "kubectl.kubernetes.io/last-applied-configuration": "{}",
            "team/owner": "ada",
        },
        "ownerReferences": [{"kind": "Job", "name": "w", "uid": "j"}],
    },
    "spec": {
        "nodeName": "n1",
        "hostname": "w-0",
        "schedulerName": "default-scheduler",
        "ephemeralContainers": [{"name": "debug"}],
        "initContainers": [
            {"name": "hold", "image": "a"},
            {"name": "side", "image": "s", "restartPolicy": "Always"},
        ],
        "containers": [
            {
                "name": "main",
                "image": "i",
                "volumeMounts": [
                    {"name": "data", "mountPath": "/data"},
                    {"name": "kube-api-access-x7k2p", "mountPath": "/var/run/secrets/x"},
                ],
            }
        ],
        "volumes": [
            {"name": "data", "emptyDir": {}},
            {"name": "kube-api-access-x7k2p", "projected": {"sources": []}},
        ],
    },
    "status": {"phase": "Running", "podIP": "10.0.0.1"},
}


def test_what_the_agent_knows_of_a_pod() -> None:
    pod = pods.read(FOUND)
    assert (str(pod), pod.uid, pod.node, pod.phase) == ("team-a/w-0", "u", "n1", "Running")
    assert pod.containers == ("side", "main")
    assert pod.ending
    assert set(pod.annotations) == {optin.CONTAINERS, optin.RESTORE}


def test_another_one_like_it_keeps_what_its_owner_said_and_nothing_of_this_one() -> None:
    template = json.loads(pods.read(FOUND).template_json)
    assert set(template) == {"apiVersion", "kind", "metadata", "spec"}
    assert template["metadata"] == {
        "name": "w-0",
        "namespace": "team-a",
        "labels": FOUND["metadata"]["labels"],
        "annotations": {optin.CONTAINERS: "main", "team/owner": "ada"},
        "ownerReferences": FOUND["metadata"]["ownerReferences"],
    }
    spec = template["spec"]
    assert set(spec) == {"hostname", "schedulerName", "initContainers", "containers", "volumes"}
    assert spec["volumes"] == [{"name": "data", "emptyDir": {}}]
    assert spec["containers"][0]["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]


def test_reading_changes_nothing() -> None:
    before = json.dumps(FOUND)
    pods.read(FOUND)
    assert json.dumps(FOUND) == before


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
parts = st.dictionaries(
    st.sampled_from(["name", "labels", "annotations", "containers", "volumes", "nodeName"]),
    anything,
)


def test_what_an_image_runs_is_noted_where_the_pod_leaves_it_to_the_image() -> None:
    known = json.dumps({"told": ["by", "the owner"]})
    pod: dict[str, Any] = {
        "metadata": {"annotations": {optin.ENTRYPOINT: known}},
        "spec": {
            "initContainers": [{"name": "side", "restartPolicy": "Always"}],
            "containers": [
                {"name": "plain"},
                {"name": "with-args", "args": ["a", "$(B)"]},
                {"name": "command", "command": ["run"]},
                {"name": "held", "command": [HOLD, "auto", "run"]},
                {"name": "told"},
                {"name": "not-dumped"},
            ],
        },
    }
    started = {
        "side": ("proxy",),
        "plain": ("tini", "--", "serve"),
        "with-args": ("entry", "a", "b"),
        "command": ("run",),
        "held": (HOLD, "auto", "run"),
        "told": ("something", "else"),
    }
    noted = pods.with_entrypoints(pod, started)
    assert optin.entrypoints(noted["metadata"]["annotations"]) == {
        "told": ["by", "the owner"],
        "side": ["proxy"],
        "plain": ["tini", "--", "serve"],
        "with-args": ["entry"],
    }
    assert pod["metadata"]["annotations"] == {optin.ENTRYPOINT: known}
    assert pods.with_entrypoints(pod, {}) == pod


@given(st.fixed_dictionaries({"metadata": parts | anything, "spec": parts | anything}))
def test_no_pod_is_too_strange_to_read(found: dict[str, Any]) -> None:
    pod = pods.read(found)
    json.loads(pod.template_json)
    assert all(isinstance(name, str) for name in pod.containers)
