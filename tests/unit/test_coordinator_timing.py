"""When members did what, of clocks that begin anywhere and messages that take their time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.coordinator.timing import Timing
from agent.model.protocol import Answer, Said, Step, Times

DELAYS = st.floats(0.0, 0.05)
# Exact in binary, so that what is compared is not what was rounded.
AHEAD = st.integers(-(2**20), 2**20).map(float)


def tell(
    timing: Timing, node: str, ahead_s: float, sent_s: float, out_s: float, done_s: float, s: float
) -> None:
    """The member of ``node`` hears ``out_s`` after it was told, is done at ``done_s`` of our clock,
    and its answer takes ``s``.
    """
    times = Times(
        sent_s + out_s + ahead_s, done_s + ahead_s, sent_s + out_s + ahead_s, done_s + ahead_s
    )
    said = Said(Answer(Step.FREEZE), times=times)
    timing.heard(node, f"of {node}", said, sent_s, done_s + s)


MEMBERS = st.lists(st.tuples(AHEAD, DELAYS, DELAYS, DELAYS), min_size=2, max_size=4)


@given(MEMBERS)
def test_the_skew_that_is_told_is_never_less_than_it_was(
    members: list[tuple[float, float, float, float]],
) -> None:
    timing, done = Timing(), []
    for number, (ahead_s, out_s, work_s, back_s) in enumerate(members):
        done.append(100.0 + out_s + work_s)
        tell(timing, f"n{number}", ahead_s, 100.0, out_s, done[-1], back_s)
    told = timing.skew_s(Step.FREEZE, [f"of n{number}" for number in range(len(members))])
    assert told is not None
    longest_s = max(out_s + back_s for _, out_s, _, back_s in members)
    assert max(done) - min(done) - 1e-6 <= told <= max(done) - min(done) + 2 * longest_s + 1e-6


@given(MEMBERS)
def test_nor_is_the_time_that_all_stood_in(
    members: list[tuple[float, float, float, float]],
) -> None:
    timing, began, done = Timing(), [], []
    for number, (ahead_s, out_s, work_s, back_s) in enumerate(members):
        began.append(100.0 + out_s)
        done.append(100.0 + out_s + work_s)
        tell(timing, f"n{number}", ahead_s, 100.0, out_s, done[-1], back_s)
    told = timing.stood_s(
        Step.FREEZE, Step.FREEZE, [f"of n{number}" for number in range(len(members))]
    )
    assert told is not None
    longest_s = max(out_s + back_s for _, out_s, _, back_s in members)
    stood_s = max(done) - min(began)
    assert stood_s - 1e-6 <= told <= stood_s + 2 * longest_s + 1e-6


def test_a_quick_exchange_narrows_what_a_slow_one_leaves_open() -> None:
    timing = Timing()
    for node, ahead_s in (("a", 5000.0), ("b", -7.0)):
        quick = Times(10.0 + ahead_s, 10.0 + ahead_s)
        timing.heard(node, f"of {node}", Said(Answer(Step.PREPARE), times=quick), 9.999, 10.001)
        tell(timing, node, ahead_s, 100.0, 0.25, 100.5, 0.25)
    told = timing.skew_s(Step.FREEZE, ["of a", "of b"])
    assert told is not None
    assert told < 0.005


def test_members_of_one_node_have_one_clock() -> None:
    timing = Timing()
    for member, done_s in (("x", 7.25), ("y", 7.5)):
        said = Said(Answer(Step.FREEZE), times=Times(7.0, 8.0, 7.0, done_s))
        timing.heard("n", member, said, 0.0, 9.0)
    assert timing.skew_s(Step.FREEZE, ["x", "y"]) == 0.25
    assert timing.longest_s([Step.FREEZE], ["x", "y"]) == 0.5
    assert timing.stood_s(Step.FREEZE, Step.FREEZE, ["x", "y"]) == 0.5


def test_what_not_all_tell_is_told_of_none() -> None:
    timing = Timing()
    timing.heard("n", "x", Said(Answer(Step.FREEZE), times=Times(1.0, 2.0, 1.0, 1.5)), 0.0, 3.0)
    timing.heard("n", "y", Said(Answer(Step.FREEZE)), 0.0, 3.0)
    assert timing.skew_s(Step.FREEZE, ["x", "y"]) is None
    assert timing.longest_s([Step.FREEZE], ["x", "y"]) is None
    assert timing.stood_s(Step.FREEZE, Step.FREEZE, ["x", "y"]) is None
    assert timing.skew_s(Step.FREEZE, ["x"]) == 0.0


def test_a_clock_that_jumped_tells_no_skew() -> None:
    timing = Timing()
    for node, jump_s in (("a", 0.0), ("b", 30.0)):
        for at_s, ahead_s in ((10.0, 0.0), (11.0, jump_s)):
            tell(timing, node, ahead_s, at_s, 0.001, at_s + 0.002, 0.001)
    assert timing.skew_s(Step.FREEZE, ["of a", "of b"]) is None
    assert timing.stood_s(Step.FREEZE, Step.FREEZE, ["of a", "of b"]) is None
