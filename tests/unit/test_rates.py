"""How often somebody may ask: any span of any order of calls stays within the rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.model.rates import Buckets, Rate

RATE = Rate(per_s=2.0, burst=3)


def test_a_burst_is_let_through_and_then_the_rate() -> None:
    buckets = Buckets(RATE, 10)
    assert [buckets.take("a", 100.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert buckets.take("a", 100.0) == pytest.approx(0.5)
    assert buckets.take("a", 100.25) == pytest.approx(0.25)
    assert buckets.take("a", 100.5) == 0.0
    assert buckets.take("a", 100.5) > 0.0
    assert buckets.take("b", 100.5) == 0.0


def test_who_is_refused_is_not_kept_away_longer_for_asking() -> None:
    buckets = Buckets(RATE, 10)
    for _ in range(100):
        buckets.take("a", 100.0)
    assert buckets.take("a", 100.5) == 0.0


def test_to_look_takes_nothing() -> None:
    buckets = Buckets(Rate(1.0, 1), 10)
    assert [buckets.wait_s("a", 5.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert len(buckets) == 0
    assert buckets.take("a", 5.0) == 0.0
    assert buckets.wait_s("a", 5.0) == pytest.approx(1.0)


def test_those_for_whom_there_is_no_room_share_a_bucket_until_there_is() -> None:
    buckets = Buckets(RATE, 2)
    assert buckets.take("a", 100.0) == buckets.take("b", 100.0) == 0.0
    assert [buckets.take(key, 100.0) for key in "cde"] == [0.0, 0.0, 0.0]
    assert buckets.take("f", 100.0) > 0.0
    assert buckets.take("a", 100.0) == 0.0, "who is remembered has a bucket of its own"
    # Theirs are full again: both are forgotten.
    assert buckets.take("f", 101.0) == 0.0
    assert len(buckets) == 1


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 2)), max_size=200),
    st.integers(1, 4),
)
def test_nobody_gets_more_than_the_rate_in_any_span(
    asked: list[tuple[str, float]], most: int
) -> None:
    buckets = Buckets(RATE, most)
    now_s, let_in = 50.0, dict[str, list[float]]()
    for key, later_s in asked:
        now_s += later_s
        if buckets.take(key, now_s) == 0.0:
            let_in.setdefault(key, []).append(now_s)
        assert len(buckets) <= most
    for times in let_in.values():
        for first, begin_s in enumerate(times):
            for last in range(first, len(times)):
                span_s = times[last] - begin_s
                # A key may use its own bucket and, while there was no room for it, the others'.
                assert last - first + 1 <= 2 * (RATE.burst + RATE.per_s * span_s + 1e-4)


@given(st.lists(st.floats(0, 2), max_size=100))
def test_alone_it_is_exactly_the_rate(waits: list[float]) -> None:
    buckets, times, now_s = Buckets(RATE, 1), list[float](), 50.0
    for later_s in waits:
        now_s += later_s
        if buckets.take("a", now_s) == 0.0:
            times.append(now_s)
    for first, begin_s in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= RATE.burst + RATE.per_s * (times[last] - begin_s) + 1e-6


@given(st.floats(0.01, 100), st.integers(1, 50), st.integers(0, 100))
def test_who_waits_as_told_is_let_in(per_s: float, burst: int, calls: int) -> None:
    buckets, now_s = Buckets(Rate(per_s, burst), 1), 1000.0
    for _ in range(calls):
        now_s += buckets.take("a", now_s)
    wait_s = buckets.wait_s("a", now_s)
    assert buckets.take("a", now_s + wait_s) == 0.0


@pytest.mark.parametrize(("per_s", "burst"), [(0.0, 5), (-1.0, 5), (1.0, 0)])
def test_a_rate_that_lets_nothing_through_is_refused(per_s: float, burst: int) -> None:
    with pytest.raises(errors.InvalidInput, match="lets nothing through"):
        Rate(per_s, burst)
