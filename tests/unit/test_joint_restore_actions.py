"""What a pod with two containers does in the restore of a group, with an engine that makes trees
of words only: both run, or neither does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from agent import errors
from agent.engines.base import Gate, RestoreOptions
from agent.host import clock
from agent.model import ids, pods
from agent.model.protocol import RESTORE, Decision, Step
from agent.model.streams import MemberSource
from agent.node.attempts import Attempt
from agent.node.dump import Cancel
from agent.node.jointrestore import JointRestore, Order
from agent.node.pods import Pods
from agent.node.podwork import PodWork
from agent.node.storages import Found
from agent.store.repository import Store
from agent.volumes.memory import MemoryVolume
from tests import images

GROUP = ids.group_name("jobset.train")
ALLOWED_S = 20.0


class Tree:
    """Runs until it is killed."""

    pid = 7

    def __init__(self, said: list[str], name: str) -> None:
        self._said, self._name = said, name

    def kill(self) -> None:
        self._said.append(f"{self._name} killed")


class Engine:
    """Says what it does; a member fails at its place in ``broken``."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.broken: dict[str, str] = {}

    def check_restore(self, source: MemberSource, options: RestoreOptions) -> None:
        if self.broken.get(source.facts()["name"]) == "check":
            raise errors.RestoreConflict("no room", reasons=["no room"])

    def restore(self, source: MemberSource, options: RestoreOptions, gate: Gate) -> Tree:
        name = source.facts()["name"]
        try:
            for place in ("filled", "restored", "released"):
                self._come_to(place, name)
                getattr(gate, place)()
            self._come_to("running", name)
        except BaseException:
            self.said.append(f"{name} undone")
            raise
        self.said.append(f"{name} runs")
        return Tree(self.said, name)

    def _come_to(self, place: str, name: str) -> None:
        if self.broken.get(name) == place:
            raise errors.CriuFailed(f"{name} is broken")


class Around:
    """The pod and what is told of it; nothing of a cluster is there."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.events: list[str] = []
        self.taking = False

    def holding(self, *given: Any) -> tuple[pods.Pod, list[Any]]:
        return pods.read({"metadata": {"name": "w-0", "namespace": "team-a", "uid": "u"}}), []

    @contextlib.contextmanager
    def taking_part(self, *given: Any) -> Iterator[None]:
        self.taking = True
        try:
            yield
        finally:
            self.taking = False

    def engine_for_restore(self, *given: Any) -> Engine:
        return self._engine

    def tell(self, pod: pods.Pod, reason: str, note: str) -> None:
        self.events.append(reason)

    def tell_restored(self, *given: Any, leads: bool) -> None:
        self.events.append("post hooks")


@dataclasses.dataclass
class Pod:
    """A pod's actions, and what is around them."""

    actions: JointRestore
    engine: Engine
    around: Around
    attempt: Attempt
    volume: MemoryVolume
    done: int = 0

    def until(self, last: Step) -> None:
        """Every step that was not done yet, up to this one."""
        steps = (*RESTORE.before, *RESTORE.after)
        for step in steps[self.done : steps.index(last) + 1]:
            self.done += 1
            if step is Step.RELEASE:
                self.attempt.commit(["u"], again=False)
            self.actions.do(step)


@pytest.fixture
def pod() -> Iterator[Pod]:
    volume = MemoryVolume()
    store = Store.open(volume, create=True)
    with store.begin(GROUP, now_s=images.NOW_S) as writer:
        for name in ("main", "side"):
            sink = writer.member(ids.member_name(f"w-0-0.{name}"))
            sink.facts({"name": name})
        other = writer.member(ids.member_name("w-0-1.main"))
        other.facts({"name": "of another pod"})
        epoch = writer.commit({}).epoch
    engine = Engine()
    around = Around(engine)
    # Whoever commits has words of its own with the store.
    attempt = Attempt(volume, GROUP, epoch, "1" * 16)
    order = Order(
        namespace=ids.namespace_name("team-a"),
        pod="w-0",
        pod_uid="u",
        member="w-0-0",
        leads=False,
        again=False,
        options=RestoreOptions(deadline_s=ALLOWED_S),
    )
    actions = JointRestore(
        Found("default", store, GROUP, epoch),
        Attempt(volume, GROUP, epoch, "1" * 16),
        order,
        cast("Pods", around),
        cast("PodWork", around),
        Cancel(),
    )
    yield Pod(actions, engine, around, attempt, volume)
    actions.let_go(committed=False)
    actions.close(Decision.ABANDONED)
    for each in threading.enumerate():
        if each.name == "post hooks":
            each.join(10)
    assert not around.taking


def test_both_containers_run_when_it_is_committed_and_none_of_another_pod(pod: Pod) -> None:
    pod.until(Step.STAND)
    assert pod.engine.said == []
    pod.until(Step.RUN)
    assert sorted(pod.engine.said) == ["main runs", "side runs"]
    assert pod.around.events[0] == "RestoreCompleted"
    pod.actions.close(Decision.COMMITTED)


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("check", Step.PREPARE),
        ("filled", Step.FILL),
        ("restored", Step.STAND),
        ("released", Step.RELEASE),
        ("running", Step.RUN),
    ],
)
def test_where_one_container_fails_the_other_does_not_go_on(
    pod: Pod, place: str, step: Step
) -> None:
    pod.engine.broken["side"] = place
    with pytest.raises((errors.CriuFailed, errors.RestoreConflict)):
        pod.until(step)
    committed = step in RESTORE.after
    assert pod.actions.let_go(committed=committed) is False
    ran = "main runs" in pod.engine.said
    assert ("main killed" in pod.engine.said) == ran
    assert pod.around.events.count("RestoreFailed") == 1


def test_what_stands_and_turns_out_to_be_committed_runs(pod: Pod) -> None:
    pod.until(Step.STAND)
    assert pod.actions.let_go(committed=True) is True
    assert sorted(pod.engine.said) == ["main runs", "side runs"]


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order's time is over."""
    now_s = clock.monotonic_s
    monkeypatch.setattr(clock, "monotonic_s", lambda: now_s() + ALLOWED_S + 1)


def test_what_stands_and_is_committed_runs_also_when_the_orders_time_is_over(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod.until(Step.STAND)
    later(monkeypatch)
    assert pod.actions.let_go(committed=True) is True
    assert sorted(pod.engine.said) == ["main runs", "side runs"]


def test_what_is_committed_is_released_and_runs_also_when_the_orders_time_is_over(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod.until(Step.STAND)
    later(monkeypatch)
    pod.attempt.commit(["u"], again=False)
    pod.actions.do(Step.RELEASE)
    pod.actions.do(Step.RUN)
    assert sorted(pod.engine.said) == ["main runs", "side runs"]


def test_what_was_found_committed_stays_so_when_its_image_is_deleted(pod: Pod) -> None:
    pod.until(Step.RELEASE)
    for each in list(pod.volume.list("restoring/")):
        pod.volume.delete(each.name)
    pod.actions.do(Step.RUN)
    assert pod.actions.settle() is Decision.COMMITTED
    assert sorted(pod.engine.said) == ["main runs", "side runs"]


def test_what_stands_is_undone_if_it_is_not(pod: Pod) -> None:
    pod.until(Step.STAND)
    assert pod.actions.let_go(committed=False) is False
    assert sorted(pod.engine.said) == ["main undone", "side undone"]


def test_nothing_goes_on_after_it_was_given_up(pod: Pod) -> None:
    pod.until(Step.PREPARE)
    pod.actions.let_go(committed=False)
    with pytest.raises(errors.RestoreFailed, match="given up"):
        pod.actions.do(Step.FILL)
    assert pod.engine.said == []
    assert pod.actions.settle() is Decision.ABANDONED
