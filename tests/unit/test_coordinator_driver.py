"""The coordinator as it ships, with members in virtual time."""

from __future__ import annotations

import pytest

from agent.coordinator.driver import Driver, Limits, Report
from agent.coordinator.machine import Coordination, State
from agent.model.protocol import EVACUATE, LEAVE_RUNNING, Course, Decision, Step
from agent.node.participant import Phase, Processes, Timer
from tests.simulated import TIMERS_S, World

BOTH = pytest.mark.parametrize("course", [LEAVE_RUNNING, EVACUATE], ids=lambda each: each.name)


def driven(world: World, course: Course, *, take_over: bool = False, token: int = 1) -> Report:
    made = Coordination(course, len(world.members), token)
    return Driver(made, world, world, Limits()).run(take_over=take_over)


@BOTH
def test_an_epoch_without_trouble_is_committed_and_reported(course: Course) -> None:
    world = World(course, 8)
    report = driven(world, course)
    assert report.committed
    assert world.decision is Decision.COMMITTED
    assert (report.cause, report.at, report.silent) == ("", None, ())
    assert set(report.spans_s) >= {State.FREEZING, State.CAPTURING, State.COMMITTING}
    assert all(each.phase is Phase.CLOSED for each in world.members)


@BOTH
@pytest.mark.parametrize("seed", range(5))
def test_messages_that_get_lost_are_sent_again(course: Course, seed: int) -> None:
    world = World(course, 4, seed=seed, lose=0.2)
    report = driven(world, course)
    world.run_on(120.0)
    assert all(each.phase is Phase.CLOSED for each in world.members)
    assert report.committed == (world.decision is Decision.COMMITTED)
    ended = [each.processes is Processes.ENDED for each in world.members]
    assert not any(ended) or report.committed


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
