"""The coordinator's API over real gRPC, against agents and an API server that speak the real
protocols.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from agent import errors
from agent.model import jobset, optin
from agent.model.container import HOLD
from agent.model.operations import Kind, State
from agent.model.protocol import Step
from agent.rpc import coordinatorclient
from agent.rpc.coordinatorclient import Asking, Target
from agent.rpc.v1 import coordinator_pb2 as api
from agent.rpc.v1 import node_pb2
from tests import coordinated
from tests.coordinated import BOB, Cluster, wait_for
from tests.fakes import apiserver

TRAIN = Target(jobset="train")


@pytest.fixture
def cluster(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with coordinated.running(tmp_path, monkeypatch) as made:
        made.jobsets.add()
        yield made


@pytest.fixture
def port(cluster: Cluster) -> Iterator[int]:
    with coordinated.replica(cluster) as port:
        yield port


@pytest.fixture
def ada(cluster: Cluster, port: int) -> Iterator[coordinatorclient.Coordinator]:
    with coordinated.client(cluster, port) as made:
        wait_for(lambda: serves(made))
        yield made


@contextlib.contextmanager
def held(cluster: Cluster, wanted: Step) -> Iterator[threading.Event]:
    """Each pod waits before ``wanted`` until the context is left; set when one does."""
    reached, go_on = threading.Event(), threading.Event()

    def before(step: Step, pod: str) -> None:
        if step is wanted:
            reached.set()
            go_on.wait(60)

    cluster.group.before = before
    try:
        yield reached
    finally:
        cluster.group.before = lambda step, pod: None
        go_on.set()


def serves(client: coordinatorclient.Coordinator) -> bool:
    try:
        client.operations("default")
    except errors.Unreachable:
        return False
    return True


def asking(key: str = "", **more: Any) -> Asking:
    return Asking("default", key, **more)


def ended(client: coordinatorclient.Coordinator, identifier: str) -> coordinatorclient.Operation:
    *_, last = client.watch("default", identifier)
    assert last.over
    return last


def test_an_epoch_is_created_watched_and_told_with_its_figures(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    begun = ada.create_epoch(asking(), TRAIN)
    assert (begun.kind, begun.group, begun.caller) == (Kind.EPOCH, "jobset.train", "ada")
    seen = list(ada.watch("default", begun.id))
    assert [each.revision for each in seen] == sorted({each.revision for each in seen})
    last = seen[-1]
    assert (last.state, last.error, last.takeovers) == (State.SUCCEEDED, None, 0)
    assert last.image is not None
    assert last.image.epoch == cluster.agents.images[-1].epoch
    assert last.figures is not None
    assert set(cluster.processes().values()) == {"running"}
    assert ada.get("default", begun.id) == last
    assert [each.id for each in ada.operations("default")] == [begun.id]
    assert jobset.TEMPLATE in cluster.group.facts[-1]


# Asking.


def test_one_key_begins_one_operation_and_asks_one_thing(
    cluster: Cluster, port: int, ada: coordinatorclient.Coordinator
) -> None:
    first = ada.create_epoch(asking("k1"), TRAIN)
    begun: list[str] = [first.id]
    together = [
        threading.Thread(target=lambda: begun.append(ada.create_epoch(asking("k1"), TRAIN).id))
        for _ in range(4)
    ]
    for each in together:
        each.start()
    for each in together:
        each.join()
    assert begun == [first.id] * 5
    ended(ada, first.id)
    assert ada.create_epoch(asking("k1"), TRAIN).id == first.id
    with pytest.raises(errors.InvalidInput, match="something else"):
        ada.create_epoch(asking("k1"), TRAIN, stop=True)
    with pytest.raises(errors.InvalidInput, match="128"):
        ada.create_epoch(asking("k" * 129), TRAIN)
    with coordinated.client(cluster, port, BOB) as bob:
        other = bob.create_epoch(asking("k1"), TRAIN)
        assert other.id != first.id
        ended(bob, other.id)
    assert len(cluster.agents.images) == 2


def test_of_a_group_one_operation_runs_and_others_are_refused_or_wait_in_order(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    with held(cluster, Step.PREPARE) as reached:
        first = ada.create_epoch(asking(), TRAIN)
        assert reached.wait(60)
        with pytest.raises(errors.TargetBusy, match=first.id):
            ada.create_epoch(asking(), TRAIN)
        second = ada.create_epoch(asking(wait=True), TRAIN)
        third = ada.create_epoch(asking(wait=True), TRAIN)
        assert (second.state, third.state) == (State.QUEUED, State.QUEUED)
        assert [each.id for each in ada.operations("default")] == [third.id, second.id, first.id]
        # One that has not begun is cancelled at once, and is never begun.
        assert ada.cancel("default", second.id).state is State.CANCELLED
    assert ended(ada, first.id).state is State.SUCCEEDED
    assert ended(ada, third.id).state is State.SUCCEEDED
    assert len(cluster.agents.images) == 2


def test_what_is_cancelled_while_pods_stand_still_lets_them_go_on(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    with held(cluster, Step.CAPTURE) as reached:
        begun = ada.create_epoch(asking(), TRAIN)
        assert reached.wait(60)
        assert set(cluster.processes().values()) == {"stopped"}
        assert ada.cancel("default", begun.id).cancelling
    last = ended(ada, begun.id)
    assert (last.state, type(last.error)) == (State.CANCELLED, errors.Interrupted)
    wait_for(lambda: set(cluster.processes().values()) == {"running"})
    assert cluster.agents.images == []
    # Nothing is left of it, and it cannot be cancelled again.
    assert ada.cancel("default", begun.id).revision == last.revision
    assert ended(ada, ada.create_epoch(asking(), TRAIN).id).state is State.SUCCEEDED


def test_an_epoch_that_takes_too_long_is_given_up(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    with held(cluster, Step.CAPTURE):
        begun = ada.create_epoch(asking(deadline_s=1.0), TRAIN)
        last = ended(ada, begun.id)
    assert (last.state, type(last.error)) == (State.FAILED, errors.DeadlineExceeded)
    # On a busy machine it may have come to none of them.
    wait_for(lambda: "stopped" not in cluster.processes().values())


def test_an_epoch_that_fails_tells_why_with_the_pods_name(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    def fail(step: Step, pod: str) -> None:
        if step is Step.CAPTURE and "-0-1-" in pod:
            raise errors.DumpFailed("no luck", hint="try again")

    cluster.group.before = fail
    last = ended(ada, ada.create_epoch(asking(), TRAIN).id)
    assert last.state is State.FAILED
    assert isinstance(last.error, errors.DumpFailed)
    assert "no luck at worker-0-1" in last.error.message
    assert last.error.hint == "try again"


# Rights.


def test_who_may_not_is_refused_before_anything_is_recorded(
    cluster: Cluster, port: int, ada: coordinatorclient.Coordinator
) -> None:
    lacking = cluster.extra.lacking
    with coordinated.client(cluster, port, BOB) as bob:
        lacking |= {("bob", "create", "images"), ("bob", "list", "images")}
        lacking.add(("bob", "get", "images"))
        with pytest.raises(errors.Forbidden, match="create images"):
            bob.create_epoch(asking(), TRAIN)
        with pytest.raises(errors.Forbidden, match="list images"):
            bob.operations("default")
        with held(cluster, Step.CAPTURE) as reached:
            begun = ada.create_epoch(asking(), TRAIN)
            assert reached.wait(60)
            with pytest.raises(errors.Forbidden):
                bob.cancel("default", begun.id)
        assert ended(ada, begun.id).state is State.SUCCEEDED
    for verb, resource in (("patch", "jobsets"), ("create", "pods"), ("create", "images")):
        user = f"may-not-{verb}-{resource}"
        cluster.extra.callers[user] = user
        lacking.add((user, verb, resource))
        with (
            coordinated.client(cluster, port, user) as lacks,
            pytest.raises(errors.Forbidden) as caught,
        ):
            lacks.migrate(asking(), "train", ["n2", "n1"])
        assert f"not allowed: {verb} {resource}" in str(caught.value.facts["reasons"])
    with (
        coordinated.client(cluster, port, "nobody's") as nobody,
        pytest.raises(errors.Unauthenticated),
    ):
        nobody.create_epoch(asking(), TRAIN)
    assert len(cluster.records()) == 1


def test_an_image_tells_what_the_jobset_was_only_if_its_caller_might_create_it(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    cluster.extra.lacking.add(("ada", "create", "jobsets"))
    assert ended(ada, ada.create_epoch(asking(), TRAIN).id).state is State.SUCCEEDED
    assert jobset.TEMPLATE not in cluster.group.facts[-1]


def test_a_record_holds_neither_tokens_nor_what_the_pods_run(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    ended(ada, ada.create_epoch(asking(), TRAIN).id)
    (record,) = cluster.records()
    text = json.dumps(record)
    assert coordinated.ADA not in text
    assert apiserver.TOKEN not in text
    assert "replicatedJobs" not in text
    assert record["metadata"]["labels"]["ckpt-agent.dev/ended"] == "true"
    assert record["metadata"]["name"].startswith("ckpt-agent-operation-")


# Looking.


def test_a_plan_tells_what_each_pod_would_take_and_every_obstacle(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    found = ada.plan("default", TRAIN)
    assert [each.identity for each in found.members] == ["worker-0-0", "worker-0-1"]
    assert [each.node for each in found.members] == ["n1", "n2"]
    assert found.obstacles == ()
    cluster.agents.blockers = [{"code": "x", "subject": "pid 7", "reason": "is odd"}]
    assert ada.plan("default", TRAIN).obstacles == (
        "worker-0-0: pid 7: is odd",
        "worker-0-1: pid 7: is odd",
    )
    cluster.jobsets.found()["spec"]["suspend"] = True
    suspended = ada.plan("default", TRAIN)
    assert suspended.members == ()
    assert "it is suspended" in suspended.obstacles


def test_pages_of_images_go_on_after_the_last_that_was_told(
    cluster: Cluster, port: int, ada: coordinatorclient.Coordinator
) -> None:
    names = [cluster.agents.add_image("jobset.train", number) for number in (1, 2, 4, 5)]
    with coordinated.stub(cluster, port) as stub:
        request = api.ListGroupImagesRequest(namespace="default", page_size=2)
        first = stub.ListImages(request)
        assert [each.name for each in first.images] == names[:2]
        new = cluster.agents.add_image("jobset.train", 3)
        request.page_token = first.next_page_token
        second = stub.ListImages(request)
        assert [each.name for each in second.images] == [new, names[2]]
        request.page_token = second.next_page_token
        third = stub.ListImages(request)
        assert [each.name for each in third.images] == names[3:]
        assert third.next_page_token == ""
        detail = stub.GetImage(node_pb2.GetImageRequest(namespace="default", image=new))
        assert detail.image.name == new
        ids = [ended(ada, ada.create_epoch(asking(), TRAIN).id).id for _ in range(3)]
        listing = api.ListOperationsRequest(namespace="default", page_size=2)
        found = stub.ListOperations(listing)
        assert [each.id for each in found.operations] == [ids[2], ids[1]]
        listing.page_token = found.next_page_token
        assert [each.id for each in stub.ListOperations(listing).operations] == [ids[0]]


# Leading.


def test_a_replica_that_does_not_lead_answers_nothing(
    cluster: Cluster, port: int, ada: coordinatorclient.Coordinator
) -> None:
    other = coordinated.Process(cluster)
    try:
        with coordinated.client(cluster, other.port) as waits:
            wait_for(lambda: "another replica" in why(waits))
            begun = ada.create_epoch(asking(), TRAIN)
            assert "another replica" in why(waits)
            assert ended(ada, begun.id).state is State.SUCCEEDED
    finally:
        other.end()


def why(client: coordinatorclient.Coordinator) -> str:
    try:
        client.operations("default")
    except errors.Unreachable as exc:
        return exc.message
    return ""


def test_what_cannot_be_recorded_is_not_begun(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    def down(step: Step, pod: str) -> None:
        raise AssertionError("a pod was told something")

    ended(ada, ada.create_epoch(asking(), TRAIN).id)
    cluster.group.before = down
    cluster.extra.down = True
    with pytest.raises(errors.Unreachable):
        ada.create_epoch(asking(), TRAIN)
    cluster.extra.down = False
    assert len(ada.operations("default")) == 1


# Restores and moves.


def test_who_may_not_look_at_nodes_learns_nothing_of_them(
    cluster: Cluster, port: int, ada: coordinatorclient.Coordinator
) -> None:
    cluster.api.nodes["n2"]["spec"]["unschedulable"] = True
    told = ended(ada, ada.migrate(asking(), "train", ["n2", "n1"]).id)
    assert isinstance(told.error, errors.TargetUnsuitable)
    cluster.extra.callers["token-of-eve"] = "eve"
    cluster.extra.lacking.add(("eve", "get", "nodes"))
    with coordinated.client(cluster, port, "token-of-eve") as eve:
        moved = ended(eve, eve.migrate(asking(), "train", ["n2", "n1"]).id)
    assert (moved.state, moved.error) == (State.SUCCEEDED, None)


def test_a_move_ends_nothing_that_runs_and_tells_where_each_pod_went(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    before = cluster.jobsets.pods()["worker-0-0"]["metadata"]["uid"]
    seen = list(ada.watch("default", ada.migrate(asking(), "train", ["n2", "n1"]).id))
    last = seen[-1]
    assert (last.state, last.error) == (State.SUCCEEDED, None)
    assert [(each.identity, each.was.node, each.now.node) for each in last.pods] == [
        ("worker-0-0", "n1", "n2"),
        ("worker-0-1", "n2", "n1"),
    ]
    assert last.image is not None
    assert last.figures is not None
    steps = {each.step for each in seen}
    assert {"suspend", "start"} <= steps
    assert set(cluster.processes().values()) == {"running"}
    assert cluster.jobsets.ended == ["ended", "ended"]
    assert cluster.jobsets.intent() is None
    assert not cluster.jobsets.found()["spec"]["suspend"]
    assert cluster.jobsets.pods()["worker-0-0"]["metadata"]["uid"] != before


def test_a_restore_brings_back_the_newest_image_and_ends_what_runs_only_if_told(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    taken = ended(ada, ada.create_epoch(asking(), TRAIN).id)
    refused = ended(ada, ada.restore(asking(), TRAIN).id)
    assert (refused.state, type(refused.error)) == (State.FAILED, errors.RestoreConflict)
    assert cluster.jobsets.ended == []
    done = ended(ada, ada.restore(asking(), TRAIN, replace=True).id)
    assert (done.state, done.error) == (State.SUCCEEDED, None)
    assert done.image == taken.image
    assert cluster.jobsets.ended == ["running", "running"]
    assert set(cluster.processes().values()) == {"running"}
    # One that is past giving up goes to its end.
    with held(cluster, Step.STAND) as reached:
        begun = ada.restore(asking(), TRAIN, replace=True)
        assert reached.wait(60)
        assert ada.cancel("default", begun.id).cancelling
    assert ended(ada, begun.id).state is State.SUCCEEDED


# Groups by label.


PAIR = Target(group="pair", labels="app=pair")


def add_pair(cluster: Cluster, **more: Any) -> None:
    for index in range(2):
        name = f"pair-{index}"
        cluster.api.pods.pop(("default", name), None)
        labels = {"app": "pair", optin.LABEL: optin.ENABLED}
        metadata = {"labels": labels, **more}
        status = {"podIPs": [{"ip": f"10.1.0.{index}"}]}
        spec = {"containers": [{"name": "trainer", "command": [HOLD, "auto", "work"]}]}
        node = f"n{index + 1}"
        cluster.api.add_pod(name, node, metadata=metadata, status=status, spec=spec)


def test_a_group_by_label_is_cut_ended_and_brought_back_into_pods_that_wait(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    add_pair(cluster)
    done = ended(ada, ada.create_epoch(asking(), PAIR, stop=True).id)
    assert (done.state, done.error, done.group) == (State.SUCCEEDED, None, "pair")
    assert done.image is not None
    image = f"pair@{done.image.epoch}"
    add_pair(cluster, annotations={optin.RESTORE: image})
    back = ended(ada, ada.restore(asking(), Target(group="pair")).id)
    assert (back.state, back.error) == (State.SUCCEEDED, None)
    assert [each.identity for each in back.pods] == ["pair-0", "pair-1"]
    with pytest.raises(errors.InvalidInput):
        ada.restore(asking(), Target(group="pair"), replace=True)
    with pytest.raises(errors.InvalidInput):
        ada.restore(asking(), Target(group="pair"), nodes=["n1"])
    with pytest.raises(errors.InvalidInput):
        ada.create_epoch(asking(), Target(group="jobset.train", labels="app=pair"))


def test_who_is_connected_with_a_pod_is_found_when_its_turn_has_come(
    cluster: Cluster, ada: coordinatorclient.Coordinator
) -> None:
    add_pair(cluster)
    ends = ("10.1.0.0:4000", "10.1.0.1:80")
    cluster.agents.connections = {"pair-0": [ends], "pair-1": [ends[::-1]]}
    target = Target(followed="pair-1")
    assert [each.pod for each in ada.plan("default", target).members] == ["pair-0", "pair-1"]
    done = ended(ada, ada.create_epoch(asking(), target, stop=True).id)
    assert (done.state, done.error, done.group) == (State.SUCCEEDED, None, "followed.pair-1")
    assert cluster.group.facts[-1]["followed"] == "pair-1"
    assert done.image is not None
    image = f"followed.pair-1@{done.image.epoch}"
    add_pair(cluster, annotations={optin.RESTORE: image})
    back = ended(ada, ada.restore(asking(), target).id)
    assert (back.state, back.error) == (State.SUCCEEDED, None)
    assert [each.identity for each in back.pods] == ["pair-0", "pair-1"]
    with pytest.raises(errors.InvalidInput):
        ada.create_epoch(asking(), Target(followed="no pod"))
