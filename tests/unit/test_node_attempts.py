"""Of attempts to restore one image at the same time at most one is committed, and all agree."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.protocol import Decision
from agent.node import attempts
from agent.node.attempts import Attempt
from agent.volumes.base import Volume
from agent.volumes.memory import MemoryVolume

GROUP, EPOCH = ids.group_name("jobset.train"), ids.epoch_id("20260131-235959-0a1b2c")
ONE, TWO = "1" * 16, "2" * 16


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume()


def attempt(volume: Volume, name: str = ONE) -> Attempt:
    return Attempt(volume, GROUP, EPOCH, name)


def holders(volume: Volume) -> list[str]:
    return attempts.holders(volume, GROUP, EPOCH)


def test_an_attempt_is_decided_once_and_told_alike_to_all(volume: MemoryVolume) -> None:
    attempt(volume).begin(again=False)
    assert attempt(volume).decision() is None
    for _ in range(2):
        assert attempt(volume).commit(["b", "a"], again=False) is Decision.COMMITTED
        assert attempt(volume).abandon() is Decision.COMMITTED
    assert attempt(volume).decision() is Decision.COMMITTED
    assert holders(volume) == ["a", "b"]


def test_one_that_was_abandoned_is_never_committed(volume: MemoryVolume) -> None:
    assert attempt(volume).abandon() is Decision.ABANDONED
    assert attempt(volume).commit(["a"], again=False) is Decision.ABANDONED
    assert holders(volume) == []
    assert attempt(volume, TWO).commit(["b"], again=False) is Decision.COMMITTED


def test_an_image_is_restored_once_unless_it_is_wanted_again(volume: MemoryVolume) -> None:
    attempt(volume).commit(["a"], again=False)
    with pytest.raises(errors.RestoreConflict, match="already restored"):
        attempt(volume, TWO).begin(again=False)
    with pytest.raises(errors.RestoreConflict, match="already restored"):
        attempt(volume, TWO).commit(["b"], again=False)
    assert attempt(volume, TWO).decision() is None
    assert attempt(volume, TWO).commit(["b"], again=True) is Decision.COMMITTED
    assert holders(volume) == ["b"]


def test_with_the_image_its_attempts_go_and_an_hour_later_what_was_decided(
    volume: MemoryVolume,
) -> None:
    attempt(volume).commit(["a"], again=False)
    attempt(volume, TWO).abandon()
    other = ids.epoch_id("20260131-235959-0a1b2d")
    Attempt(volume, GROUP, other, ONE).begin(again=False)
    kept = [(GROUP, other)]
    attempts.forget(volume, [(GROUP, EPOCH)], kept, now_s=clock.wall_s())
    assert attempt(volume).abandon() is Decision.COMMITTED
    attempts.forget(volume, [], kept, now_s=clock.wall_s() + 3000)
    assert attempt(volume).abandon() is Decision.COMMITTED
    attempts.forget(volume, [], kept, now_s=clock.wall_s() + 4000)
    assert [each.name for each in volume.list()] == [f"restoring/{GROUP}/{other}/{ONE}.begun"]


def test_what_is_undecided_when_the_image_is_deleted_is_never_committed(
    volume: MemoryVolume,
) -> None:
    attempt(volume).begin(again=False)
    attempts.forget(volume, [(GROUP, EPOCH)], [], now_s=clock.wall_s())
    assert attempt(volume).commit(["a"], again=False) is Decision.ABANDONED


def test_an_attempt_on_an_image_newer_than_the_list_of_images_is_left_alone(
    volume: MemoryVolume,
) -> None:
    attempt(volume).begin(again=False)
    attempts.forget(volume, [], [], now_s=clock.wall_s())
    assert attempt(volume).commit(["a"], again=False) is Decision.COMMITTED


def test_a_damaged_decision_is_none(volume: MemoryVolume) -> None:
    volume.put(f"restoring/{GROUP}/{EPOCH}/{ONE}.decided", b"{}")
    with pytest.raises(errors.Corrupt):
        attempt(volume).abandon()


@pytest.mark.parametrize("name", ["", "1" * 15, "../../../../../x", "A" * 16])
def test_no_other_name_can_be_meant(volume: MemoryVolume, name: str) -> None:
    with pytest.raises(errors.InvalidInput, match="is not valid"):
        attempt(volume, name)


class Turns:
    """A volume whose callers take turns, one operation each, in an order that is given."""

    def __init__(self, volume: Volume, order: Iterator[int]) -> None:
        self._volume = volume
        self._order = order
        self._changed = threading.Condition()
        self._running = {0, 1}
        self._turn = next(order)

    def of(self, who: int) -> Any:
        """The volume for one of them."""
        outer = self

        class Mine:
            url = "memory:"

            def __getattr__(self, name: str) -> Callable[..., Any]:
                def call(*given: Any) -> Any:
                    with outer._changed:
                        assert outer._changed.wait_for(lambda: outer._turn == who, 20)
                        try:
                            made = getattr(outer._volume, name)(*given)
                            return list(made) if name == "list" else made
                        finally:
                            outer._pass_on()

                return call

        return Mine()

    def ended(self, who: int) -> None:
        with self._changed:
            self._running.discard(who)
            self._pass_on()

    def _pass_on(self) -> None:
        wanted = next(self._order)
        self._turn = wanted if wanted in self._running else 1 - wanted
        self._changed.notify_all()


def together(seed: int) -> list[Decision | None]:
    """Two attempts are committed in an order of operations by chance; what they are then."""
    chance = random.Random(seed)
    volume = MemoryVolume()
    turns = Turns(volume, iter(lambda: chance.randrange(2), 2))

    def commit(who: int) -> None:
        try:
            attempt(turns.of(who), (ONE, TWO)[who]).commit(["x"], again=False)
        except errors.RestoreConflict:
            pass
        finally:
            turns.ended(who)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(commit, who) for who in (0, 1)]:
            each.result(30)
    return [attempt(volume, name).decision() for name in (ONE, TWO)]


def test_of_two_at_once_never_both_are_committed() -> None:
    seen = set()
    for seed in range(300):
        found = together(seed)
        assert found.count(Decision.COMMITTED) <= 1, seed
        seen.add(tuple(found))
    # The orders that matter were among them: either one first, and both abandoned by the other.
    assert {found[0] for found in seen} >= set(Decision)
    assert (Decision.ABANDONED, Decision.ABANDONED) in seen
