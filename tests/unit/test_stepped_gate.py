"""A restore that goes on step by step, with threads in place of an engine's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from agent import errors
from agent.host import clock
from agent.node.steppedgate import Stage, SteppedGate

LONG_S = 30.0


def long() -> clock.Deadline:
    return clock.Deadline.after(LONG_S)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def engine(gate: SteppedGate, told: list[str]) -> None:
    gate.filled()
    told.append("made")
    gate.restored()
    told.append("hears")
    gate.released()
    told.append("runs")
    gate.running()


def begun(pool: ThreadPoolExecutor, gate: SteppedGate, told: list[str]) -> list[Future[None]]:
    return [pool.submit(engine, gate, told) for _ in range(2)]


def test_members_stand_and_run_together_and_only_when_they_may(pool: ThreadPoolExecutor) -> None:
    gate, told = SteppedGate(2), list[str]()
    members = begun(pool, gate, told)
    gate.reach(Stage.FILLED, long())
    assert told == []
    gate.reach(Stage.RESTORED, long())
    assert told == ["made"] * 2
    gate.reach(Stage.RELEASED, long())
    assert told == ["made"] * 2 + ["hears"] * 2
    gate.reach(Stage.RUNNING, long())
    assert told == ["made"] * 2 + ["hears"] * 2 + ["runs"] * 2
    for each in members:
        each.result(10)


@pytest.mark.parametrize("at", [Stage.FILLED, Stage.RESTORED, Stage.RELEASED])
def test_giving_up_lets_none_run_wherever_they_stand(pool: ThreadPoolExecutor, at: Stage) -> None:
    gate, told = SteppedGate(2), list[str]()
    members = begun(pool, gate, told)
    for stage in Stage:
        if stage <= at:
            gate.reach(stage, long())
    gate.give_up()
    for each in members:
        assert isinstance(each.exception(10), errors.RestoreFailed)
    assert "runs" not in told


def test_a_member_that_fails_keeps_the_others_from_running(pool: ThreadPoolExecutor) -> None:
    gate, told = SteppedGate(2), list[str]()
    member = pool.submit(engine, gate, told)
    gate.fail(errors.CriuFailed("CRIU died"))
    with pytest.raises(errors.CriuFailed):
        gate.reach(Stage.FILLED, long())
    assert isinstance(member.exception(10), errors.RestoreFailed)
    assert told == []
