"""A dump and a deletion of what it builds on, each cut into at every call by the other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import pytest

from agent.model.ids import EpochId
from agent.store.repository import EpochWriter, Store
from agent.store.retention import Retention
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import Fault, FaultyVolume
from tests.images import EMPTY, GROUP, NOW_S

IMAGE = images.simple(30, 80)


def _prepared() -> MemoryVolume:
    volume = MemoryVolume()
    store = Store.open(volume, create=True)
    for first in (1, 20):
        with store.begin(GROUP, now_s=NOW_S) as epoch:
            images.write(epoch, images.simple(first, 80))
            epoch.commit({})
    return volume


def _dump(store: Store) -> EpochId:
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, IMAGE)
        epoch.commit({})
    return epoch.epoch


def _delete_newest(store: Store) -> None:
    store.delete(GROUP, store.epochs(GROUP)[-1].epoch)


def _delete_all(store: Store) -> None:
    for summary in store.epochs(GROUP):
        store.delete(GROUP, summary.epoch)


def _prune(store: Store) -> None:
    store.prune(Retention(keep_last=1), now_s=NOW_S)


def _at(number: int, action: Callable[[], object]) -> Callable[[int, str, str], Fault | None]:
    def plan(call: int, method: str, name: str) -> None:
        if call == number:
            action()

    return plan


def _calls(action: Callable[[Store], object]) -> int:
    volume = FaultyVolume(_prepared())
    action(Store.open(volume))
    return len(volume.calls)


def _assert_sound(inner: MemoryVolume, where: str) -> None:
    store = Store.open(inner)
    for summary in store.epochs():
        report = store.verify(GROUP, summary.epoch)
        assert report.good, f"{where}: {report.damaged}"
        store.delete(GROUP, summary.epoch)
    _prune(store)  # what a living intent protected at the time
    assert [info.name for info in inner.list()] == EMPTY, where


@pytest.mark.parametrize("deletion", [_delete_newest, _delete_all, _prune])
def test_a_dump_survives_a_deletion_at_any_call(deletion: Callable[[Store], None]) -> None:
    calls, survived = _calls(_dump), 0
    for number in range(calls):
        inner = _prepared()
        other = Store.open(inner)
        volume = FaultyVolume(inner, _at(number, functools.partial(deletion, other)))
        where = f"{deletion.__name__} before call {number}"
        epoch = _dump(Store.open(volume))
        # Unless the deletion hit the new epoch itself, after its commit.
        if epoch in [summary.epoch for summary in other.epochs()]:
            survived += 1
            images.assert_epoch(other.read(GROUP, epoch), IMAGE)
        _assert_sound(inner, where)
    assert survived >= calls - 1


@pytest.mark.parametrize("deletion", [_delete_newest, _delete_all, _prune])
def test_a_deletion_spares_a_dump_that_comes_at_any_call(
    deletion: Callable[[Store], None],
) -> None:
    for number in range(_calls(deletion)):
        inner = _prepared()
        other = Store.open(inner)
        volume = FaultyVolume(inner, _at(number, functools.partial(_dump, other)))
        deletion(Store.open(volume))
        _assert_sound(inner, f"a dump within {deletion.__name__} before call {number}")


@pytest.mark.parametrize("deletion", [_delete_newest, _delete_all, _prune])
@pytest.mark.parametrize("early", [True, False], ids=["begun before", "begun within"])
def test_a_deletion_spares_a_dump_that_is_under_way(
    deletion: Callable[[Store], None], early: bool
) -> None:
    """Begun before the deletion or at one of its calls, committed at a later one or after it."""
    calls = _calls(deletion)
    for number in range(calls):
        inner = _prepared()
        other = Store.open(inner)
        with contextlib.ExitStack() as stack:
            writers: list[EpochWriter] = []

            def begin(
                other: Store = other,
                stack: contextlib.ExitStack = stack,
                writers: list[EpochWriter] = writers,
            ) -> None:
                writers.append(stack.enter_context(other.begin(GROUP, now_s=NOW_S)))
                images.write(writers[0], IMAGE)

            def commit(
                stack: contextlib.ExitStack = stack, writers: list[EpochWriter] = writers
            ) -> None:
                writers[0].commit({})
                stack.close()  # which takes the intent back

            if early:
                begin()
            action = commit if early else begin
            deletion(Store.open(FaultyVolume(inner, _at(number, action))))
            if not early:
                commit()
        kept = [summary.epoch for summary in other.epochs()]
        if writers[0].epoch in kept:
            images.assert_epoch(other.read(GROUP, writers[0].epoch), IMAGE)
        _assert_sound(inner, f"{deletion.__name__}, call {number}")
