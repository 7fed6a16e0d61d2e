"""A checkpoint of several pods as its coordinator sees it: who asks at the same time, and who falls
silent. The agents are simulated; the coordinator is the one that ships.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import errors
from agent.cluster.session import Session
from agent.coordinator import checkpoint, links
from agent.coordinator.checkpoint import Member
from agent.model.protocol import COURSES, Answer, Course, Decision, Said, Step, Told
from agent.rpc import client, epochclient
from agent.settings import Settings
from tests.fakes.authority import Authority

MEMBERS = tuple(
    Member(f"w-0-{number}", f"pod-{number}", f"uid-{number}", "n", (f"10.1.0.{number}",))
    for number in (0, 1)
)


class Agents:
    """Agents that do each step in no time, each pod for one epoch; nobody is prepared before
    somebody else was ``refused``.
    """

    def __init__(self) -> None:
        self.taken: dict[str, str] = {}
        self.committed: list[str] = []
        self.refused = threading.Event()
        self.silent_s: dict[Step, float | None] = {}
        # What the second pod says to a step, for each time that it is asked.
        self.says: dict[Step, list[errors.CkptError]] = {}
        self.within: list[tuple[str, ...]] = []
        self.courses: list[str] = []
        self._begun = 0
        self._lock = threading.Lock()
        self.epochs = self

    def new(self, namespace: str, group: str, storage: str) -> epochclient.Epoch:
        with self._lock:
            self._begun += 1
            name = f"20260131-235959-{self._begun:06x}"
        return epochclient.Epoch(namespace, group, name, storage)

    def take_part(
        self,
        epoch: epochclient.Epoch,
        course: Course,
        pod: epochclient.Pod,
        told: Told,
        wait_s: float,
        deadline_s: float,
        *,
        silent_s: float | None = None,
    ) -> Said | None:
        del deadline_s
        with self._lock:
            if pod.name == "pod-0" and told.step is Step.PREPARE:
                self.courses.append(course.name)
            self.silent_s[told.step] = silent_s
            holder = self.taken.setdefault(pod.uid, epoch.name)
            if holder != epoch.name and told.step is Step.PREPARE:
                raise errors.TargetBusy(f"{pod.name} is taken for {holder}")
            if holder == epoch.name and told.step in (Step.ABORT, Step.FINISH):
                del self.taken[pod.uid]
            if pod.name == "pod-1" and told.step is Step.PREPARE:
                self.within.append(pod.within)
            if pod.name == "pod-1" and self.says.get(told.step):
                error = self.says[told.step].pop(0)
                return Said(Answer(told.step, error.message), error)
        if told.step is Step.PREPARE and not self.refused.wait(wait_s):
            return None
        return Said(Answer(told.step), None, b"part" if told.step is Step.PERSIST else b"")

    def decide(
        self,
        epoch: epochclient.Epoch,
        wish: Decision,
        contributions: Sequence[bytes],
        facts: Mapping[str, Any],
    ) -> epochclient.Decided:
        del contributions, facts
        if wish is Decision.COMMITTED:
            self.committed.append(epoch.name)
        return epochclient.Decided(wish, cast("Any", object()), 0, (), ())


def dump(agents: Agents, course: str = "leave-running", **more: Any) -> checkpoint.Checkpoint:
    session = SimpleNamespace(
        namespace="default",
        settings=Settings(),
        agent_of=lambda node: agents,
        any_agent=lambda ask: ask(agents),
    )
    return checkpoint.run(
        cast("Session", session),
        "jobset.train",
        MEMBERS,
        COURSES[course],
        facts={},
        now_s=1e9,
        **more,
    )


def test_of_two_that_are_asked_for_at_once_one_gets_all_pods_and_the_other_hears_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(links, "PATIENCE_S", 0.1)
    for _ in range(10):
        agents = Agents()
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(dump, agents) for _ in range(2)]
            for each in asked:
                each.add_done_callback(lambda done, agents=agents: agents.refused.set())  # type: ignore[misc]
        failed = [each.exception() for each in asked if each.exception()]
        assert len(agents.committed) == 1
        assert [type(each) for each in failed] == [errors.TargetBusy]
        assert agents.committed[0] in str(failed[0])
        assert agents.taken == {}


@pytest.mark.parametrize(
    ("course", "first", "last"),
    [
        ("leave-running", Step.FREEZE, Step.RESUME),
        ("leave-running-held", Step.FREEZE, Step.RESUME),
        ("evacuate", Step.FREEZE, Step.END),
    ],
)
def test_an_agent_must_not_be_silent_for_long_while_the_others_stand_still(
    course: str, first: Step, last: Step
) -> None:
    agents = Agents()
    agents.refused.set()
    dump(agents, course)
    steps = [*COURSES[course].before, *COURSES[course].after]
    standing = steps[steps.index(first) : steps.index(last) + 1]
    bounded = {step for step, silent_s in agents.silent_s.items() if silent_s is not None}
    assert bounded == set(standing)


def test_one_that_is_silent_cannot_be_reached() -> None:
    """It may be stopped, or hang: its port still takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as hung:
        address = f"127.0.0.1:{hung.getsockname()[1]}"
        credentials = client.Credentials(Authority("ckpt-agent").pem, "agent", lambda: "token")
        with client.connect(address, credentials, peer="the agent on n1") as agent:
            epoch = epochclient.Epoch("default", "jobset.train", "20260131-235959-0a1b2c", "")
            pod = epochclient.Pod("w-0-0", "pod-0", "uid-0")
            told = Told(Step.CAPTURE, 1)
            began_s = time.monotonic()
            with pytest.raises(errors.Unreachable, match=r"n1 has not answered for 0\.3 s"):
                agent.epochs.take_part(
                    epoch, COURSES["leave-running"], pod, told, 0.1, 60.0, silent_s=0.2
                )
            assert time.monotonic() - began_s < 30


def unaccepted(times: int) -> dict[Step, list[errors.CkptError]]:
    said = [errors.ConnectionUnaccepted("the connection a -> b was not accepted yet")] * times
    return {Step.CAPTURE: cast("list[errors.CkptError]", said)}


def test_a_connection_that_is_not_accepted_in_the_end_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "_BUSY_AGAIN_S", 0.01)
    agents = Agents()
    agents.refused.set()
    agents.says = unaccepted(2)
    # The post hooks of the first try still run.
    busy: list[errors.CkptError] = [errors.TargetBusy("post hooks run")] * 2
    agents.says[Step.QUIESCE] = []
    named: list[str] = []

    def begin(epoch: epochclient.Epoch) -> None:
        named.append(epoch.name)
        if len(named) == 2:
            agents.says[Step.QUIESCE] = busy

    done = dump(agents, named=begin)
    assert len(named) == 5
    assert agents.committed == named[-1:]
    ours = ("10.1.0.0", "10.1.0.1")
    assert agents.within == [ours, ours, ours, ours, ()]
    assert agents.taken == {}
    # From the request on.
    assert done.durable_s > 2 * checkpoint._UNACCEPTED_WAIT_S[0]


def test_where_a_member_may_run_while_others_are_read_all_hold_first() -> None:
    agents = Agents()
    agents.refused.set()
    agents.says = {Step.PREPARE: [errors.HoldNeeded("pod-1 may run while others are read")]}
    dump(agents)
    assert agents.courses == ["leave-running", "leave-running-held"]
    agents.says = {Step.PREPARE: [errors.HoldNeeded("pod-1 may run while others are read")]}
    with pytest.raises(errors.HoldNeeded, match="w-0-1"):
        dump(agents, "evacuate")


def test_whoever_cannot_leave_it_out_says_so() -> None:
    agents = Agents()
    agents.refused.set()
    agents.says = unaccepted(3)
    with pytest.raises(errors.ConnectionUnaccepted, match="w-0-1"):
        dump(agents)
    assert agents.committed == []


def test_what_was_cancelled_is_not_tried_again() -> None:
    agents = Agents()
    agents.refused.set()
    agents.says = unaccepted(3)
    control = checkpoint.Control()
    named: list[str] = []

    def begin(epoch: epochclient.Epoch) -> None:
        named.append(epoch.name)
        if len(named) == 2:
            control.cancel()

    with pytest.raises(errors.Interrupted):
        dump(agents, control=control, named=begin)
    assert len(named) == 2
    assert agents.committed == []
