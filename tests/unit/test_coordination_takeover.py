"""A coordinator is killed (SIGKILL) at each point of an operation, and another replica goes on: the
operation ends as its caller asked, and nothing that runs is ended for it.
"""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent import errors
from agent.model import optin
from agent.model.operations import State
from agent.model.protocol import Decision, Step
from agent.rpc import coordinatorclient
from agent.rpc.coordinatorclient import Target
from agent.rpc.v1 import node_pb2
from tests import coordinated
from tests.coordinated import Cluster, wait_for
from tests.unit.test_coordination import TRAIN, add_pair, asking, ended, serves


@pytest.fixture
def cluster(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with coordinated.running(tmp_path, monkeypatch) as made:
        made.jobsets.add()
        yield made


class Killer:
    """Kills a replica at a point, once, and says so."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.process = coordinated.Process(cluster)
        self.done = threading.Event()
        # That who asked has its answer: it goes out beside the first steps.
        self.asked = threading.Event()
        self._lock = threading.Lock()

    def kill(self) -> None:
        assert self.asked.wait(60)
        with self._lock:
            if not self.done.is_set():
                self.process.kill()
                self.done.set()

    def at_step(self, wanted: Step, pods: int = 1) -> None:
        """When so many have heard it."""
        heard: set[str] = set()

        def before(step: Step, pod: str) -> None:
            if step is wanted:
                heard.add(pod)
                if len(heard) >= pods:
                    self.kill()

        self.cluster.group.before = before

    def before_decision(self, wanted: int) -> None:
        """Of the epochs and attempts, by number."""
        self._at_decision("deciding", wanted)

    def after_decision(self, wanted: int) -> None:
        self._at_decision("decided", wanted)

    def _at_decision(self, when: str, wanted: int) -> None:
        count = 0

        def at(name: str) -> None:
            nonlocal count
            count += 1
            if count == wanted:
                self.kill()

        setattr(self.cluster.group, when, at)

    def at_jobset(self, is_it: Callable[[Any], bool]) -> None:
        def before(found: Any) -> None:
            if is_it(found):
                self.kill()

        self.cluster.jobsets.before = before


@pytest.fixture
def killer(cluster: Cluster) -> Iterator[Killer]:
    made = Killer(cluster)
    try:
        with coordinated.client(cluster, made.process.port) as first:
            wait_for(lambda: serves(first))
        yield made
    finally:
        made.process.kill()


def begun(
    cluster: Cluster, killer: Killer, ask: Callable[[coordinatorclient.Coordinator], Any]
) -> str:
    """The operation that was asked for, whose coordinator is dead."""
    with coordinated.client(cluster, killer.process.port) as first:
        found: str = ask(first).id
        killer.asked.set()
        assert killer.done.wait(60)
    cluster.group.before = lambda step, pod: None
    cluster.jobsets.before = lambda found: None
    cluster.outlive()
    return found


def gone_on_with(cluster: Cluster, identifier: str) -> coordinatorclient.Operation:
    """What became of it with another replica."""
    with (
        coordinated.replica(cluster) as port,
        coordinated.client(cluster, port) as second,
    ):
        wait_for(lambda: serves(second))
        last = ended(second, identifier)
        assert last.takeovers == 1
        # The group is free for the next.
        assert ended(second, second.create_epoch(asking(), TRAIN).id).state is State.SUCCEEDED
        return last


EPOCH_POINTS: dict[str, Callable[[Killer], None]] = {
    "preparing": lambda killer: killer.at_step(Step.PREPARE),
    "capturing": lambda killer: killer.at_step(Step.CAPTURE),
    "persisting": lambda killer: killer.at_step(Step.PERSIST),
    "before the commit": lambda killer: killer.before_decision(1),
    "after the commit": lambda killer: killer.after_decision(1),
}


@pytest.mark.parametrize("point", EPOCH_POINTS)
def test_an_epoch_is_finished_or_done_again(cluster: Cluster, killer: Killer, point: str) -> None:
    EPOCH_POINTS[point](killer)
    identifier = begun(cluster, killer, lambda first: first.create_epoch(asking(), TRAIN))
    last = gone_on_with(cluster, identifier)
    assert (last.state, last.error) == (State.SUCCEEDED, None)
    assert last.image is not None
    assert cluster.group.decisions[last.image.epoch] is Decision.COMMITTED
    wait_for(lambda: set(cluster.processes().values()) == {"running"})
    assert cluster.jobsets.ended == []
    # One image for it and one for the epoch after it.
    assert len(cluster.agents.images) == 2
    if point == "after the commit":
        assert cluster.agents.images[0].epoch == last.image.epoch


MOVE_POINTS: dict[str, Callable[[Killer], None]] = {
    "capturing": lambda killer: killer.at_step(Step.CAPTURE),
    "before the commit": lambda killer: killer.before_decision(1),
    "after the commit": lambda killer: killer.after_decision(1),
    "ending": lambda killer: killer.at_step(Step.END, 2),
    "suspending": lambda killer: killer.at_jobset(lambda found: found["spec"].get("suspend")),
    "resuming": lambda killer: killer.at_jobset(
        lambda found: found["spec"].get("suspend") is False
    ),
    "filling": lambda killer: killer.at_step(Step.FILL),
    "before the restore is decided": lambda killer: killer.before_decision(2),
    "after the restore is decided": lambda killer: killer.after_decision(2),
    "running": lambda killer: killer.at_step(Step.RUN),
    "forgetting": lambda killer: killer.at_jobset(
        lambda found: (
            found["spec"].get("suspend") is False
            and optin.RESTORE not in found["metadata"].get("annotations", {})
        )
    ),
}


@pytest.mark.parametrize("point", MOVE_POINTS)
def test_a_move_is_brought_to_its_end_and_nothing_that_runs_is_ended(
    cluster: Cluster, killer: Killer, point: str
) -> None:
    MOVE_POINTS[point](killer)
    identifier = begun(
        cluster, killer, lambda first: first.migrate(asking(), "train", ["n2", "n1"])
    )
    last = gone_on_with(cluster, identifier)
    assert (last.state, last.error) == (State.SUCCEEDED, None)
    assert [each.now.node for each in last.pods] == ["n2", "n1"]
    wait_for(lambda: set(cluster.processes().values()) == {"running"})
    assert "running" not in cluster.jobsets.ended
    assert cluster.jobsets.intent() is None
    assert not cluster.jobsets.found()["spec"]["suspend"]


def test_a_move_that_had_ended_one_pod_only_is_brought_to_its_end(
    cluster: Cluster, killer: Killer
) -> None:
    """Half a job is none: its image is, which was cut with all of it."""

    def before(step: Step, pod: str) -> None:
        if step is Step.END:
            killer.kill()
            if "-0-1-" in pod:
                raise errors.DumpFailed("its processes could not be ended")

    cluster.group.before = before
    identifier = begun(
        cluster, killer, lambda first: first.migrate(asking(), "train", ["n2", "n1"])
    )
    wait_for(lambda: cluster.processes() == {"worker-0-0": "ended", "worker-0-1": "running"})
    last = gone_on_with(cluster, identifier)
    assert (last.state, last.error) == (State.SUCCEEDED, None)
    wait_for(lambda: set(cluster.processes().values()) == {"running"})
    assert cluster.jobsets.ended == ["ended", "running"]


def test_what_somebody_else_has_let_run_meanwhile_is_left_alone(
    cluster: Cluster, killer: Killer
) -> None:
    killer.at_step(Step.FILL)
    identifier = begun(
        cluster, killer, lambda first: first.migrate(asking(), "train", ["n2", "n1"])
    )
    # Its owner starts it over, from its beginning.
    jobsets = cluster.jobsets
    del jobsets.found()["metadata"]["annotations"][optin.RESTORE]
    jobsets.found()["spec"]["suspend"] = True
    jobsets._changed(jobsets.found())
    jobsets.found()["spec"]["suspend"] = False
    jobsets._changed(jobsets.found())
    jobsets.ended.clear()
    there = {each["metadata"]["uid"] for each in jobsets.pods().values()}
    last = gone_on_with(cluster, identifier)
    assert last.state is State.FAILED
    assert isinstance(last.error, errors.Abandoned)
    assert last.error.retryable
    assert {each["metadata"]["uid"] for each in jobsets.pods().values()} == there
    assert jobsets.ended == []


def test_a_restore_that_is_committed_and_cannot_be_looked_at_is_told_so(
    cluster: Cluster, killer: Killer
) -> None:
    killer.after_decision(2)
    identifier = begun(
        cluster, killer, lambda first: first.migrate(asking(), "train", ["n2", "n1"])
    )
    wait_for(lambda: set(cluster.processes().values()) == {"running"})
    cluster.agents.fails["GetImage"] = errors.Unreachable("the store is away")
    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as second:
        wait_for(lambda: serves(second))
        last = ended(second, identifier)
    assert (last.state, type(last.error)) == (State.FAILED, errors.MoveIncomplete)
    assert last.error is not None
    assert f"annotate jobset train {optin.RESTORE}-" in last.error.hint
    assert cluster.jobsets.ended == ["ended", "ended"]
    assert set(cluster.processes().values()) == {"running"}


def test_what_ends_three_coordinators_is_not_begun_a_fourth_time(
    cluster: Cluster, killer: Killer
) -> None:
    killer.at_step(Step.CAPTURE)
    identifier = begun(cluster, killer, lambda first: first.create_epoch(asking(), TRAIN))
    for _ in range(2):
        another = Killer(cluster)
        another.at_step(Step.CAPTURE)
        another.asked.set()
        try:
            assert another.done.wait(60)
        finally:
            another.process.kill()
        cluster.outlive()
    cluster.group.before = lambda step, pod: None
    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as last:
        wait_for(lambda: serves(last))
        found = ended(last, identifier)
    assert (found.state, type(found.error), found.takeovers) == (State.FAILED, errors.Abandoned, 3)
    assert cluster.agents.images == []
    wait_for(lambda: set(cluster.processes().values()) == {"running"})


def test_a_replica_that_is_told_to_end_leaves_its_operations_to_the_next(cluster: Cluster) -> None:
    first = coordinated.Process(cluster)
    reached = threading.Event()

    def before(step: Step, pod: str) -> None:
        if step is Step.CAPTURE and not reached.is_set():
            reached.set()

    cluster.group.before = before
    with coordinated.client(cluster, first.port) as asks:
        wait_for(lambda: serves(asks))
        cluster.group.before = before
        identifier = asks.create_epoch(asking(), TRAIN).id
        assert reached.wait(60)
    first.end()
    # It let the lease go by itself.
    assert cluster.extra.stored[coordinated.LEASE]["spec"]["holderIdentity"] == ""
    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as second:
        wait_for(lambda: serves(second))
        assert ended(second, identifier).state is State.SUCCEEDED
    wait_for(lambda: set(cluster.processes().values()) == {"running"})


@pytest.mark.parametrize("point", ["capturing", "after the commit", "ending"])
def test_a_dump_that_was_to_end_the_pods_says_whether_it_did(
    cluster: Cluster, killer: Killer, point: str
) -> None:
    MOVE_POINTS[point](killer)
    identifier = begun(
        cluster, killer, lambda first: first.create_epoch(asking(), TRAIN, stop=True)
    )
    # Those that were not ended go on before the next replica comes.
    there = "ended" if point == "ending" else "running"
    wait_for(lambda: set(cluster.processes().values()) == {there})
    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as second:
        wait_for(lambda: serves(second))
        last = ended(second, identifier)
    if point == "after the commit":
        assert (last.state, type(last.error)) == (State.FAILED, errors.Abandoned)
        assert last.image is not None
        assert set(cluster.processes().values()) == {"running"}
    else:
        assert (last.state, last.error) == (State.SUCCEEDED, None)
        assert set(cluster.processes().values()) == {"ended"}
    assert cluster.jobsets.ended == []


@pytest.mark.parametrize("point", ["suspending", "filling", "after the restore is decided"])
def test_a_restore_that_was_to_replace_ends_what_ran_once(
    cluster: Cluster, killer: Killer, point: str
) -> None:
    taken = "20260131-235901-0a1b2c"
    cluster.agents.add_image("jobset.train", 1)
    del cluster.agents.images[-1].members[:]
    cluster.agents.images[-1].members.extend(["worker-0-0.trainer", "worker-0-1.trainer"])
    pods = [node_pb2.PodOfImage(member=f"worker-0-{index}") for index in range(2)]
    cluster.agents.details[f"jobset.train@{taken}"] = {"pods": pods}
    for each in cluster.jobsets.pods().values():
        cluster.group.processes[each["metadata"]["uid"]] = "running"
    # The first decision is that of the restore.
    if point == "after the restore is decided":
        killer.after_decision(1)
    else:
        MOVE_POINTS[point](killer)
    identifier = begun(cluster, killer, lambda first: first.restore(asking(), TRAIN, replace=True))
    last = gone_on_with(cluster, identifier)
    assert (last.state, last.error) == (State.SUCCEEDED, None)
    assert last.image is not None
    assert last.image.epoch == taken
    wait_for(lambda: set(cluster.processes().values()) == {"running"})
    assert cluster.jobsets.ended.count("running") == 2
    assert cluster.jobsets.intent() is None


@pytest.mark.parametrize("point", ["filling", "after the restore is decided"])
def test_a_group_by_label_is_brought_back_once(
    cluster: Cluster, killer: Killer, point: str
) -> None:
    pair = Target(group="pair", labels="app=pair")
    add_pair(cluster)
    with coordinated.client(cluster, killer.process.port) as first:
        taken = ended(first, first.create_epoch(asking(), pair, stop=True).id)
    assert taken.image is not None
    add_pair(cluster, annotations={optin.RESTORE: f"pair@{taken.image.epoch}"})
    if point == "filling":
        killer.at_step(Step.FILL)
    else:
        killer.after_decision(1)
    identifier = begun(cluster, killer, lambda first: first.restore(asking(), pair))
    last = gone_on_with(cluster, identifier)
    assert (last.state, last.error) == (State.SUCCEEDED, None)
    assert [each.identity for each in last.pods] == ["pair-0", "pair-1"]
    uids = [cluster.api.pods["default", f"pair-{index}"]["metadata"]["uid"] for index in range(2)]
    wait_for(lambda: {cluster.group.processes[each] for each in uids} == {"running"})
    committed = [
        name for name, found in cluster.group.attempts.items() if found is Decision.COMMITTED
    ]
    assert len(committed) == 1


def test_who_was_followed_is_committed_though_nobody_can_say_any_more_who_that_was(
    cluster: Cluster, killer: Killer
) -> None:
    add_pair(cluster)
    ends = ("10.1.0.0:4000", "10.1.0.1:80")
    cluster.agents.connections = {"pair-0": [ends], "pair-1": [ends[::-1]]}
    killer.after_decision(1)
    target = Target(followed="pair-0")
    identifier = begun(cluster, killer, lambda first: first.create_epoch(asking(), target))
    cluster.agents.fails["PlanDump"] = errors.Unreachable("the node is gone")
    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as second:
        wait_for(lambda: serves(second))
        last = ended(second, identifier)
    assert (last.state, last.error) == (State.SUCCEEDED, None)
    assert last.image is not None
    assert last.image.epoch == cluster.agents.images[0].epoch
