"""Checkpoints and restores of the pods that a selector means, through the command line: real HTTP,
TLS and gRPC; only what the agents do to processes is left out.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from agent import errors, settings, wiring
from agent.cli import exits
from agent.coordinator import checkpoint, followed, restore, selected
from agent.coordinator.machine import State
from agent.model import optin
from agent.model.protocol import EVACUATE, LEAVE_RUNNING, Course
from agent.rpc import epochclient, results
from agent.rpc.v1 import node_pb2
from tests.unit import test_cli_pods
from tests.unit.test_cli_pods import World
from tests.unit.test_selection import of_a_jobset

authority, world, run = test_cli_pods.authority, test_cli_pods.world, test_cli_pods.run

Json = dict[str, Any]
LABELS = {optin.LABEL: optin.ENABLED, "app": "solver"}


class Group:
    """Two pods of a solver, and what becomes of them."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.cut: list[tuple[str, list[checkpoint.Member], Course, str, Json]] = []
        self.restored: list[tuple[str, list[checkpoint.Member], dict[str, str], bool]] = []
        self.uids = [self.add(f"solver-{i}", f"n{i + 1}") for i in range(2)]
        monkeypatch.setattr(checkpoint, "run", self._checkpoint)
        monkeypatch.setattr(restore, "run", self._restore)
        monkeypatch.setattr(selected, "_LOOK_S", 0.01)
        monkeypatch.setenv("CKPT_AGENT_SCHEDULE_DEADLINE", "0.3")

    def add(self, name: str, node: str, **metadata: Any) -> str:
        status = {"podIPs": [{"ip": f"10.0.{node[1:]}.9"}]}
        metadata = {"labels": LABELS} | metadata
        return self.world.api.add_pod(name, node, metadata=metadata, status=status)

    def add_image(self, number: int = 1) -> str:
        agents = self.world.agents
        name = agents.add_image("solver", number)
        del agents.images[-1].members[:]
        agents.images[-1].members.extend(f"solver-{i}.c" for i in range(2))
        agents.details[name] = {
            "pods": [
                node_pb2.PodOfImage(
                    member=f"solver-{i}",
                    was=node_pb2.Placement(node=f"n{2 - i}", addresses=[f"10.9.9.{i}"]),
                )
                for i in range(2)
            ],
        }
        return name

    def _checkpoint(
        self,
        session: Any,
        group: str,
        members: Sequence[checkpoint.Member],
        course: Course,
        *,
        facts: Json,
        storage: str,
        **_: Any,
    ) -> checkpoint.Checkpoint:
        self.cut.append((group, list(members), course, storage, facts))
        self.add_image()
        image = results.image(self.world.agents.images[-1])
        stops = tuple(epochclient.MemberStop(f"{each.name}.c", 0.1, 4096, 2) for each in members)
        leaving = ((members[1].uid, "10.0.2.9:40000", "192.0.2.1:5432"),)
        return checkpoint.Checkpoint(
            *(image, tuple(members), stops, 0.3, 1.0, 1, leaving, {}),
            hook_problems=("solver-0: the hook 'drop' failed",),
        )

    def _restore(
        self,
        session: Any,
        group: str,
        epoch: str,
        members: Sequence[checkpoint.Member],
        moved: Mapping[str, str],
        *,
        again: bool,
        **_: Any,
    ) -> restore.Restored:
        self.restored.append((f"{group}@{epoch}", list(members), dict(moved), again))
        lost: dict[str, tuple[str, ...]] = {"solver-1": ("192.0.2.1:5432",)}
        return restore.Restored(tuple(members), lost, 0.5, {State.STANDING: 0.5})


@pytest.fixture
def group(world: World, monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(world, monkeypatch)


def error(ran: Any) -> Json:
    found: Json = json.loads(ran.err[ran.err.index("{") :])
    return found


def test_all_pods_that_match_are_one_group(run: Any, group: Group) -> None:
    ran = run("dump", "group/solver", "-l", "app=solver", "-o", "json")
    document = ran.document()
    assert (document["group"], document["selector"]) == ("solver", "app=solver")
    assert not document["stopped"]
    ((name, members, course, storage, facts),) = group.cut
    assert (name, course, storage) == ("solver", LEAVE_RUNNING, "")
    assert [(each.name, each.pod, each.uid, each.node) for each in members] == [
        ("solver-0", "solver-0", group.uids[0], "n1"),
        ("solver-1", "solver-1", group.uids[1], "n2"),
    ]
    assert facts == {"selector": "app=solver"}
    assert document["hookProblems"] == ["solver-0: the hook 'drop' failed"]
    assert "warning: solver-0: the hook 'drop' failed" in ran.err
    assert "pod solver-1 is connected to 192.0.2.1:5432, outside of the group" in ran.err


def test_a_pod_is_cut_with_all_that_are_connected_with_it(run: Any, group: Group) -> None:
    group.add("other", "n1", labels={})
    group.world.api.pods["default", "other"]["status"]["podIPs"] = [{"ip": "10.0.3.9"}]
    group.world.agents.connections = {
        "solver-0": [("10.0.1.9:4000", "10.0.2.9:80"), ("10.0.1.9:4001", "192.0.2.1:443")],
        "solver-1": [("10.0.2.9:80", "10.0.1.9:4000"), ("10.0.2.9:80", "10.0.3.9:5")],
    }
    ran = run("dump", "pod/solver-0", "--follow", "-o", "json")
    document = ran.document()
    assert (document["group"], document["followed"]) == ("followed.solver-0", "solver-0")
    ((name, members, course, _, facts),) = group.cut
    assert (name, course) == ("followed.solver-0", LEAVE_RUNNING)
    assert [each.name for each in members] == ["solver-0", "solver-1"]
    assert [each.addresses for each in members] == [("10.0.1.9",), ("10.0.2.9",)]
    assert facts["followed"] == "solver-0"
    assert "also cuts pod solver-1: connected with solver-0" in ran.err
    assert "leaves the cut: solver-0: 10.0.1.9:4001 -> 192.0.2.1:443: no pod here" in ran.err
    assert "leaves the cut: solver-1: 10.0.2.9:80 -> 10.0.3.9:5: pod other is not opted" in ran.err


def test_one_that_is_connected_and_cannot_be_cut_is_told_before_anything_stops(
    run: Any, group: Group
) -> None:
    group.world.agents.connections = {"solver-0": [("10.0.1.9:4000", "10.0.2.9:80")]}
    group.world.api.pods["default", "solver-1"]["metadata"]["deletionTimestamp"] = "now"
    refused = run("dump", "pod/solver-0", "--follow", "-o", "json")
    assert error(refused)["code"] == "target-unsuitable"
    assert "pod solver-1 is being deleted" in error(refused)["message"]
    assert error(run("dump", "pod/none", "--follow", "-o", "json"))["code"] == "not-found"
    assert group.cut == []


def test_who_may_hear_an_end_is_asked_at_once_and_named_if_nobody_answers_in_time(
    run: Any, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed, "_ASKING_S", 5.0)
    for name in ("job", "busy"):
        group.add(name, "n1", labels={**LABELS, "app": "other"})
    agents = group.world.agents
    # A Service's address: the other end may be any pod.
    agents.connections = {"solver-0": [("10.0.1.9:4000", "10.96.0.7:80")]}
    released, together, first = threading.Event(), threading.Barrier(3), threading.Event()

    def hang() -> None:
        if first.is_set():
            together.wait(10)
            released.wait(60)
        first.set()

    agents.fails["PlanDump"] = hang
    try:
        ran = run("dump", "pod/solver-0", "--follow", "-o", "json")
    finally:
        released.set()
    ((_, members, _, _, facts),) = group.cut
    assert [each.name for each in members] == ["solver-0"]
    for name in ("job", "busy", "solver-1"):
        assert f"may leave the cut: pod {name} could not be asked: the agent on n" in ran.err
    assert not together.broken
    assert len(facts["outside"]) == 4


@pytest.mark.parametrize(
    "words",
    [
        ("group/solver", "-l", "app=solver", "--follow"),
        ("jobset/solver", "--follow"),
        ("pod/solver-0", "--follow", "-c", "main"),
    ],
)
def test_what_begins_elsewhere_is_not_followed(
    run: Any, group: Group, words: Sequence[str]
) -> None:
    assert run("dump", *words).status == exits.USAGE
    assert group.cut == []


def test_stopped_pods_wait_in_the_storage_that_all_of_them_ask_for(run: Any, group: Group) -> None:
    for each in ("solver-0", "solver-1"):
        metadata = group.world.api.pods["default", each]["metadata"]
        metadata["annotations"] = {optin.STORAGE: "fast"}
    assert run("dump", "group/solver", "-l", "app=solver", "--stop").status == 0
    assert group.cut[0][2:4] == (EVACUATE, "fast")
    del group.world.api.pods["default", "solver-0"]["metadata"]["annotations"]
    refused = run("dump", "group/solver", "-l", "app=solver", "-o", "json")
    assert error(refused)["code"] == "invalid-input"
    assert len(group.cut) == 1


@pytest.mark.parametrize(
    ("selector", "code", "said"),
    [
        ("app=none", "not-found", "app=none"),
        (" ", "invalid-input", "every pod"),
        ("app=solver", "target-unsuitable", "not opted in"),
    ],
)
def test_what_cannot_be_one_group_is_refused_before_any_agent_is_asked(
    run: Any, group: Group, selector: str, code: str, said: str
) -> None:
    group.add("plain", "n1", labels={"app": "solver"})
    ran = run("dump", "group/solver", "-l", selector, "-o", "json")
    assert (ran.status, error(ran)["code"]) == (exits.REFUSED, code)
    assert said in error(ran)["message"]
    assert (group.cut, group.world.agents.calls) == ([], [])


def test_a_group_is_never_called_like_a_pod(run: Any, group: Group) -> None:
    ran = run("dump", "group/job", "-l", "app=solver", "-o", "json")
    assert error(ran)["message"].startswith("a pod is called job")
    assert group.cut == []


def test_a_jobset_is_not_cut_in_two(run: Any, group: Group) -> None:
    for name, app in (("train-0", "solver"), ("train-1", "other")):
        found = of_a_jobset(name)["metadata"]
        found["labels"]["app"] = app
        group.add(name, "n1", **{key: found[key] for key in ("labels", "ownerReferences")})
    ran = run("dump", "group/solver", "-l", "app=solver", "-o", "json")
    assert error(ran)["facts"]["reasons"] == [
        "JobSet train would be cut in two: its pod train-1 is not among them"
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("dump", "group/solver"),
        ("dump", "pod/job", "-l", "app=solver"),
        ("dump", "--pid", "7", "-l", "app=solver"),
        ("dump", "group/", "-l", "app=solver"),
        ("dump", "group/solver", "-l", "app=solver", "-c", "c"),
        ("migrate", "group/solver", "--to", "n2"),
        ("restore", "group/solver", "--pod", "job"),
        ("restore", "followed.solver-0", "-n", "default", "--wait"),
        ("restore", "group/solver", "--node", "n2"),
        ("restore", "group/solver", "--wait"),
        ("restore", "group/solver@"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_asked(
    run: Any, group: Group, arguments: tuple[str, ...]
) -> None:
    assert run(*arguments).status == exits.USAGE
    assert group.world.api.requests == []


def test_a_group_comes_back_into_pods_of_the_same_names(run: Any, group: Group) -> None:
    image = group.add_image(1)
    newest = group.add_image(2)
    for each in ("solver-0", "solver-1"):
        metadata = group.world.api.pods["default", each]["metadata"]
        metadata["annotations"] = {optin.RESTORE: newest}
    ran = run("restore", "group/solver", "--again", "-o", "json")
    document = ran.document()
    assert (document["name"], document["group"]) == (newest, "solver")
    assert [each["now"]["node"] for each in document["pods"]] == ["n1", "n2"]
    assert document["pods"][1]["lost"] == ["192.0.2.1:5432"]
    ((name, members, moved, again),) = group.restored
    assert (name, again) == (newest, True)
    assert [(each.name, each.uid) for each in members] == [
        ("solver-0", group.uids[0]),
        ("solver-1", group.uids[1]),
    ]
    assert moved == {"10.9.9.0": "10.0.1.9", "10.9.9.1": "10.0.2.9"}
    assert "solver-1 lost its connection to 192.0.2.1:5432" in ran.err
    refused = run("restore", f"group/{image}", "-o", "json")
    assert "waits for another image" in error(refused)["message"]
    assert run("restore", "group/solver").out.splitlines()[0].split() == [
        *("POD", "FROM", "TO", "NOW"),
    ]


def test_a_pod_that_is_not_there_is_told_at_once(run: Any, group: Group) -> None:
    image = group.add_image()
    del group.world.api.pods["default", "solver-1"]
    ran = run("restore", "group/solver", "-o", "json")
    assert (ran.status, error(ran)["code"]) == (exits.REFUSED, "target-unsuitable")
    assert error(ran)["facts"]["reasons"] == ["there is no pod solver-1"]
    assert f"{optin.RESTORE}: {image}" in error(ran)["hint"]
    assert group.restored == []


def test_pods_that_start_are_waited_for(run: Any, group: Group) -> None:
    group.add_image()
    status = group.world.api.pods["default", "solver-1"]["status"]
    addresses = status.pop("podIPs")
    ran = run("restore", "group/solver", "-o", "json")
    assert error(ran)["facts"]["reasons"] == ["pod solver-1 does not run yet"]
    assert group.restored == []
    later = threading.Timer(0.1, lambda: status.update(podIPs=addresses))
    later.start()
    assert run("restore", "group/solver").status == 0
    later.join()


@pytest.mark.parametrize("broken", ["damaged", "obstacles", "of one pod"])
def test_an_image_that_could_never_come_back_is_refused(
    run: Any, group: Group, broken: str
) -> None:
    name = group.add_image()
    if broken == "damaged":
        group.world.agents.images[-1].damage = "a pack is gone"
    elif broken == "obstacles":
        group.world.agents.details[name]["obstacles"] = ["it was imported"]
    else:
        del group.world.agents.details[name]["pods"]
    ran = run("restore", "group/solver", "-o", "json")
    codes = {"damaged": "corrupt", "obstacles": "restore-conflict", "of one pod": "invalid-input"}
    assert error(ran)["code"] == codes[broken]
    assert group.restored == []


def test_whoever_asks_to_stop_is_heard_while_pods_start(group: Group) -> None:
    group.add_image()
    del group.world.api.pods["default", "solver-1"]["status"]["podIPs"]
    control = checkpoint.Control()
    control.cancel()
    with (
        wiring.cluster(settings.load({}, None, os.environ)) as session,
        pytest.raises(errors.Interrupted),
    ):
        selected.restore(session, "solver", now_s=1.8e9, control=control)
    assert group.restored == []


def test_whom_a_pod_was_connected_with_comes_back_by_the_name_that_dump_printed(
    run: Any, group: Group
) -> None:
    image = group.add_image()
    agents = group.world.agents
    agents.images[-1].group = "followed.solver-0"
    agents.images[-1].name = name = f"followed.solver-0@{image.partition('@')[2]}"
    agents.details[name] = agents.details.pop(image)
    for each in ("solver-0", "solver-1"):
        metadata = group.world.api.pods["default", each]["metadata"]
        metadata["annotations"] = {optin.RESTORE: name}
    document = run("restore", name, "-n", "default", "-o", "json").document()
    assert (document["name"], document["group"]) == (name, "followed.solver-0")
    del group.world.api.pods["default", "solver-1"]
    refused = error(run("restore", "followed.solver-0", "-n", "default", "-o", "json"))
    assert refused["facts"]["reasons"] == ["there is no pod solver-1"]
    assert "JobSet's pods never have the names that they had" in refused["hint"]
    assert error(run("restore", "jobset.none", "-n", "default", "-o", "json"))["message"] == (
        "there is no image of JobSet default/none"
    )
