"""Which pods a label selector makes one group of, and which it comes back into."""

from __future__ import annotations

from typing import Any

import pytest

from agent import errors
from agent.model import jobset, optin, selection

Json = dict[str, Any]
IMAGE = "solver@20260131-235959-0a1b2c"
REPLICATED = "jobset.sigs.k8s.io/replicatedjob-name"
INDEX = "jobset.sigs.k8s.io/job-index"


def pod(name: str, *, phase: str = "Running", **metadata: Any) -> Json:
    """A pod that could take part."""
    return {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "labels": {optin.LABEL: optin.ENABLED, "app": "solver"},
        }
        | metadata,
        "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
        "status": {"phase": phase, "podIPs": [{"ip": "10.0.0.1"}]},
    }


def of_a_jobset(name: str, jobset_name: str = "train", *, controller: bool = True) -> Json:
    labels = {
        optin.LABEL: optin.ENABLED,
        jobset.NAME_LABEL: jobset_name,
        REPLICATED: "worker",
        INDEX: "0",
    }
    owner = {"kind": "Job", "name": f"{jobset_name}-worker-0", "controller": controller}
    return pod(name, labels=labels, ownerReferences=[owner])


def reasons(*pods: Json, of_jobsets: dict[str, list[Json]] | None = None) -> list[str]:
    with pytest.raises(errors.TargetUnsuitable) as caught:
        selection.membership("app=solver", pods, of_jobsets or {})
    found = caught.value.facts["reasons"]
    assert isinstance(found, list)
    return found


def test_every_pod_that_matches_is_a_member_by_its_name() -> None:
    found = selection.membership("app=solver", [pod("b"), pod("a")], {})
    assert [(each.identity, each.pod, each.uid, each.node) for each in found] == [
        ("a", "a", "uid-a", "n1"),
        ("b", "b", "uid-b", "n1"),
    ]


def test_pods_that_have_failed_are_nobodys_members_any_more() -> None:
    found = selection.membership("app=solver", [pod("a"), pod("b", phase="Failed")], {})
    assert [each.pod for each in found] == ["a"]
    with pytest.raises(errors.NotFound, match="app=solver"):
        selection.membership("app=solver", [pod("b", phase="Failed")], {})
    with pytest.raises(errors.NotFound):
        selection.membership("app=solver", [], {})


def test_what_stands_in_the_way_is_told_of_every_pod() -> None:
    assert reasons(
        pod("good"),
        pod("pending", phase="Pending"),
        pod("done", phase="Succeeded"),
        pod("going", deletionTimestamp="2026-01-01T00:00:00Z"),
        pod("ordinary", labels={"app": "solver"}),
        pod("x" * 62),
    ) == [
        "pod pending does not run (Pending)",
        "pod done has finished",
        "pod going is being deleted",
        "pod ordinary is not opted in (label ckpt-agent.dev/checkpoint=enabled)",
        f"pod {'x' * 62} cannot be a member: member name '{'x' * 62}.c' is not valid",
    ]


def test_a_jobset_is_taken_whole_or_not_at_all() -> None:
    inside, outside = of_a_jobset("train-0"), of_a_jobset("train-1")
    failed = of_a_jobset("train-old") | {"status": {"phase": "Failed"}}
    assert selection.owned([inside, pod("a")]) == ("train",)
    assert reasons(inside, pod("a"), of_jobsets={"train": [inside, outside]}) == [
        "JobSet train would be cut in two: its pod train-1 is not among them"
    ]
    both = [inside, outside, pod("a")]
    found = selection.membership("x", both, {"train": [inside, outside, failed]})
    assert [each.pod for each in found] == ["a", "train-0", "train-1"]


def test_a_label_alone_makes_no_pod_a_jobsets() -> None:
    assert selection.owned([of_a_jobset("fake", controller=False)]) == ()


def test_a_group_is_never_called_like_a_jobsets() -> None:
    assert selection.group("solver") == "solver"
    with pytest.raises(errors.InvalidInput) as caught:
        selection.group("jobset.train")
    assert "jobset/train" in str(caught.value.hint)
    with pytest.raises(errors.InvalidInput):
        selection.group("a/b")


def test_pods_are_ready_when_all_of_them_have_an_address() -> None:
    waiting = pod("a", annotations={optin.RESTORE: IMAGE})
    by_group = pod("b", annotations={optin.RESTORE: "solver"})
    stopped = pod("c")  # says nothing of an image: it may wait where it was stopped
    found = selection.gathered([waiting, by_group, stopped, pod("other")], ["a", "b", "c"], IMAGE)
    assert (list(found.ready), found.unfit, found.starting) == (["a", "b", "c"], (), ())


def test_a_pod_that_cannot_be_filled_is_told_apart_from_one_that_starts() -> None:
    homeless, starting = pod("homeless"), pod("starting", phase="Pending")
    del homeless["spec"]["nodeName"]
    found = selection.gathered(
        [
            homeless,
            starting,
            pod("ended", phase="Failed"),
            pod("going", deletionTimestamp="2026-01-01T00:00:00Z"),
            pod("elsewhere", annotations={optin.RESTORE: "solver@20250131-235959-0a1b2c"}),
        ],
        ["homeless", "starting", "ended", "going", "elsewhere", "gone"],
        IMAGE,
    )
    assert found.ready == {}
    assert found.unfit == (
        "pod ended has ended (Failed)",
        "pod going is being deleted",
        "pod elsewhere waits for another image (solver@20250131-235959-0a1b2c)",
        "there is no pod gone",
    )
    assert found.starting == (
        "pod homeless has no node: the scheduler has not looked at it",
        "pod starting does not run yet",
    )
