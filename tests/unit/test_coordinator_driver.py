"""The coordinator as it ships, with members in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import pytest

from agent import errors
from agent.coordinator import machine
from agent.coordinator.driver import Answered, Driver, Event, Limits, Report, Settled
from agent.coordinator.machine import Coordination, State
from agent.model.protocol import (
    COURSES,
    LEAVE_RUNNING,
    RESTORE,
    Answer,
    Course,
    Decision,
    Said,
    Step,
    Told,
)
from agent.node.participant import Phase, Processes, Timer
from tests.simulated import TIMERS_S, World

EACH = pytest.mark.parametrize("course", COURSES.values(), ids=lambda each: each.name)


def driven(world: World, course: Course, *, take_over: bool = False, token: int = 1) -> Report:
    made = Coordination(course, len(world.members), token)
    return Driver(made, world, world, Limits()).run(take_over=take_over)


@EACH
def test_an_epoch_without_trouble_is_committed_and_reported(course: Course) -> None:
    world = World(course, 8)
    report = driven(world, course)
    assert report.committed
    assert world.decision is Decision.COMMITTED
    assert (report.cause, report.at, report.silent) == ("", None, ())
    asked = {machine.ASKS[state] for state in report.spans_s if state is not State.COMMITTING}
    assert asked == {*course.before, *course.after}
    assert report.late == {}
    assert all(each.phase is Phase.CLOSED for each in world.members)


@EACH
@pytest.mark.parametrize("seed", range(5))
def test_messages_that_get_lost_are_sent_again(course: Course, seed: int) -> None:
    world = World(course, 4, seed=seed, lose=0.2)
    report = driven(world, course)
    world.run_on(120.0)
    assert all(each.phase is Phase.CLOSED for each in world.members)
    assert report.committed == (world.decision is Decision.COMMITTED)
    ended = [each.processes is Processes.ENDED for each in world.members]
    assert not any(ended) or report.committed
    if course is RESTORE:
        wanted = Processes.RUNNING if report.committed else Processes.ABSENT
        assert {each.processes for each in world.members} == {wanted}


def test_a_member_that_vanishes_costs_the_others_a_step_at_most() -> None:
    world = World(LEAVE_RUNNING, 3)
    world.unreachable.add(1)
    report = driven(world, LEAVE_RUNNING)
    assert not report.committed
    assert report.cause == "the deadline passed while preparing"
    assert report.silent == (1,)
    assert world.longest_stop_s == 0.0


def test_members_whose_coordinator_vanished_run_again_by_themselves() -> None:
    world = World(LEAVE_RUNNING, 3, spend_s=lambda step: 30.0 if step is Step.CAPTURE else 0.01)
    made = Coordination(LEAVE_RUNNING, 3, token=1)

    class Died(Exception):
        pass

    def die(state: State) -> None:
        if state is State.CAPTURING:
            raise Died

    with pytest.raises(Died):
        Driver(made, world, world, Limits(), die).run()
    world.run_on(TIMERS_S[Timer.SILENCE] + 1.0)
    assert not any(each.stopped for each in world.members)
    assert world.longest_stop_s < TIMERS_S[Timer.SILENCE] + 1.0
    report = driven(world, LEAVE_RUNNING, take_over=True, token=2)
    assert not report.committed
    assert world.decision is Decision.ABANDONED


def test_a_coordinator_that_lives_keeps_members_from_giving_up_a_long_capture() -> None:
    long_s = 6 * TIMERS_S[Timer.SILENCE]
    world = World(LEAVE_RUNNING, 3, spend_s=lambda step: long_s if step is Step.CAPTURE else 0.01)
    assert driven(world, LEAVE_RUNNING).committed


class Script:
    """Members that answer at once: ``problems`` says to what with which problem."""

    def __init__(self, problems: dict[tuple[int, Step], str]) -> None:
        self._problems = problems
        self._events: deque[Event] = deque()

    def now_s(self) -> float:
        return 0.0

    def next(self, until_s: float) -> Event | None:
        return self._events.popleft()

    def tell(self, member: int, told: Told) -> None:
        problem = self._problems.get((member, told.step), "")
        error = errors.CriuFailed(problem) if problem else None
        self._events.append(Answered(member, Said(Answer(told.step, problem), error)))

    def decide(self, wish: Decision, parts: Mapping[int, bytes]) -> None:
        self._events.append(Settled(wish))


def restored(problems: dict[tuple[int, Step], str]) -> Report:
    script = Script(problems)
    return Driver(Coordination(RESTORE, 2, 1), script, script, Limits()).run()


def test_who_does_not_run_though_it_is_committed_is_in_the_report() -> None:
    report = restored({(1, Step.RUN): "CRIU died", (1, Step.FINISH): "nothing runs"})
    assert report.committed
    assert {i: type(error) for i, error in report.late.items()} == {1: errors.CriuFailed}


def test_who_runs_in_the_end_is_not() -> None:
    report = restored({(1, Step.RUN): "the store did not answer"})
    assert report.committed
    assert report.late == {}


def test_a_member_that_does_not_come_to_stand_is_blamed() -> None:
    report = restored({(0, Step.STAND): "no room"})
    assert not report.committed
    assert (report.cause, report.at, type(report.error)) == ("no room", 0, errors.CriuFailed)
