"""Restores and moves of a JobSet through the command line: real HTTP, TLS and gRPC, the real
admission, a JobSet controller of a few lines; only what the agents do to processes is left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from agent import errors
from agent.admission import mutate
from agent.cli import exits
from agent.coordinator import checkpoint, jobsetchecks, jobsetcourse, jobsets, restore
from agent.coordinator.machine import State
from agent.model import intent as model_intent
from agent.model import jobset, optin
from agent.model import jobsetrestore as model_jobsetrestore
from agent.model.intent import Intent
from agent.rpc import results
from agent.rpc.v1 import node_pb2
from tests import jsonpatch
from tests.unit import test_cli_pods
from tests.unit.test_cli_pods import World
from tests.unit.test_jobset_restore import train

authority, world, run = test_cli_pods.authority, test_cli_pods.world, test_cli_pods.run

NAME = ("default", "train")
OWNER = {"kind": "Job", "name": "train-worker-0", "controller": True}
MEMBERS = ("worker-0-0.trainer", "worker-0-1.trainer")
Json = dict[str, Any]


class Controller:
    """What JobSet, Jobs, scheduler and kubelets do, in an instant."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.api = world, world.api
        self.webhook = True
        # By the pods' identity, those that never get a node.
        self.no_room: set[str] = set()
        self.restored: list[tuple[str, list[checkpoint.Member], dict[str, str]]] = []
        self.fails: list[errors.CkptError] = []
        self._made = 0
        self.api.admit = self._admit
        self.api.on_jobset = self._changed
        monkeypatch.setattr(restore, "run", self._restore)
        monkeypatch.setattr(jobsetcourse, "_LOOK_S", 0.01)
        monkeypatch.setenv("CKPT_AGENT_SCHEDULE_DEADLINE", "0.3")

    def add(self, **spec: Any) -> Json:
        """A JobSet and its pods."""
        found: Json = train(**spec)
        found["metadata"]["namespace"] = "default"
        self.api.jobsets[NAME] = found
        self._changed(found)
        return found

    def found(self) -> Json:
        return self.api.jobsets[NAME]

    def intent(self) -> Intent | None:
        text = (self.found()["metadata"].get("annotations") or {}).get(optin.RESTORE)
        return None if text is None else model_intent.read(text)

    def pods(self) -> dict[str, Json]:
        return {
            jobset.identity(each): each
            for each in list(self.api.pods.values())
            if each["metadata"].get("ownerReferences")
        }

    def _admit(self, namespace: str, pod: Json) -> Json:
        """The webhook, if it answers."""
        if not self.webhook:
            return pod
        there = (namespace, pod["metadata"].get("labels", {}).get(jobset.NAME_LABEL))
        found = self.api.jobsets.get(there) if there[1] else None
        text = ((found or {"metadata": {}})["metadata"].get("annotations") or {}).get(optin.RESTORE)
        wanted = model_intent.read(text) if text else None
        wanted = wanted if wanted and wanted.means(pod) else None
        made: Json = jsonpatch.apply(pod, mutate.mutate(pod, image="i", intent=wanted).patch)
        return made

    def _changed(self, found: Json) -> None:
        if found["spec"].get("suspend"):
            found["status"] = {"conditions": [{"type": "Suspended", "status": "True"}]}
            for each in self.pods().values():
                del self.api.pods["default", each["metadata"]["name"]]
        elif not self.pods():
            found["status"] = {}
            for index in range(2):
                self.make(found, index)

    def make(self, found: Json, index: int) -> None:
        self._made += 1
        (job,) = found["spec"]["replicatedJobs"]
        pod = copy.deepcopy(model_jobsetrestore.trial(found, job, "train"))
        metadata = pod["metadata"]
        metadata["name"] = f"train-worker-0-{index}-{self._made}"
        metadata |= {"uid": f"uid-{self._made}", "namespace": "default"}
        metadata["ownerReferences"] = [OWNER]
        metadata["annotations"]["batch.kubernetes.io/job-completion-index"] = str(index)
        metadata["labels"]["batch.kubernetes.io/job-completion-index"] = str(index)
        pod = self._admit("default", pod)
        identity = jobset.identity(pod)
        if identity in self.no_room:
            pod["status"] = {"phase": "Pending"}
        else:
            wanted = self.intent()
            node = (wanted.nodes.get(identity) if wanted else None) or f"n{index + 1}"
            pod["spec"]["nodeName"] = node
            pod["status"] = {"phase": "Running", "podIPs": [{"ip": f"10.0.{self._made}.1"}]}
        self.api.pods["default", metadata["name"]] = pod

    def _restore(
        self,
        session: Any,
        group: str,
        epoch: str,
        members: Sequence[checkpoint.Member],
        moved: Mapping[str, str],
        **_: Any,
    ) -> restore.Restored:
        self.restored.append((f"{group}@{epoch}", list(members), dict(moved)))
        if self.fails:
            raise self.fails.pop(0)
        return restore.Restored(tuple(members), {}, 0.5, {State.STANDING: 0.5})

    def add_image(self, number: int) -> str:
        """An image of the JobSet as ``add`` makes it."""
        agents = self.world.agents
        name = agents.add_image("jobset.train", number)
        del agents.images[-1].members[:]
        agents.images[-1].members.extend(MEMBERS)
        agents.details[name] = {
            "pods": [
                node_pb2.PodOfImage(
                    member=f"worker-0-{index}",
                    was=node_pb2.Placement(node=f"n{index + 1}", addresses=[f"10.9.9.{index}"]),
                )
                for index in range(2)
            ],
            "jobset_json": json.dumps(jobset.template(train())),
        }
        return name


@pytest.fixture
def controller(world: World, monkeypatch: pytest.MonkeyPatch) -> Controller:
    return Controller(world, monkeypatch)


def error(ran: Any) -> Json:
    found: Json = json.loads(ran.err[ran.err.index("{") :])
    return found


def test_a_suspended_jobset_comes_back_on_the_named_nodes(run: Any, controller: Controller) -> None:
    controller.add(suspend=True)
    image = controller.add_image(1)
    ran = run("restore", "jobset/train", "--node", "n2", "--node", "n1", "-o", "json")
    document = ran.document()
    assert document["name"] == image
    assert [each["now"]["node"] for each in document["pods"]] == ["n2", "n1"]
    ((name, members, moved),) = controller.restored
    assert name == image
    assert [(each.name, each.node) for each in members] == [
        ("worker-0-0", "n2"),
        ("worker-0-1", "n1"),
    ]
    assert moved == {"10.9.9.0": "10.0.1.1", "10.9.9.1": "10.0.2.1"}
    assert controller.intent() is None
    assert not controller.found()["spec"]["suspend"]
    assert run("restore", "jobset/train", "--replace").out.splitlines()[0].split() == [
        *("POD", "FROM", "TO", "NOW"),
    ]


def test_a_jobset_that_runs_is_only_ended_if_asked_to(run: Any, controller: Controller) -> None:
    controller.add()
    controller.add_image(1)
    before = controller.pods()
    refused = run("restore", "jobset/train", "-o", "json")
    assert (refused.status, error(refused)["code"]) == (exits.REFUSED, "restore-conflict")
    assert controller.pods() == before
    assert run("restore", "jobset/train", "--replace").status == 0
    assert controller.pods() != before


def test_a_jobset_that_is_gone_is_created_as_the_image_has_it(
    run: Any, controller: Controller
) -> None:
    controller.add_image(1)
    document = run("restore", "jobset/train", "-o", "json").document()
    assert document["created"]
    assert controller.found()["spec"] == {**train()["spec"], "suspend": False}
    assert controller.intent() is None


@pytest.mark.parametrize("there", [True, False])
def test_without_a_webhook_nothing_is_touched(
    run: Any, controller: Controller, there: bool
) -> None:
    if there:
        controller.add()
    controller.add_image(1)
    before = controller.pods()
    controller.webhook = False
    refused = run("restore", "jobset/train", "--replace", "-o", "json")
    assert refused.status == exits.REFUSED
    assert "admission webhook" in error(refused)["message"]
    assert controller.pods() == before
    if there:
        assert controller.intent() is None
    else:
        assert not controller.api.jobsets


def test_a_webhook_that_stops_answering_never_lets_the_job_start_over(
    run: Any, controller: Controller
) -> None:
    controller.add(suspend=True)
    image = controller.add_image(1)
    changed = controller.api.on_jobset

    def resumed(found: Json) -> None:
        controller.webhook = bool(found["spec"].get("suspend"))
        changed(found)

    controller.api.on_jobset = resumed
    ran = run("restore", "jobset/train", "-o", "json")
    assert ran.status == exits.MOVE_INCOMPLETE
    assert "does not wait" in error(ran)["message"]
    assert controller.found()["spec"]["suspend"]
    assert controller.pods() == {}
    assert controller.intent() == Intent(image, "default")
    assert controller.restored == []


def test_a_pod_without_room_leaves_the_jobset_suspended_with_the_command_that_goes_on(
    run: Any, controller: Controller
) -> None:
    controller.add(suspend=True)
    image = controller.add_image(1)
    controller.no_room = {"worker-0-1"}
    ran = run("restore", "jobset/train", "--node", "n1", "-o", "json")
    assert ran.status == exits.MOVE_INCOMPLETE
    facts = error(ran)["facts"]
    epoch = image.partition("@")[2]
    assert facts["next"] == [f"ckpt-agent restore jobset/train@{epoch} -n default --node n1"]
    assert "pod train-worker-0-1-2 has no node" in facts["reasons"][0]
    assert controller.found()["spec"]["suspend"]
    controller.no_room = set()
    assert run(*facts["next"][0].split()[1:]).status == 0


def test_a_damaged_image_is_passed_over_unless_it_was_named(
    run: Any, controller: Controller
) -> None:
    controller.add(suspend=True)
    oldest, older, newest = (controller.add_image(number) for number in (1, 2, 3))
    failed = errors.RestoreFailed("CRIU failed")
    controller.fails = [errors.Corrupt("a pack is damaged"), failed, failed]
    ran = run("restore", "jobset/train", "-o", "json")
    document = ran.document()
    assert document["name"] == oldest
    assert document["passedOver"] == [
        {"name": newest, "problem": "a pack is damaged"},
        {"name": older, "problem": "CRIU failed"},
    ]
    assert [name for name, _, _ in controller.restored] == [newest, older, older, oldest]
    # Each try has placeholders of its own.
    uids = [each.uid for _, members, _ in controller.restored for each in members]
    assert len(set(uids)) == 8
    controller.fails = [errors.Corrupt("a pack is damaged")]
    named = f"jobset/train@{newest.partition('@')[2]}"
    ran = run("restore", named, "--replace", "-o", "json")
    assert ran.status == exits.MOVE_INCOMPLETE
    assert controller.found()["spec"]["suspend"]


def test_what_passes_is_tried_once_more_with_the_same_image(
    run: Any, controller: Controller
) -> None:
    controller.add(suspend=True)
    controller.add_image(1)
    image = controller.add_image(2)
    gone = errors.Unreachable("the agent was replaced")
    half = errors.RestoreFailed("not all of it runs", committed=True)
    for failure in (gone, half):
        controller.fails = [failure]
        document = run("restore", "jobset/train", "--replace", "-o", "json").document()
        assert (document["name"], document["passedOver"]) == (image, [])
    controller.fails = [gone, gone]
    ran = run("restore", "jobset/train", "--replace", "-o", "json")
    assert ran.status == exits.MOVE_INCOMPLETE
    assert controller.found()["spec"]["suspend"]


@pytest.mark.parametrize(
    ("denied", "named"),
    [
        (("patch", "jobsets"), "patch jobsets.jobset.x-k8s.io in namespace default"),
        (("restore", "images"), "restore images.ckpt-agent.dev in namespace default"),
        (("create", "pods"), "create pods in namespace default"),
    ],
)
def test_who_lacks_a_right_is_told_before_anything_is_touched(
    run: Any, controller: Controller, denied: tuple[str, str], named: str
) -> None:
    controller.add(suspend=True)
    controller.add_image(1)
    controller.api.denied.add(denied)
    ran = run("restore", "jobset/train", "-o", "json")
    assert ran.status == exits.REFUSED
    assert f"not allowed: {named}" in error(ran)["facts"]["reasons"]
    assert controller.intent() is None
    assert not any(method in ("PATCH", "DELETE") for method, _ in controller.api.requests)


def test_what_stands_against_it_is_told_whole_before_anything_is_touched(
    run: Any, controller: Controller
) -> None:
    found = controller.add(suspend=True)
    controller.add_image(1)
    found["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "q"}
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] = 3
    ran = run("restore", "jobset/train", "-o", "json")
    assert ran.status == exits.REFUSED
    assert [each[:24] for each in error(ran)["facts"]["reasons"]] == [
        "Kueue admits it, and alo",
        "the image has no pod wor",
    ]
    assert not any(method == "PATCH" for method, _ in controller.api.requests)
    missing = run("restore", "jobset/other", "-o", "json")
    assert (missing.status, error(missing)["code"]) == (exits.REFUSED, "not-found")


def test_an_intent_that_cannot_be_removed_is_told_and_the_jobset_runs_on(
    run: Any, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.add(suspend=True)
    controller.add_image(1)
    done = controller._restore

    def then_forbidden(*arguments: Any, **more: Any) -> restore.Restored:
        controller.api.denied.add(("PATCH", "jobsets"))
        return done(*arguments, **more)

    monkeypatch.setattr(restore, "run", then_forbidden)
    ran = run("restore", "jobset/train", "-o", "json")
    assert ran.status == exits.MOVE_INCOMPLETE
    assert "annotate jobset train ckpt-agent.dev/restore-" in error(ran)["hint"]
    assert not controller.found()["spec"]["suspend"]
    assert len(controller.pods()) == 2


def test_a_move_is_looked_at_whole_before_the_dump(
    run: Any, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.add()
    before = controller.pods()
    dumped: list[bool] = []

    def dump(*_: Any, stop: bool, **__: Any) -> checkpoint.Checkpoint:
        dumped.append(stop)
        # What admission was asked to look at is off the JobSet again.
        assert controller.intent() is None
        name = controller.add_image(7)
        (image,) = (each for each in controller.world.agents.images if each.name == name)
        members = tuple(
            checkpoint.Member(each, pod["metadata"]["name"], pod["metadata"]["uid"], "n1")
            for each, pod in sorted(before.items())
        )
        return checkpoint.Checkpoint(results.image(image), members, (), 0.3, 1.0, 1, (), {})

    monkeypatch.setattr(jobsets, "dump", dump)
    there = run("migrate", "jobset/train", "--to", "n1", "--to", "n2", "-o", "json")
    assert error(there)["code"] == "invalid-input"
    controller.webhook = False
    refused = run("migrate", "jobset/train", "--to", "n2", "-o", "json")
    assert (refused.status, dumped, controller.intent()) == (exits.REFUSED, [], None)
    controller.webhook = True
    controller.api.nodes["n2"]["spec"]["unschedulable"] = True
    refused = run("migrate", "jobset/train", "--to", "n2", "-o", "json")
    assert "cordoned" in error(refused)["facts"]["reasons"][0]
    assert (dumped, controller.pods()) == ([], before)
    del controller.api.nodes["n2"]["spec"]["unschedulable"]
    document = run("migrate", "jobset/train", "--to", "n2", "-o", "json").document()
    assert dumped == [True]
    assert {each["now"]["node"] for each in document["pods"]} == {"n2"}
    assert sorted(document["stepSeconds"]) == ["dump", "restore", "start", "suspend"]


def test_a_pod_that_jobset_makes_anew_while_admission_is_asked_does_not_wait(
    run: Any, controller: Controller
) -> None:
    """A restart by JobSet's own policy, in the moment when the intent is tried."""
    controller.add()
    controller.add_image(1)
    admitted = controller.api.admit

    def restarting(namespace: str, pod: Json) -> Json:
        controller.api.admit = admitted
        controller.make(controller.found(), 0)
        return pod

    controller.api.admit = restarting
    assert run("restore", "jobset/train", "--replace").status == exits.REFUSED
    its = [pod for (_, name), pod in controller.api.pods.items() if name.startswith("train-")]
    assert len(its) == 3
    assert not any(optin.RESTORE in each["metadata"]["annotations"] for each in its)


@pytest.mark.parametrize(
    "failure", [errors.Unreachable("no agent answers"), errors.Interrupted("interrupted")]
)
def test_what_fails_before_the_first_change_leaves_a_jobset_running(
    run: Any, controller: Controller, monkeypatch: pytest.MonkeyPatch, failure: errors.CkptError
) -> None:
    controller.add()
    controller.add_image(1)
    before = controller.pods()
    tried = jobsetchecks.try_pods

    def then_failing(*arguments: Any) -> None:
        def fails(*_: Any) -> None:
            raise failure

        tried(*arguments)
        monkeypatch.setattr(jobsetchecks, "detail_of", fails)

    monkeypatch.setattr(jobsetchecks, "try_pods", then_failing)
    ran = run("restore", "jobset/train", "--replace", "-o", "json")
    assert (ran.status, error(ran)["code"]) == (failure.exit_status, failure.code)
    assert not controller.found()["spec"].get("suspend")
    assert (controller.pods(), controller.intent()) == (before, None)


def test_a_pod_that_is_made_anew_before_the_intent_goes_is_found_and_nothing_starts_over(
    run: Any, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.add(suspend=True)
    image = controller.add_image(1)
    done = controller._restore

    def then_restarted(*arguments: Any, **more: Any) -> restore.Restored:
        ran = done(*arguments, **more)
        gone = controller.pods()["worker-0-0"]["metadata"]["name"]
        del controller.api.pods["default", gone]
        controller.make(controller.found(), 0)
        return ran

    monkeypatch.setattr(restore, "run", then_restarted)
    ran = run("restore", "jobset/train", "-o", "json")
    assert ran.status == exits.MOVE_INCOMPLETE
    assert "pod train-worker-0-0-3 waits" in error(ran)["message"]
    assert controller.found()["spec"]["suspend"]
    assert controller.intent() == Intent(image, "default")
    monkeypatch.setattr(restore, "run", done)
    assert run(*error(ran)["facts"]["next"][0].split()[1:]).status == 0


def test_a_strangers_pod_with_the_jobsets_labels_is_none_of_its(
    run: Any, controller: Controller
) -> None:
    controller.add(suspend=True)
    controller.add_image(1)
    pod = copy.deepcopy(
        model_jobsetrestore.trial(
            controller.found(), controller.found()["spec"]["replicatedJobs"][0], "train"
        )
    )
    owner = OWNER | {"name": "mine"}
    pod["metadata"] |= {"name": "forged", "uid": "forged", "ownerReferences": [owner]}
    pod["spec"]["nodeName"], pod["status"] = "n1", {"phase": "Running"}
    controller.api.pods["default", "forged"] = pod
    assert run("restore", "jobset/train").status == 0
    ((_, members, _),) = controller.restored
    assert [each.uid for each in members] == ["uid-1", "uid-2"]
