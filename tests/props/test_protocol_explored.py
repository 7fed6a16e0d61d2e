"""The protocol of an epoch, explored: every order of messages, losses, repetitions, delays, timers,
failures, crashes and takeovers that a few members and coordinators can meet, through the code that
ships.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import pytest

from agent.coordinator import machine
from agent.coordinator.machine import Input, State
from agent.model import protocol
from agent.model.protocol import (
    COURSES,
    LEAVE_RUNNING,
    LEAVE_RUNNING_HELD,
    RESTORE,
    Course,
    Decision,
    Step,
)
from agent.node.participant import Effect, LetGo, Participant, Phase, Timer
from tests import protocol_world
from tests.protocol_world import World

EACH = pytest.mark.parametrize("course", COURSES.values(), ids=lambda each: each.name)


@dataclasses.dataclass
class Explored:
    """The worlds that were reached: for each those that led to it without a fault."""

    before: dict[Any, list[Any]]
    settled: list[Any]
    outcomes: set[str]

    @property
    def stuck(self) -> int:
        """How many worlds cannot come to an end, though faults stop."""
        reached = set(self.settled)
        waiting = list(reached)
        while waiting:
            for each in self.before[waiting.pop()]:
                if each not in reached:
                    reached.add(each)
                    waiting.append(each)
        return len(self.before) - len(reached)


def explore(start: World, *, crashes: int, coordinators: int) -> Explored:
    """Come to every world there is, and check each."""
    found = Explored({start.key(): []}, [], set())
    waiting = deque([start])
    while waiting:
        world = waiting.popleft()
        protocol_world.check(world)
        here = world.key()
        if protocol_world.settled(world):
            found.settled.append(here)
            found.outcomes.add(world.decision.value if world.decision else "never asked")
        for sound, after in protocol_world.steps(world, crashes=crashes, coordinators=coordinators):
            there = after.key()
            if there not in found.before:
                found.before[there] = []
                waiting.append(after)
            if sound and there != here:
                found.before[there].append(here)
    return found


@EACH
@pytest.mark.parametrize(
    ("members", "crashes", "coordinators"), [(1, 1, 2), (2, 1, 1)], ids=["takeover", "crash"]
)
def test_no_order_of_events_breaks_a_promise_or_ends_nowhere(
    course: Course, members: int, crashes: int, coordinators: int
) -> None:
    start = protocol_world.begin(course, members)
    found = explore(start, crashes=crashes, coordinators=coordinators)
    assert found.outcomes == {"committed", "abandoned", "never asked"}
    assert found.stuck == 0


def test_nor_do_three_members_meet_one() -> None:
    found = explore(protocol_world.begin(LEAVE_RUNNING, 3), crashes=0, coordinators=1)
    assert "committed" in found.outcomes
    assert found.stuck == 0


# What the exploration is worth: breaches that are planted are found.


def planted(
    monkeypatch: pytest.MonkeyPatch,
    key: tuple[State, Input],
    there: State | None,
    course: Course = LEAVE_RUNNING,
) -> None:
    table = dict(machine.TRANSITIONS[course.name])
    if there is None:
        del table[key]
    else:
        table[key] = there
    monkeypatch.setitem(machine.TRANSITIONS, course.name, table)


@pytest.mark.parametrize(
    ("here", "given", "there", "complaint"),
    [
        (State.RESUMING, Input.ALL_ANSWERED, State.COMMITTING, "a member's part is gone"),
        (State.COMMITTING, Input.UNDECIDED, State.ABORTING, "members are told to abort"),
        (State.COMMITTING, Input.EXPIRED, State.FINISHING, "told as committed, and is not"),
        (State.FILLING, Input.ALL_ANSWERED, State.COMMITTING, "committed without a member"),
        (State.STANDING, Input.ALL_ANSWERED, State.RUNNING, "told as committed, and is not"),
        (State.SETTLING, Input.EXPIRED, State.RUNNING, "told as committed, and is not"),
    ],
    ids=[
        *("commit before all is durable", "abort what may be committed", "finish what may not be"),
        *("commit before all stand", "run before the commit", "run what may not be committed"),
    ],
)
def test_a_wrong_transition_is_found(
    monkeypatch: pytest.MonkeyPatch, here: State, given: Input, there: State, complaint: str
) -> None:
    back = here in (State.FILLING, State.STANDING) or there is State.RUNNING
    course = RESTORE if back else LEAVE_RUNNING
    planted(monkeypatch, (here, given), there, course)
    with pytest.raises(AssertionError, match=complaint):
        explore(protocol_world.begin(course, 1), crashes=0, coordinators=1)


def test_a_coordinator_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, (State.SETTLING, Input.ABANDONED), None)
    found = explore(protocol_world.begin(LEAVE_RUNNING, 1), crashes=0, coordinators=1)
    assert found.stuck > 0


@pytest.mark.parametrize(
    ("course", "left_out", "before_it"),
    [
        (LEAVE_RUNNING_HELD, Step.HOLD, State.FREEZING),
        (LEAVE_RUNNING, Step.FREEZE, State.QUIESCING),
    ],
    ids=["some run and nobody holds", "some run"],
)
def test_a_cut_of_members_that_are_not_silent_is_found(
    monkeypatch: pytest.MonkeyPatch, course: Course, left_out: Step, before_it: State
) -> None:
    before = tuple(each for each in course.before if each is not left_out)
    torn = dataclasses.replace(course, before=before)
    monkeypatch.setitem(protocol.COURSES, torn.name, torn)
    planted(monkeypatch, (before_it, Input.ALL_ANSWERED), State.CAPTURING, course)
    with pytest.raises(AssertionError, match="a cut that is torn"):
        explore(protocol_world.begin(torn, 2), crashes=0, coordinators=1)


@EACH
def test_a_member_that_drops_what_may_be_committed_is_found(
    monkeypatch: pytest.MonkeyPatch, course: Course
) -> None:
    monkeypatch.setattr(Participant, "_may_be_committed", lambda self: False)
    with pytest.raises(AssertionError, match="a member's part is gone"):
        explore(protocol_world.begin(course, 1), crashes=0, coordinators=1)


def test_a_member_that_runs_what_it_cannot_know_to_be_committed_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def impatient(self: Participant, timer: Timer) -> list[Effect]:
        if self.phase is not Phase.TAKING_PART or not self._may_be_committed():
            return []
        self.phase = Phase.LETTING_GO
        return [LetGo(committed=True)]

    monkeypatch.setattr(Participant, "expired", impatient)
    with pytest.raises(AssertionError, match="runs without a commit"):
        explore(protocol_world.begin(RESTORE, 1), crashes=0, coordinators=1)


def test_a_member_that_stands_and_believes_that_all_is_over_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def believing(self: Participant) -> list[Effect]:
        if self.phase is Phase.TAKING_PART and self._may_be_committed():
            return self._close(Decision.COMMITTED)
        return []

    monkeypatch.setattr(Participant, "_finish", believing)
    found = explore(protocol_world.begin(RESTORE, 1), crashes=0, coordinators=1)
    assert found.stuck > 0


def test_a_member_that_waits_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignored(self: Participant, timer: Timer) -> list[Effect]:
        return []

    monkeypatch.setattr(Participant, "expired", ignored)
    with pytest.raises(AssertionError, match="stands still for ever"):
        explore(protocol_world.begin(LEAVE_RUNNING, 1), crashes=0, coordinators=1)
