"""Whatever call of the volume fails, or is the last one ever: what is committed stays readable,
what is not is never visible, and a later prune leaves no trace of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import pytest

from agent import errors
from agent.model import ids
from agent.store import intents, layout
from agent.store.repository import Store
from agent.store.retention import Retention
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import Fault, FaultyVolume, Stopped, at, from_on, stop_at
from tests.images import EMPTY, GROUP, NOW_S

FIRST, SECOND = images.simple(1, 700), images.simple(100, 700)
OTHER = ids.member_name("other")
CONDITIONS = (
    errors.VolumeFull("no room"),
    errors.VolumeError("I/O error"),
    errors.VolumeGone("vanished"),
)


@functools.cache
def _two_epochs() -> tuple[tuple[str, bytes], ...]:
    volume = MemoryVolume()
    store = Store.open(volume, create=True)
    for image in (FIRST, images.simple(50, 700)):
        with store.begin(GROUP, now_s=NOW_S) as epoch:
            images.write(epoch, image)
            epoch.commit({})
    return tuple((info.name, volume.read(info.name)) for info in volume.list())


def _prepared(room_bytes: int | None = None) -> MemoryVolume:
    blobs = _two_epochs()
    used = sum(len(content) for _, content in blobs)
    volume = MemoryVolume(None if room_bytes is None else used + room_bytes)
    for name, content in blobs:
        volume.put(name, content)
    return volume


def _dump(store: Store) -> None:
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, SECOND)
        images.write(epoch, {OTHER: images.MemberImage(metadata={"x": b"y"})})
        epoch.commit({})


def _prune(store: Store) -> None:
    store.prune(Retention(keep_last=1), now_s=NOW_S)


def _delete_oldest(store: Store) -> None:
    store.delete(GROUP, store.epochs(GROUP)[0].epoch)


def _assert_sound(volume: MemoryVolume, *, least: int) -> None:
    """All that is listed is whole, and a prune by a later process leaves nothing else."""
    store = Store.open(volume)
    epochs = store.epochs()
    assert len(epochs) >= least
    for summary in epochs:
        assert summary.damage is None
        assert store.verify(GROUP, summary.epoch).good
        for name in store.read(GROUP, summary.epoch).members:
            store.read(GROUP, summary.epoch).member(name).check()
    needed = set(EMPTY)
    later_s = max(info.modified_s for info in volume.list()) + 1.01 * intents.STALE_S
    store.prune(Retention(keep_last=100), now_s=later_s)
    for summary in epochs:
        needed.add(layout.epoch_name(GROUP, summary.epoch))
        for name in summary.members:
            needed.add(layout.member_name(GROUP, summary.epoch, name))
    left = {info.name for info in volume.list() if not info.name.startswith(layout.PACKS)}
    assert left == needed
    assert [each.epoch for each in store.epochs()] == [each.epoch for each in epochs]
    assert all(store.verify(GROUP, each.epoch).good for each in epochs)
    for summary in epochs:
        store.delete(GROUP, summary.epoch)
    assert [info.name for info in volume.list()] == EMPTY


def _calls(action: Callable[[Store], None]) -> int:
    volume = FaultyVolume(_prepared())
    action(Store.open(volume))
    return len(volume.calls)


@pytest.mark.parametrize("lost_reply", [False, True])
@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda error: error.code)
@pytest.mark.parametrize(
    ("action", "least"),
    [(_dump, 2), (_prune, 1), (_delete_oldest, 1)],
    ids=["dump", "prune", "delete"],
)
def test_any_one_call_may_fail(
    action: Callable[[Store], None], least: int, condition: errors.VolumeError, lost_reply: bool
) -> None:
    for number in range(_calls(action)):
        inner = _prepared()
        volume = FaultyVolume(inner, at(number, Fault(condition, after=lost_reply)))
        try:
            action(Store.open(volume))
        except errors.VolumeError as exc:
            assert exc is condition  # noqa: PT017
        assert volume.hit == 1
        _assert_sound(inner, least=least)


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda error: error.code)
@pytest.mark.parametrize(
    ("action", "least"),
    [(_dump, 2), (_prune, 1), (_delete_oldest, 1)],
    ids=["dump", "prune", "delete"],
)
def test_a_volume_may_fail_for_good_at_any_call(
    action: Callable[[Store], None], least: int, condition: errors.VolumeError
) -> None:
    for number in range(_calls(action)):
        inner = _prepared()
        volume = FaultyVolume(inner, from_on(number, condition))
        try:
            action(Store.open(volume))
        except errors.VolumeError as exc:
            assert exc is condition  # noqa: PT017
        assert volume.hit >= 1
        _assert_sound(inner, least=least)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("action", "least"),
    [(_dump, 2), (_prune, 1), (_delete_oldest, 1)],
    ids=["dump", "prune", "delete"],
)
def test_the_process_may_die_at_any_call(
    action: Callable[[Store], None], least: int, after: bool
) -> None:
    for number in range(_calls(action)):
        inner = _prepared()
        volume = FaultyVolume(inner, stop_at(number, after=after))
        with pytest.raises(Stopped):
            action(Store.open(volume))
        assert volume.hit == 1
        _assert_sound(inner, least=least)


def test_a_dump_that_failed_is_not_in_the_way_of_the_next() -> None:
    for number in range(_calls(_dump)):
        inner = _prepared()
        with contextlib.suppress(Stopped):
            _dump(Store.open(FaultyVolume(inner, stop_at(number))))
        store = Store.open(inner)
        _dump(store)
        images.assert_epoch(
            store.read(*store.resolve("group")),
            {**SECOND, OTHER: images.MemberImage(metadata={"x": b"y"})},
        )


def test_a_full_volume_fails_the_dump_and_nothing_else() -> None:
    for room_bytes in (0, 100, 1000, 10_000, 50_000):
        inner = _prepared(room_bytes)
        with pytest.raises(errors.VolumeFull):
            _dump(Store.open(inner))
        _assert_sound(inner, least=2)


@pytest.mark.parametrize("action", [_prune, _delete_oldest])
def test_a_full_volume_can_be_pruned(action: Callable[[Store], None]) -> None:
    inner = _prepared(room_bytes=0)
    action(Store.open(inner))
    assert len(Store.open(inner).epochs()) == 1
    assert inner.info(layout.RESERVE).size_bytes > 0
    _assert_sound(inner, least=1)
