"""Moving a pod: objections, the replacement, and what is told when a step fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from agent.admission.mutate import mutate
from agent.model import move, optin
from agent.model.container import HOLD
from tests import jsonpatch

_HELD = {"name": "c", "command": [HOLD, "auto", "run"]}
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def pod(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "job"}, "spec": {"containers": [_HELD], **spec}}


def node(labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "n2", "labels": labels or {}},
        "spec": spec,
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


def affinity(*expressions: dict[str, Any]) -> dict[str, Any]:
    terms = [{"matchExpressions": [each]} for each in expressions]
    return {"nodeAffinity": {_REQUIRED: {"nodeSelectorTerms": terms}}}


def expression(operator: str, *values: str) -> dict[str, Any]:
    return {"key": "zone", "operator": operator, "values": list(values)}


def terms_of(made: dict[str, Any]) -> Any:
    return made["spec"]["affinity"]["nodeAffinity"][_REQUIRED]["nodeSelectorTerms"]


def test_a_held_pod_of_nobody_can_be_moved() -> None:
    assert move.objections(pod()) == []
    garbage_collector_only = pod() | {
        "metadata": {"name": "job", "ownerReferences": [{"kind": "ConfigMap", "name": "x"}]}
    }
    assert move.objections(garbage_collector_only) == []


def test_every_objection_is_found_at_once() -> None:
    found = {
        "metadata": {
            "name": "job",
            "ownerReferences": [{"kind": "ReplicaSet", "name": "web", "controller": True}],
            "annotations": {"kubernetes.io/config.mirror": "x"},
        },
        "spec": {"containers": [{"name": "c", "command": ["run"]}, {"name": "d"}]},
    }
    first, second = move.objections(found)
    assert "ReplicaSet web" in first
    assert "static pod" in second


@pytest.mark.parametrize(
    ("spec", "target", "told"),
    [
        ({}, node(), None),
        ({}, node(unschedulable=True), "cordoned"),
        ({}, node(taints=[{"key": "k", "effect": "NoSchedule"}]), "k:NoSchedule"),
        ({}, node(taints=[{"key": "k", "value": "v", "effect": "NoExecute"}]), "k=v:NoExecute"),
        ({}, node(taints=[{"key": "k", "effect": "PreferNoSchedule"}]), None),
        (
            {"tolerations": [{"key": "k", "operator": "Exists"}]},
            node(taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}]),
            None,
        ),
        (
            {"tolerations": [{"operator": "Exists"}]},
            node(taints=[{"key": "k", "effect": "NoSchedule"}]),
            None,
        ),
        (
            {"tolerations": [{"key": "k", "value": "w"}]},
            node(taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}]),
            "not tolerated",
        ),
        (
            {"tolerations": [{"key": "k", "value": "v", "effect": "NoExecute"}]},
            node(taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}]),
            "not tolerated",
        ),
        ({"nodeSelector": {"gpu": "a"}}, node({"gpu": "b"}), "gpu=a"),
        ({"nodeSelector": {"gpu": "a"}}, node({"gpu": "a"}), None),
        ({"affinity": affinity(expression("In", "a", "b"))}, node({"zone": "b"}), None),
        ({"affinity": affinity(expression("In", "a"))}, node({"zone": "b"}), "affinity"),
        ({"affinity": affinity(expression("NotIn", "a"))}, node(), None),
        ({"affinity": affinity(expression("Exists"))}, node(), "affinity"),
        ({"affinity": affinity(expression("DoesNotExist"))}, node(), None),
        ({"affinity": affinity(expression("Gt", "3"))}, node({"zone": "4"}), None),
        ({"affinity": affinity(expression("Lt", "3"))}, node({"zone": "4"}), "affinity"),
        ({"affinity": affinity(expression("Gt", "3"))}, node({"zone": "x"}), "affinity"),
        (
            {"affinity": affinity(expression("In", "a"), expression("In", "b"))},
            node({"zone": "b"}),
            None,
        ),
    ],
)
def test_what_a_scheduler_would_refuse_is_known_before(
    spec: dict[str, Any], target: dict[str, Any], told: str | None
) -> None:
    found = move.node_objections(pod(**spec), target)
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


def test_a_node_that_is_not_ready_is_refused() -> None:
    target = node()
    target["status"]["conditions"][0]["status"] = "Unknown"
    assert move.node_objections(pod(), target) == ["it is not ready"]


def test_the_replacement_waits_for_the_image_on_the_node_and_the_template_is_left_alone() -> None:
    template = pod(nodeName="n1", nodeSelector={"a": "b"})
    before = copy.deepcopy(template)
    made = move.replacement(template, image="job@x", members=["c"], node="n2")
    assert template == before
    assert (made["apiVersion"], made["kind"]) == ("v1", "Pod")
    assert made["metadata"] == {"name": "job", "annotations": {optin.RESTORE: "job@x"}}
    assert "nodeName" not in made["spec"]
    assert made["spec"]["nodeSelector"] == {"a": "b"}
    pin = {"key": "metadata.name", "operator": "In", "values": ["n2"]}
    assert terms_of(made) == [{"matchFields": [pin]}]


def test_the_replacement_stands_alone() -> None:
    template = pod()
    template["metadata"] |= {
        "finalizers": ["batch.kubernetes.io/job-tracking"],
        "labels": {"batch.kubernetes.io/controller-uid": "u", "job-name": "train", "a": "b"},
        "ownerReferences": [
            {"kind": "Job", "name": "train", "controller": True},
            {"kind": "ConfigMap", "name": "x"},
        ],
    }
    metadata = move.replacement(template, image="job@x", members=["c"], node="n2")["metadata"]
    assert "finalizers" not in metadata
    assert metadata["labels"] == {"job-name": "train", "a": "b"}
    assert metadata["ownerReferences"] == [{"kind": "ConfigMap", "name": "x"}]


def test_each_alternative_of_an_affinity_is_pinned_and_preferences_stay() -> None:
    wanted = affinity(expression("In", "a"), expression("In", "b"))
    wanted["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] = ["p"]
    wanted["podAntiAffinity"] = {"x": "y"}
    made = move.replacement(pod(affinity=wanted), image="job@x", members=["c"], node="n2")
    assert [len(term["matchExpressions"]) for term in terms_of(made)] == [1, 1]
    assert all(term["matchFields"][0]["values"] == ["n2"] for term in terms_of(made))
    assert made["spec"]["affinity"]["podAntiAffinity"] == {"x": "y"}
    preferred = "preferredDuringSchedulingIgnoredDuringExecution"
    assert made["spec"]["affinity"]["nodeAffinity"][preferred] == ["p"]


def test_a_pod_that_was_moved_before_can_move_on() -> None:
    once = move.replacement(pod(), image="job@x", members=["c"], node="n2")
    assert move.node_objections(once, node()) == []
    twice = move.replacement(once, image="job@y", members=["c"], node="n1")
    assert [each["values"] for term in terms_of(twice) for each in term["matchFields"]] == [["n1"]]
    assert twice["metadata"]["annotations"] == {optin.RESTORE: "job@y"}


def test_the_replacement_of_a_pod_that_was_never_opted_in_waits_all_the_same() -> None:
    template = pod(
        containers=[{"name": "c", "args": ["x"]}, {"name": "d", "command": ["run"]}],
        initContainers=[
            {"name": "before", "command": ["once"]},
            {"name": "side", "command": ["beside"], "restartPolicy": "Always"},
        ],
    )
    assert move.members(template) == ("c", "d", "side")
    asked = move.replacement(template, image="job@x", members=["c", "side"], node="n2")
    assert asked["metadata"]["labels"] == {optin.LABEL: optin.ENABLED}
    assert asked["metadata"]["annotations"][optin.CONTAINERS] == "c,side"
    reasons = move.not_waiting(asked, ["c", "side"])
    assert [reason.split()[1] for reason in reasons] == ["c", "side"]
    # As it is when admission is there: what the image runs need not be known to try it.
    trial = move.trial(asked)
    made = jsonpatch.apply(trial, mutate(trial, image="agent").patch)
    assert move.not_waiting(made, ["c", "side"]) == []
    assert move.not_waiting(made, ["c", "d"])[0].startswith("container d would start from the")
    assert asked["metadata"]["annotations"].keys() == {optin.CONTAINERS, optin.RESTORE}


def test_why_admission_lets_a_container_start_is_told() -> None:
    asked = move.replacement(
        pod(containers=[{"name": "c", "command": ["run"], "tty": True}]),
        image="job@x",
        members=["c"],
        node="n2",
    )
    made = jsonpatch.apply(asked, mutate(asked, image="agent").patch)
    (reason,) = move.not_waiting(made, ["c"])
    assert "admission says: c: it has a terminal" in reason


def test_a_trial_has_another_name_of_a_length_that_is_allowed() -> None:
    assert move.trial_name("job") == "job-ckpt-trial"
    assert len(move.trial_name("j" * 253)) == 253


@pytest.mark.parametrize("step", list(move.Step))
def test_after_the_commit_every_failure_names_the_image_what_is_left_and_a_command(
    step: move.Step,
) -> None:
    plan = move.Move("ns", "job", "n1", "n2")
    told = move.incomplete(step, plan, "job@x", "because")
    assert told.message.endswith(": because")
    assert told.left[0].startswith("image job@x is committed")
    assert "pod ns/job" in told.left[1]
    assert all(each.startswith("ckpt-agent restore job@x -n ns --") for each in told.next)
    exists = step in (move.Step.DUMP, move.Step.DELETE)
    assert ("--replace" in told.next[0]) == exists


def test_a_pod_that_was_never_opted_in_is_not_said_to_wait() -> None:
    plan = move.Move("ns", "job", "n1", "n2", waits=False)
    told = move.incomplete(move.Step.DELETE, plan, "job@x", "because")
    assert told.left[1].endswith("still exists and is frozen")
    assert all(" --replace" in each for each in told.next)
    assert [each.split()[6] for each in told.next] == ["n2", "n1"]


def test_a_pod_that_was_nowhere_is_not_sent_back() -> None:
    told = move.incomplete(move.Step.RESTORE, move.Move("ns", "job", "", "n2"), "job@x", "y")
    assert told.next == ("ckpt-agent restore job@x -n ns --pod job",)
