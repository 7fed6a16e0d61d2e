"""Which epochs are kept, and which pages of old packs are used again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.store import copyforward
from agent.store.retention import Retention, expired


@dataclasses.dataclass(frozen=True)
class Epoch:
    created_s: float
    damage: str | None = None


HOURLY = [Epoch(3600.0 * hour) for hour in range(10)]
NOW_S = 3600.0 * 9


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        (Retention(keep_last=3), 7),
        (Retention(keep_last=10), 0),
        (Retention(keep_last=100), 0),
        (Retention(keep_last=0), 9),
        (Retention(keep_within_s=7200.0), 7),
        (Retention(keep_within_s=7199.0), 8),
        (Retention(keep_within_s=0.0), 9),
        (Retention(keep_last=5, keep_within_s=7200.0), 5),
        (Retention(keep_last=2, keep_within_s=7200.0), 7),
    ],
)
def test_an_epoch_stays_if_either_rule_keeps_it(keep: Retention, gone: int) -> None:
    assert expired(HOURLY, keep, NOW_S) == HOURLY[:gone]


def test_the_newest_good_epoch_stays_however_old() -> None:
    epochs = [Epoch(0.0), Epoch(1.0), Epoch(0.0, "damaged"), Epoch(0.0, "damaged")]
    assert expired(epochs, Retention(keep_within_s=1.0), 1e9) == epochs[:1]
    assert expired([], Retention(keep_last=1), 1e9) == []


def test_some_rule_is_needed() -> None:
    for rules in ({}, {"keep_last": -1}, {"keep_within_s": -1.0}):
        with pytest.raises(errors.InvalidInput):
            Retention(**rules)


@given(
    st.lists(st.tuples(st.integers(0, 100), st.booleans()), max_size=20),
    st.integers(0, 5),
    st.integers(0, 100),
)
def test_more_is_never_kept_by_asking_for_less(
    ages: list[tuple[int, bool]], last: int, within_s: int
) -> None:
    epochs = [Epoch(float(made_s), "damaged" if bad else None) for made_s, bad in ages]
    less = expired(epochs, Retention(keep_last=last, keep_within_s=float(within_s)), 100.0)
    more = expired(epochs, Retention(keep_last=last + 1, keep_within_s=within_s + 1.0), 100.0)
    assert all(any(gone is other for other in less) for gone in more)
    assert all(gone.damage is None for gone in less)
    good = [epoch for epoch in epochs if epoch.damage is None]
    assert not good or not any(gone is good[-1] for gone in less)


def test_a_pack_that_is_hardly_used_is_not_built_on() -> None:
    blocks = np.array([100, 100, 50])
    used = np.zeros(250, dtype=bool)
    used[:62] = True
    assert not copyforward.reusable_pages(used, blocks).any()
    used[62] = True
    assert copyforward.reusable_pages(used, blocks).any()


def test_a_block_that_is_hardly_used_is_not_built_on() -> None:
    blocks = np.array([100, 100, 50])
    used = np.zeros(250, dtype=bool)
    used[:100] = True
    used[100:124] = True
    used[200:213] = True
    reusable = copyforward.reusable_pages(used, blocks)
    # The whole block, used or not: what is there anyway may be used again.
    assert reusable.tolist() == [True] * 100 + [False] * 100 + [True] * 50
