"""What is being read is not deleted, on a directory as in memory; who died holds nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from agent import errors
from agent.engines.base import Engine, RestoreOptions
from agent.host import clock
from agent.model import ids
from agent.model.streams import MemberSource
from agent.node import archives, restore
from agent.store import holding, intents, layout
from agent.store.repository import EpochSummary, MemberReader, Store, VerifyReport
from agent.store.retention import Retention
from agent.volumes.base import Volume
from agent.volumes.directory import DirectoryVolume
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import Fault, FaultyVolume
from tests.images import EMPTY, GROUP, MEMBER, NOW_S

LAST = Retention(keep_last=1)


@pytest.fixture(params=["memory", "directory"])
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Volume:
    return MemoryVolume() if request.param == "memory" else DirectoryVolume(str(tmp_path))


@pytest.fixture
def store(volume: Volume) -> Store:
    return Store.open(volume, create=True)


def dump(store: Store, image: images.Image, now_s: float = NOW_S) -> EpochSummary:
    with store.begin(GROUP, now_s=now_s) as epoch:
        images.write(epoch, image)
        return epoch.commit({})


def announced(volume: Volume) -> list[str]:
    return [info.name for info in volume.list(layout.INTENTS)]


def test_what_is_read_is_neither_deleted_nor_pruned(store: Store, volume: Volume) -> None:
    first = dump(store, images.simple())
    newest = dump(store, images.simple(20), NOW_S + 1)
    with store.hold(store.read(GROUP, first.epoch)) as held:
        assert held
        with pytest.raises(errors.Conflict, match="still being read") as caught:
            store.delete(GROUP, first.epoch)
        assert caught.value.retryable
        for dry_run in (True, False):
            report = store.prune(LAST, now_s=clock.wall_s(), dry_run=dry_run)
            assert report.removed == ()
            assert (GROUP, first.epoch) in report.kept
        read = store.read(GROUP, first.epoch).member(MEMBER)
        images.assert_member(read, images.simple()[MEMBER])
        store.delete(GROUP, newest.epoch)
    assert announced(volume) == []
    store.delete(GROUP, first.epoch)
    assert [info.name for info in volume.list()] == EMPTY


def test_what_is_verified_is_not_deleted(store: Store, volume: Volume) -> None:
    epoch = dump(store, images.simple()).epoch
    refused: list[errors.Conflict] = []

    def look(_: int, __: int) -> None:
        with pytest.raises(errors.Conflict, match="still being read") as caught:
            store.delete(GROUP, epoch)
        refused.append(caught.value)

    assert store.verify(GROUP, epoch, look).good
    assert refused
    assert announced(volume) == []


def test_what_is_deleted_while_it_is_verified_is_not_called_damaged(
    store: Store, volume: Volume
) -> None:
    """At every step of the verification, on a volume that takes no note of it."""
    for step in itertools.count():
        epoch = dump(store, images.simple()).epoch

        def meanwhile(number: int, method: str, _: str) -> Fault | None:
            if number == step:  # noqa: B023 - called before the next one
                store.delete(GROUP, epoch)  # noqa: B023
            return Fault(errors.VolumeFull("full", volume="v")) if method == "put" else None

        verified = FaultyVolume(volume, meanwhile)
        other = Store.open(volume)
        other.volume = verified
        try:
            assert other.verify(GROUP, epoch).good
        except errors.NotFound:
            assert step < len(verified.calls)
        assert list(volume.list(layout.SUSPECTS)) == []
        if step >= len(verified.calls):
            break


def test_an_older_image_that_is_deleted_meanwhile_is_not_offered_for_a_damaged_one(
    store: Store, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest, older, newest = (dump(store, images.simple(n), NOW_S + n) for n in (1, 2, 3))
    volume.delete(layout.member_name(GROUP, newest.epoch, MEMBER))
    verify = Store.verify

    def meanwhile(store: Store, group: ids.GroupName, epoch: ids.EpochId) -> VerifyReport:
        if epoch == older.epoch:
            store.delete(group, epoch)
        return verify(store, group, epoch)

    monkeypatch.setattr(Store, "verify", meanwhile)
    engine = cast("Engine", None)  # asked only when the image is found whole
    with pytest.raises(errors.DataError) as caught:
        restore.restore(store, engine, ids.image_name(GROUP, newest.epoch), RestoreOptions())
    assert caught.value.facts["older_good"] == ids.image_name(GROUP, oldest.epoch)


def damaged(store: Store, epoch: ids.EpochId) -> errors.DataError:
    """What a restore of this image, a part of which is missing, says."""
    store.volume.delete(layout.member_name(GROUP, epoch, MEMBER))
    engine = cast("Engine", None)  # asked only when the image is found whole
    with pytest.raises(errors.DataError) as caught:
        restore.restore(store, engine, ids.image_name(GROUP, epoch), RestoreOptions())
    assert caught.value.facts["older_good"] == ""
    return caught.value


def test_damage_is_told_also_where_the_volume_fails_in_the_search_for_an_older_image(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, newest = (dump(store, images.simple(n), NOW_S + n) for n in (1, 2))

    def fail(*_: object) -> VerifyReport:
        raise errors.VolumeGone("the volume went away")

    monkeypatch.setattr(Store, "verify", fail)
    found = damaged(store, newest.epoch)
    assert "the volume went away" in found.hint


def test_that_there_is_no_older_image_is_not_called_damage(store: Store) -> None:
    oldest, newest = (dump(store, images.simple(n), NOW_S + n).epoch for n in (1, 2))
    assert damaged(store, oldest).hint == "there is no older image of this group"
    assert damaged(store, newest).hint == "no older image of this group is whole"


def test_what_is_exported_is_not_deleted(store: Store, volume: Volume) -> None:
    image = ids.image_name(GROUP, dump(store, images.simple()).epoch)

    @dataclasses.dataclass
    class Archive:
        source: MemberSource
        expected_bytes: int = 1
        left_out: tuple[str, ...] = ()
        restorable: bool = True

        def pieces(self) -> Iterator[bytes]:
            yield b"a"
            yield b"b"

    with archives.exporting(store, image, None, lambda source, _: Archive(source)) as made:
        for _ in made.pieces():
            with pytest.raises(errors.Conflict, match="still being read"):
                store.delete(*store.resolve(image))
    assert made.exported.size_bytes == 2
    assert announced(volume) == []


def test_two_that_read_the_same_hold_it_apart(store: Store) -> None:
    epoch = dump(store, images.simple()).epoch
    with store.hold(store.read(GROUP, epoch)):
        with store.hold(store.read(GROUP, epoch)):
            pass
        with pytest.raises(errors.Conflict):
            store.delete(GROUP, epoch)
    store.delete(GROUP, epoch)


def test_who_begins_to_read_while_it_is_being_deleted_reads_all_or_is_told(
    store: Store, volume: Volume
) -> None:
    """At every step of a deleter: what a reader has found to be there stays until it is through."""
    ended: set[str] = set()
    for step in itertools.count():
        epoch = dump(store, images.simple()).epoch
        with contextlib.ExitStack() as stack:
            found: list[MemberReader] = []

            def begin(number: int, *_: str) -> None:
                if number != step:  # noqa: B023 - called before the next one
                    return
                try:
                    reader = store.read(GROUP, epoch)  # noqa: B023
                    stack.enter_context(store.hold(reader))
                    member = reader.member(MEMBER)
                    member.present()
                    found.append(member)  # noqa: B023
                except (errors.NotFound, errors.Missing) as exc:
                    ended.add(exc.code)

            deleter = FaultyVolume(volume, begin)
            try:
                Store.open(deleter).delete(GROUP, epoch)
            except errors.Conflict:
                ended.add("refused")
            for member in found:
                images.assert_member(member, images.simple()[MEMBER])
                ended.add("read")
        store.prune(Retention(keep_last=1), now_s=clock.wall_s())
        with contextlib.suppress(errors.NotFound):
            store.delete(GROUP, epoch)
        assert [info.name for info in volume.list()] == EMPTY
        if step > len(deleter.calls):
            break
    assert ended >= {"refused", "read", errors.NotFound.code}


def test_who_died_or_is_silent_for_long_holds_nothing(store: Store, volume: Volume) -> None:
    first = dump(store, images.simple()).epoch
    dump(store, images.simple(20), NOW_S + 1)
    attempt = "20260101-000000-000000-0123456789abcdef"
    me = intents.Owner.myself()
    dead = dataclasses.replace(me, start_ticks=me.start_ticks + 1)
    elsewhere = dataclasses.replace(me, boot_id="another boot")
    young_s, old_s = 0.9 * intents.READER_STALE_S, 1.1 * intents.READER_STALE_S
    for owner, age_s, goes in (
        (me, young_s, False),
        (elsewhere, young_s, False),
        (dead, 0.0, True),
        (elsewhere, old_s, True),
    ):
        intents.announce(volume, intents.Intent(attempt, "read", owner, GROUP, first))
        preview = store.prune(LAST, now_s=clock.wall_s() + age_s, dry_run=True)
        assert preview.removed == (((GROUP, first),) if goes else ())
        intents.withdraw(volume, attempt)
    intents.announce(volume, intents.Intent(attempt, "read", dead, GROUP, first))
    assert store.prune(LAST, now_s=clock.wall_s()).removed == ((GROUP, first),)
    assert announced(volume) == []


def test_a_long_reader_says_so_again_and_at_no_moment_nothing(
    store: Store, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "_RENEWED_S", 0.01)
    monkeypatch.setattr(holding, "_AGAIN_S", 0.01)
    epoch = dump(store, images.simple()).epoch
    begun, renewed = threading.Event(), threading.Event()
    least: list[int] = []

    def look(_: int, method: str, name: str) -> Fault | None:
        if not name.startswith(layout.INTENTS) or not begun.is_set():
            return None
        least.append(len(announced(volume)))
        if len(least) > 6:
            renewed.set()
        return Fault(errors.VolumeError("busy")) if len(least) == 3 else None

    faulty = FaultyVolume(volume, look)
    other = Store.open(faulty)
    with other.hold(other.read(GROUP, epoch)):
        before = announced(volume)
        begun.set()
        assert renewed.wait(20)
        assert announced(volume) != before
        with pytest.raises(errors.Conflict):
            store.delete(GROUP, epoch)
        begun.clear()
    assert min(least) >= 1
    store.delete(GROUP, epoch)


def test_a_volume_that_takes_nothing_can_be_read_but_not_held(store: Store, volume: Volume) -> None:
    epoch = dump(store, images.simple()).epoch

    def full(_: int, method: str, name: str) -> Fault | None:
        return Fault(errors.VolumeFull("full", volume="v")) if method == "put" else None

    other = Store.open(FaultyVolume(volume, full))
    reader = other.read(GROUP, epoch)
    with other.hold(reader) as held:
        assert not held
        images.assert_member(reader.member(MEMBER), images.simple()[MEMBER])
    assert other.verify(GROUP, epoch).good
