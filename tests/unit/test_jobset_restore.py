"""What bringing a JobSet back takes, without a cluster: intents, places, objections, gathering."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent import errors
from agent.model import intent, jobset, jobsetrestore, optin
from agent.model.container import HOLD
from agent.model.intent import Intent
from agent.model.jobsetrestore import Plan, Step
from agent.model.pods import Placement

Json = dict[str, Any]

IMAGE = "jobset.train@20260131-235959-0a1b2c"
MEMBERS = ("worker-0-0.trainer", "worker-0-1.trainer")


def train(**spec: Any) -> Json:
    """A JobSet of two pods."""
    template = {
        "metadata": {"labels": {optin.LABEL: optin.ENABLED}},
        "spec": {"containers": [{"name": "trainer", "image": "i", "command": ["work"]}]},
    }
    job = {"spec": {"completions": 2, "parallelism": 2, "template": template}}
    return {
        "metadata": {"name": "train", "namespace": "team", "uid": "u1"},
        "spec": {"replicatedJobs": [{"name": "worker", "replicas": 1, "template": job}], **spec},
    }


def rank(completion: int, *, node: str = "n1", ip: str = "10.0.0.1", **status: Any) -> Json:
    """A pod that waits."""
    return {
        "metadata": {
            "name": f"train-worker-0-{completion}-abcde",
            "labels": {
                "jobset.sigs.k8s.io/replicatedjob-name": "worker",
                "jobset.sigs.k8s.io/job-index": "0",
            },
            "annotations": {
                "batch.kubernetes.io/job-completion-index": str(completion),
                optin.RESTORE: IMAGE,
            },
        },
        "spec": {
            "nodeName": node,
            "containers": [{"name": "trainer", "command": [HOLD, "auto", "work"]}],
        },
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]} | status,
    }


# Intents.


def test_an_intent_reads_as_it_was_written() -> None:
    for each in (
        Intent(IMAGE),
        Intent(IMAGE, "fast", {"worker-0-0": "n2", "worker-0-1": "n1"}),
        Intent(IMAGE, only="train-ckpt-trial"),
    ):
        assert intent.read(each.text()) == each


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        json.dumps({"image": 7}),
        json.dumps({"image": "jobset.train"}),
        json.dumps({"image": "jobset.train@new"}),
        json.dumps({"image": "../x@20260131-235959-0a1b2c"}),
        json.dumps({"image": IMAGE, "nodes": ["n1"]}),
        json.dumps({"image": IMAGE, "nodes": {"worker-0-0": 1}}),
        json.dumps({"image": IMAGE, "nodes": {"worker-0-0": ""}}),
        json.dumps({"image": IMAGE, "storage": None}),
        json.dumps({"image": IMAGE, "only": 1}),
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_intent_is_told(text: str) -> None:
    with pytest.raises(errors.InvalidInput):
        intent.read(text)


def test_more_nodes_than_an_annotation_holds_are_refused() -> None:
    nodes = {f"worker-0-{index}": f"node-with-a-long-name-{index}" for index in range(10_000)}
    with pytest.raises(errors.InvalidInput, match="10000 pods"):
        Intent(IMAGE, nodes=nodes).text()


def test_an_intent_means_what_the_jobsets_jobs_make_or_the_one_pod_that_is_tried() -> None:
    labels = {jobset.NAME_LABEL: "train", **rank(0)["metadata"]["labels"]}
    owner = {"kind": "Job", "name": "train-worker-0", "controller": True}
    pod = {"metadata": {"labels": labels, "ownerReferences": [owner]}}
    assert Intent(IMAGE).means(pod)
    for stranger in (
        {},
        owner | {"controller": False},
        owner | {"name": "x"},
        {**owner, "kind": "J"},
    ):
        assert not Intent(IMAGE).means(
            {"metadata": {"labels": labels, "ownerReferences": [stranger]}}
        )
    tried = {"metadata": {"labels": labels, "name": "train-ckpt-trial"}}
    assert not Intent(IMAGE).means(tried)
    assert Intent(IMAGE, only="train-ckpt-trial").means(tried)
    assert not Intent(IMAGE, only="train-ckpt-trial").means(pod)


# Places and addresses.


def test_pods_of_one_node_stay_together_and_nodes_are_taken_in_turn() -> None:
    sources = {"a-0-0": "s1", "a-0-1": "s2", "a-0-2": "s1", "a-0-3": "s3"}
    assert jobsetrestore.placed(sources, []) == {}
    assert jobsetrestore.placed(sources, ["x"]) == dict.fromkeys(sources, "x")
    placed = jobsetrestore.placed(sources, ["x", "y"])
    assert placed == {"a-0-0": "x", "a-0-1": "y", "a-0-2": "x", "a-0-3": "x"}


def test_each_address_is_replaced_by_the_new_one_of_its_family() -> None:
    before = {
        "a": Placement("p", "u", "n1", ("10.0.0.1", "fd00::1")),
        "b": Placement("q", "v", "n2", ("10.0.0.2", "192.168.7.7")),
        "c": Placement("r", "w", "n2", ("10.0.0.3",)),
    }
    now = {"a": ["10.1.0.1", "fd01::1"], "b": ["10.1.0.2"], "c": ["10.0.0.3"]}
    assert jobsetrestore.moved(before, now) == {
        "10.0.0.1": "10.1.0.1",
        "fd00::1": "fd01::1",
        "10.0.0.2": "10.1.0.2",
        "10.0.0.3": "10.0.0.3",
    }


# What stands against it.


def test_a_jobset_that_runs_alone_and_opted_in_can_be_brought_back() -> None:
    assert jobsetrestore.objections(train()) == []
    assert jobsetrestore.mismatches(train(), MEMBERS) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "q"}}}, "Kueue admits it"),
        ({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, "is being deleted"),
        (
            {"metadata": {"ownerReferences": [{"kind": "TrainJob", "name": "t", "controller": 1}]}},
            "TrainJob t controls it",
        ),
        ({"spec": {"managedBy": "kueue.x-k8s.io/multikueue"}}, "multikueue manages it"),
        (
            {"status": {"conditions": [{"type": "Completed", "status": "True"}]}},
            "it has completed, and nothing of it runs again: kubectl delete jobset train",
        ),
    ],
)
def test_a_jobset_of_somebody_else_or_one_that_ended_is_not(change: Json, reason: str) -> None:
    found = train()
    for key, value in change.items():
        found[key] = found.get(key, {}) | value
    (objection,) = jobsetrestore.objections(found)
    assert reason in objection


def test_pods_that_are_not_opted_in_or_wait_for_each_others_probes_speak_against_it() -> None:
    found = train(startupPolicy={"startupPolicyOrder": "InOrder"})
    assert jobsetrestore.objections(found) == []
    (job,) = found["spec"]["replicatedJobs"]
    template = job["template"]["spec"]["template"]
    template["spec"]["containers"][0]["readinessProbe"] = {"exec": {"command": ["true"]}}
    del template["metadata"]["labels"]
    assert [each[:30] for each in jobsetrestore.objections(found)] == [
        "the pods of worker are not opt",
        "its jobs start one after the o",
    ]


def test_a_jobset_of_other_pods_than_the_image_has_is_told_by_each() -> None:
    found = train()
    (job,) = found["spec"]["replicatedJobs"]
    job["template"]["spec"] |= {"completions": 1, "parallelism": 1}
    assert jobsetrestore.mismatches(found, MEMBERS) == ["the JobSet makes no pod worker-0-1"]
    job["replicas"] = 2
    job["template"]["spec"]["template"]["spec"]["containers"][0]["name"] = "other"
    assert jobsetrestore.mismatches(found, MEMBERS) == [
        "the image has no pod worker-1-0",
        "the JobSet makes no pod worker-0-1",
        "the pods of worker have no container trainer",
    ]


def test_pods_that_ended_well_are_told_since_nobody_makes_them_again() -> None:
    ended = rank(0, phase="Succeeded")
    assert jobsetrestore.finished([ended, rank(1)]) == [
        "pod train-worker-0-0-abcde has finished, and JobSet would not make it again"
    ]


def test_a_jobset_rests_when_jobset_has_seen_it_and_no_pod_is_left() -> None:
    found = train(suspend=True)
    assert not jobsetrestore.suspended(found, [])
    found["status"] = {"conditions": [{"type": "Suspended", "status": "True"}]}
    assert jobsetrestore.suspended(found, [rank(0, phase="Failed")])
    assert not jobsetrestore.suspended(found, [rank(0)])
    assert not jobsetrestore.running(found, [])
    assert jobsetrestore.running(found, [rank(0)])
    assert jobsetrestore.running(train(), [])


# The pods that come.


def test_pods_are_gathered_when_each_of_them_waits_and_has_an_address() -> None:
    wanted = Intent(IMAGE)
    seen = jobsetrestore.gathered([rank(0), rank(1)], wanted, MEMBERS)
    assert seen.complete
    assert list(seen.waiting) == ["worker-0-0", "worker-0-1"]
    # Those that go, and those of an attempt before, are not counted.
    going = rank(1)
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    failed = rank(1, phase="Failed")
    assert jobsetrestore.gathered([rank(0), rank(1), going, failed], wanted, MEMBERS).complete


def test_a_pod_that_is_not_there_or_does_not_run_is_awaited_with_the_reason() -> None:
    homeless = rank(
        1,
        node="",
        phase="Pending",
        conditions=[{"type": "PodScheduled", "status": "False", "message": "Insufficient cpu"}],
    )
    seen = jobsetrestore.gathered([homeless], Intent(IMAGE), MEMBERS)
    assert not seen.complete
    assert seen.homeless == (
        "pod train-worker-0-1-abcde has no node: Insufficient cpu",
        "pod worker-0-0 is not there",
    )
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff"}}}
    starting = rank(1, phase="Pending", initContainerStatuses=[waiting])
    seen = jobsetrestore.gathered([rank(0), starting], Intent(IMAGE), MEMBERS)
    assert seen.starting == ("pod train-worker-0-1-abcde does not run yet: ImagePullBackOff",)
    assert not jobsetrestore.gathered([rank(0), rank(0), rank(1)], Intent(IMAGE), MEMBERS).complete


def test_a_pod_that_starts_over_is_found_at_once() -> None:
    ordinary = rank(1)
    del ordinary["metadata"]["annotations"][optin.RESTORE]
    other = rank(1)
    other["metadata"]["annotations"][optin.RESTORE] = IMAGE.replace("a1b2c", "a1b2d")
    unheld = rank(1)
    unheld["spec"]["containers"][0]["command"] = ["work"]
    stranger = rank(7)
    for cold in (ordinary, other, unheld, stranger):
        seen = jobsetrestore.gathered([rank(0), cold], Intent(IMAGE), MEMBERS)
        assert len(seen.cold) == 1, cold
        assert not seen.complete


def test_the_pod_that_is_tried_has_the_marks_of_the_first_one() -> None:
    found = train()
    (job,) = found["spec"]["replicatedJobs"]
    tried = jobsetrestore.trial(found, job, "train")
    assert jobset.identity(tried) == "worker-0-0"
    assert tried["metadata"]["labels"][jobset.NAME_LABEL] == "train"
    assert tried["metadata"]["labels"][optin.LABEL] == optin.ENABLED
    assert tried["spec"] == job["template"]["spec"]["template"]["spec"]


# The JobSet in an image, and what is told at the end.


def test_what_an_image_keeps_of_a_jobset_makes_another_like_it() -> None:
    found = train(suspend=False)
    found["metadata"] |= {
        "resourceVersion": "7",
        "managedFields": [],
        "ownerReferences": [{"kind": "TrainJob"}],
        "labels": {"team": "a"},
        "annotations": {optin.RESTORE: "{}", "note": "x"},
    }
    found["status"] = {"restarts": 1}
    kept = jobset.template(found)
    assert kept["metadata"] == {
        "name": "train",
        "labels": {"team": "a"},
        "annotations": {"note": "x"},
    }
    assert kept["spec"] == found["spec"]
    assert set(kept) == {"apiVersion", "kind", "metadata", "spec"}


def test_what_failed_says_what_stands_where_and_which_command_goes_on() -> None:
    plan = Plan("team", "train", ("n2", "n1"), "fast")
    told = jobsetrestore.incomplete(Step.START, plan, IMAGE, "no room", rests=True)
    assert told.message == "not all pods of the JobSet came to wait for the image: no room"
    command = (
        "ckpt-agent restore jobset/train@20260131-235959-0a1b2c -n team --storage fast"
        " --node n2 --node n1"
    )
    assert told.next == (command,)
    assert "is suspended" in told.left[1]
    told = jobsetrestore.incomplete(Step.RESTORE, plan, IMAGE, "why", rests=False)
    assert told.next == (f"{command} --replace",)
