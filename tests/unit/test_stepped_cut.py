"""A cut that goes on step by step, with threads in place of an engine's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from agent import errors
from agent.engines.base import Disposition
from agent.host import clock
from agent.node import steppedcut
from agent.node.steppedcut import Stage, SteppedCut

LONG_S = 30.0


def long() -> clock.Deadline:
    return clock.Deadline.after(LONG_S)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def engine(cut: SteppedCut) -> Disposition:
    cut.ready()
    while not cut.poised(0.01):
        pass  # it copies what was written meanwhile
    cut.frozen()
    cut.held()
    disposition = cut.captured()
    if disposition is Disposition.RESUME:
        cut.released()
    cut.running()
    return disposition


def begun(pool: ThreadPoolExecutor, cut: SteppedCut) -> list[Future[Disposition]]:
    return [pool.submit(engine, cut) for _ in range(2)]


def test_members_pass_a_stage_together_and_only_when_they_may(pool: ThreadPoolExecutor) -> None:
    cut = SteppedCut(2)
    members = begun(pool, cut)
    for stage in Stage:
        cut.reach(stage, long())
    assert [each.result(10) for each in members] == [Disposition.RESUME] * 2


def test_who_runs_first_stores_nothing_before_the_others_run(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steppedcut, "_OTHERS_S", LONG_S)
    cut = SteppedCut(2)
    members = begun(pool, cut)
    for stage in Stage:
        cut.reach(stage, long())
    assert not any(each.done() for each in members)
    cut.store()
    assert [each.result(10) for each in members] == [Disposition.RESUME] * 2


def test_but_waits_for_nobody_who_never_comes(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steppedcut, "_OTHERS_S", 0.05)
    cut = SteppedCut(2)
    members = begun(pool, cut)
    for stage in Stage:
        cut.reach(stage, long())
    assert [each.result(10) for each in members] == [Disposition.RESUME] * 2


def test_they_are_ended_where_they_were_read_if_that_is_wanted(pool: ThreadPoolExecutor) -> None:
    cut = SteppedCut(2)
    members = begun(pool, cut)
    for stage in (Stage.READY, Stage.POISED, Stage.FROZEN, Stage.HELD, Stage.CAPTURED):
        cut.reach(stage, long())
    cut.end(long())
    assert [each.result(10) for each in members] == [Disposition.KILL] * 2


@pytest.mark.parametrize("at", [Stage.READY, Stage.POISED, Stage.HELD, Stage.CAPTURED])
def test_giving_up_lets_all_go_wherever_they_stand(pool: ThreadPoolExecutor, at: Stage) -> None:
    cut = SteppedCut(2)
    members = begun(pool, cut)
    for stage in Stage:
        if stage <= at:
            cut.reach(stage, long())
    cut.check()
    cut.give_up()
    for each in members:
        assert isinstance(each.exception(10), errors.DumpFailed)
    with pytest.raises(errors.DumpFailed, match="given up"):
        cut.check()


def test_a_member_that_waits_to_be_frozen_copies_on_and_counts_once(
    pool: ThreadPoolExecutor,
) -> None:
    cut = SteppedCut(2)
    asked = []

    def waits() -> bool:
        cut.ready()
        asked.append(cut.poised(0.01))
        asked.append(cut.poised(0.01))
        return cut.poised(LONG_S)

    waiting = pool.submit(waits)
    with pytest.raises(errors.DeadlineExceeded):
        cut.reach(Stage.POISED, clock.Deadline.after(0.2))  # the other one is missing
    assert clock.wait_until(lambda: len(asked) == 2, long())
    assert asked == [False, False]
    other = pool.submit(engine, cut)
    cut.reach(Stage.POISED, long())
    cut.give_up()
    assert isinstance(waiting.exception(10), errors.DumpFailed)
    assert isinstance(other.exception(10), errors.DumpFailed)


def test_a_member_that_fails_is_told_to_whoever_waits(pool: ThreadPoolExecutor) -> None:
    cut = SteppedCut(2)
    member = pool.submit(engine, cut)
    failing = threading.Timer(0.05, cut.fail, [errors.CriuMissing("no CRIU")])
    failing.start()
    with pytest.raises(errors.CriuMissing):
        cut.reach(Stage.READY, long())
    assert isinstance(member.exception(10), errors.DumpFailed)


def test_who_does_not_come_in_time_is_not_waited_for(pool: ThreadPoolExecutor) -> None:
    cut = SteppedCut(2)
    member = pool.submit(engine, cut)
    with pytest.raises(errors.DeadlineExceeded, match="frozen in time"):
        cut.reach(Stage.FROZEN, clock.Deadline.after(0.05))
    cut.give_up()
    assert isinstance(member.exception(10), errors.DumpFailed)
