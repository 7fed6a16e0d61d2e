"""What a store promises, example by example."""

from __future__ import annotations

import contextlib
import io
import threading

import pytest

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.streams import AddressSpace, PageRun
from agent.store import epoch_ids, intents, layout, packing
from agent.store.parts import WARNINGS
from agent.store.repository import EpochSummary, EpochWriter, Store
from agent.store.retention import Retention
from agent.volumes.base import Volume
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import FaultyVolume
from tests.images import EMPTY, GROUP, MEMBER, NOW_S

SPACE = AddressSpace("process", 7)


@pytest.fixture
def volume() -> Volume:
    return MemoryVolume()


@pytest.fixture
def store(volume: Volume) -> Store:
    return Store.open(volume, create=True)


def dump(
    store: Store, image: images.Image, group: ids.GroupName = GROUP, now_s: float = NOW_S
) -> EpochSummary:
    with store.begin(group, now_s=now_s) as epoch:
        images.write(epoch, image)
        return epoch.commit({})


def names(volume: Volume, prefix: str = "") -> list[str]:
    return [info.name for info in volume.list(prefix)]


def test_a_store_must_exist_unless_asked_to_make_it(volume: Volume) -> None:
    with pytest.raises(errors.NotFound):
        Store.open(volume)
    made = Store.open(volume, create=True)
    assert Store.open(volume).id == made.id == Store.open(volume, create=True).id


def test_two_that_make_a_store_at_once_make_one(volume: Volume) -> None:
    made: list[str] = []

    def plan(number: int, method: str, name: str) -> None:
        if method == "put" and not made:
            made.append(Store.open(volume, create=True).id)

    assert Store.open(FaultyVolume(volume, plan), create=True).id == made[0]


def test_an_epoch_that_is_not_committed_leaves_nothing(store: Store, volume: Volume) -> None:
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, images.simple())
        epoch.member(ids.member_name("other")).finish()
        assert store.epochs() == []
        assert names(volume, layout.INTENTS) != []
    with pytest.raises(ZeroDivisionError), store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, {**images.simple(), **images.simple(1 // 0)})
    assert names(volume) == EMPTY
    with pytest.raises(errors.NotFound):
        store.resolve("group")


def test_an_equal_page_is_stored_once_whoever_holds_it(store: Store) -> None:
    space, other = AddressSpace("process", 1), AddressSpace("shmem", 1)
    numbers = tuple(range(1, 201))
    member = images.MemberImage({space: ((0, 0, numbers),), other: ((5, 1, numbers[::-1]),)})
    rank_0, rank_1 = ids.member_name("rank-0"), ids.member_name("rank-1")
    summary = dump(store, {rank_0: member, rank_1: member})
    assert summary.pages == 800
    assert summary.raw_bytes == 800 * 4096
    assert summary.new_bytes == 200 * 4096
    images.assert_epoch(store.read(GROUP, summary.epoch), {rank_0: member, rank_1: member})


def test_zero_pages_cost_nothing(store: Store) -> None:
    member = images.MemberImage({SPACE: ((0, 0, (0,) * 20_000),)})
    summary = dump(store, {MEMBER: member})
    assert (summary.pages, summary.zero_pages, summary.new_bytes) == (20_000, 20_000, 0)
    assert summary.stored_bytes < 1000
    reader = store.read(GROUP, summary.epoch).member(MEMBER)
    assert list(reader.read(SPACE)) == [(0, None, 20_000)]


def test_a_second_epoch_costs_what_changed(store: Store) -> None:
    first = dump(store, images.simple(1, 2000))
    again = dump(store, images.simple(1, 2000))
    shifted = dump(store, images.simple(101, 2000))
    assert first.new_bytes > 2000 * 4096
    assert again.new_bytes == 0
    assert shifted.new_bytes == 100 * 4096
    assert shifted.stored_bytes < 0.08 * first.stored_bytes
    images.assert_epoch(store.read(GROUP, shifted.epoch), images.simple(101, 2000))


def test_groups_share_nothing(store: Store) -> None:
    """How much a dump costs must not tell one tenant what another one holds."""
    first = dump(store, images.simple(), ids.group_name("a"))
    second = dump(store, images.simple(), ids.group_name("b"))
    assert second.new_bytes == first.new_bytes > 0


def test_epochs_do_not_need_each_other(store: Store) -> None:
    epochs = [dump(store, images.simple(1 + 10 * at, 200)) for at in range(4)]
    for summary in (epochs[0], epochs[2], epochs[1]):
        store.delete(GROUP, summary.epoch)
    images.assert_epoch(store.read(GROUP, epochs[3].epoch), images.simple(31, 200))
    assert store.verify(GROUP, epochs[3].epoch).good


def test_deleting_the_last_epoch_leaves_an_empty_store(store: Store, volume: Volume) -> None:
    summary = dump(store, images.simple())
    report = store.delete(GROUP, summary.epoch)
    assert report.removed == ((GROUP, summary.epoch),)
    assert names(volume) == EMPTY
    with pytest.raises(errors.NotFound):
        store.delete(GROUP, summary.epoch)


def test_new_epochs_sort_last_even_if_the_clock_went_back(store: Store) -> None:
    epochs = [dump(store, images.simple(), now_s=NOW_S - 1000 * at).epoch for at in range(4)]
    assert epochs == sorted(epochs)
    assert store.resolve("group") == (GROUP, epochs[-1])
    hostile = ids.epoch_id("99999999-999999-ffffff")
    assert epoch_ids.next_epoch([hostile], NOW_S) < hostile


def test_images_are_found_by_name(store: Store) -> None:
    first, second = (dump(store, images.simple()).epoch for _ in range(2))
    assert store.resolve("group") == (GROUP, second)
    assert store.resolve(f"group@{first}") == (GROUP, first)
    assert store.resolve(f"group@{first[:15]}") == (GROUP, first)
    for wrong in ("group@2", "group@1999", "other", f"other@{first}"):
        with pytest.raises(errors.NotFound):
            store.resolve(wrong)
    for wrong in ("", "group@", "../x", "a/b"):
        with pytest.raises(errors.InvalidInput):
            store.resolve(wrong)
    with pytest.raises(errors.NotFound):
        store.read(GROUP, ids.epoch_id("20000101-000000-000000"))
    with pytest.raises(errors.NotFound):
        store.verify(GROUP, ids.epoch_id("20000101-000000-000000"), None)
    with pytest.raises(errors.NotFound):
        store.read(GROUP, first).member(ids.member_name("nobody"))


def test_an_image_says_what_it_lacks(store: Store) -> None:
    reader = store.read(GROUP, dump(store, images.simple()).epoch).member(MEMBER)
    with pytest.raises(errors.Missing):
        reader.metadata_file("no.img")
    with pytest.raises(errors.Missing):
        list(reader.file_content("/no"))
    with pytest.raises(errors.Missing):
        list(reader.read(AddressSpace("process", 8)))
    with pytest.raises(errors.Missing):
        reader.runs(AddressSpace("shmem", 7))


def test_a_sink_refuses_what_makes_no_sense(store: Store) -> None:
    page = memoryview(images.page(1))
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        member = epoch.member(MEMBER)
        member.pages(SPACE, PageRun(8192, 1, 0), page)
        for wrong in (PageRun(8192, 1, 0), PageRun(4096, 1, 0), PageRun(12289, 1, 0),
                      PageRun(12288, 2, 0), PageRun(12288, 1, 1 << 32), PageRun(12288, 1, -1),
                      PageRun(1 << 64, 1, 0)):  # fmt: skip
            with pytest.raises(errors.InvalidInput):
                member.pages(SPACE, wrong, page)
        for name in ("", "..", "a/b", "a\nb"):
            with pytest.raises(errors.InvalidInput):
                member.metadata(name, io.BytesIO())
        member.metadata("a", io.BytesIO())
        with pytest.raises(errors.InvalidInput):
            member.metadata("a", io.BytesIO())
        for path in ("a", "/a/../b", "/a//b", "/a/", "/\0"):
            with pytest.raises(errors.InvalidInput):
                member.file(images.file_entry(path), io.BytesIO())
        with pytest.raises(errors.InvalidInput):
            member.file(images.file_entry("/a"), None)
        with pytest.raises(errors.InvalidInput):
            member.facts({"not": object()})
        member.facts({})
        with pytest.raises(errors.InvalidInput):
            member.facts({})
        with pytest.raises(errors.InvalidInput):
            epoch.member(MEMBER)
        member.finish()
        assert member.finish() == member.finish()
        with pytest.raises(errors.InvalidInput):
            member.pages(SPACE, PageRun(16384, 1, 0), page)
        epoch.commit({})
        with pytest.raises(errors.InvalidInput):
            epoch.commit({})
        with pytest.raises(errors.InvalidInput):
            epoch.member(ids.member_name("late"))
    with store.begin(GROUP, now_s=NOW_S) as epoch, pytest.raises(errors.InvalidInput):
        epoch.commit({})


def test_members_are_written_by_several_threads(store: Store) -> None:
    members = {
        ids.member_name(f"rank-{at}"): images.MemberImage(
            {SPACE: ((0, 0, tuple(range(at * 500, at * 500 + 1000))),)}
        )
        for at in range(4)
    }
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        threads = [
            threading.Thread(target=images.write, args=(epoch, {name: member}))
            for name, member in members.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        summary = epoch.commit({})
    assert summary.new_bytes == 2499 * 4096 + 0
    images.assert_epoch(store.read(GROUP, summary.epoch), members)


def test_many_packs_make_one_image(
    store: Store, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.store.pack.PACK_PAGES", 600)
    monkeypatch.setattr("agent.store.pack.BLOCK_PAGES", 256)
    image = images.simple(1, 4000)
    first = dump(store, image)
    assert len(names(volume, layout.PACKS)) == 7
    images.assert_epoch(store.read(GROUP, first.epoch), image)
    second = dump(store, images.simple(50, 4000))
    images.assert_epoch(store.read(GROUP, second.epoch), images.simple(50, 4000))
    assert store.verify(GROUP, second.epoch).good


def test_pages_that_few_need_move_to_a_new_pack(store: Store, volume: Volume) -> None:
    """So that old packs die, and a restore reads little that it does not need."""
    dump(store, images.simple(1, 1024))
    mostly_new = images.simple(900, 1024)  # a tenth of the first pack is still used
    second = dump(store, mostly_new)
    third = dump(store, mostly_new)
    fourth = dump(store, mostly_new)
    assert second.new_bytes == 899 * 4096
    assert third.new_bytes >= 124 * 4096  # stored again
    assert fourth.new_bytes == 0
    store.prune(Retention(keep_last=1), now_s=NOW_S)
    kept = names(volume, layout.PACKS)
    assert len(kept) == 2
    assert not any(second.epoch > name.split("/")[1] for name in kept)
    images.assert_epoch(store.read(GROUP, fourth.epoch), mostly_new)


def test_a_base_that_is_damaged_is_not_built_on(store: Store, volume: Volume) -> None:
    first = dump(store, images.simple())
    pack = names(volume, layout.PACKS)[0]
    content = volume.read(pack)
    for damaged in (content[:-5], content + b"x", content[:-5] + bytes(5), b"", None):
        volume.delete(pack)
        if damaged is not None:
            volume.put(pack, damaged)
        again = dump(store, images.simple())
        assert again.new_bytes == first.new_bytes
        assert pack in again.facts[WARNINGS][0]
        images.assert_epoch(store.read(GROUP, again.epoch), images.simple())
        store.delete(GROUP, again.epoch)
        volume.delete(pack)
        volume.put(pack, content)
    assert dump(store, images.simple()).new_bytes == 0


def test_a_base_whose_manifests_are_damaged_is_not_built_on(store: Store, volume: Volume) -> None:
    good = dump(store, images.simple())
    bad = dump(store, images.simple(1, 60))
    for name in (layout.epoch_name(GROUP, bad.epoch), layout.member_name(GROUP, bad.epoch, MEMBER)):
        content = volume.read(name)
        volume.delete(name)
        volume.put(name, content[:-1])
        with store.begin(GROUP, now_s=NOW_S) as epoch:
            images.write(epoch, images.simple(1, 60))
            summary = epoch.commit({"mine": 1})
        assert len(summary.facts[WARNINGS]) == 1
        assert summary.facts["mine"] == 1
        images.assert_epoch(store.read(GROUP, summary.epoch), images.simple(1, 60))
        store.delete(GROUP, summary.epoch)
        volume.delete(name)
        volume.put(name, content)
    assert good.damage is None


def test_once_damage_is_known_the_next_epoch_is_good_again(store: Store, volume: Volume) -> None:
    """A damaged block may be part of every epoch so far; new ones must not inherit it."""
    image = images.simple(1, 600)
    first = dump(store, image)
    pack = names(volume, layout.PACKS)[0]
    content = volume.read(pack)
    volume.delete(pack)
    volume.put(pack, content[:100] + bytes([content[100] ^ 1]) + content[101:])
    inherits = dump(store, image)
    assert inherits.new_bytes == 0  # a dump looks at the index only
    assert [d.part for d in store.verify(GROUP, inherits.epoch).damaged] == [pack]
    healed = dump(store, image)
    assert healed.new_bytes == first.new_bytes
    assert "verification" in healed.facts[WARNINGS][0]
    assert store.verify(GROUP, healed.epoch).good
    images.assert_epoch(store.read(GROUP, healed.epoch), image)
    # If the pack is found good after all, it is built on again; and its mark goes with it.
    assert names(volume, layout.SUSPECTS) == [layout.suspect_name(pack)]
    volume.delete(pack)
    volume.put(pack, content)
    assert store.verify(GROUP, inherits.epoch).good
    assert names(volume, layout.SUSPECTS) == []
    volume.delete(pack)
    assert not store.verify(GROUP, inherits.epoch).good
    store.prune(Retention(keep_last=1), now_s=NOW_S)
    assert names(volume, layout.SUSPECTS) == []


def test_a_damaged_epoch_is_listed_and_can_be_deleted(store: Store, volume: Volume) -> None:
    good, bad = dump(store, images.simple()), dump(store, images.simple(500))
    name = layout.epoch_name(GROUP, bad.epoch)
    content = bytearray(volume.read(name))
    content[100] ^= 1
    volume.delete(name)
    volume.put(name, bytes(content))
    listed = store.epochs(GROUP)
    assert [summary.epoch for summary in listed] == [good.epoch, bad.epoch]
    assert (listed[0].damage, listed[1].members) == (None, ())
    assert name in (listed[1].damage or "")
    with pytest.raises(errors.Corrupt):
        store.read(GROUP, bad.epoch)
    # What it needs is not known: nothing goes, the newest good one stays, and the way out is told.
    packs = names(volume, layout.PACKS)
    report = store.prune(Retention(keep_last=1), now_s=NOW_S)
    assert report.removed == ()
    assert bad.epoch in report.blocked[0]
    assert names(volume, layout.PACKS) == packs
    store.delete(GROUP, bad.epoch)
    assert len(names(volume, layout.PACKS)) == 1
    assert [summary.epoch for summary in store.epochs()] == [good.epoch]


def test_a_preview_says_exactly_what_goes(store: Store, volume: Volume) -> None:
    for at in range(5):
        dump(store, images.simple(1 + 100 * at, 150), now_s=NOW_S + at)
        dump(store, images.simple(1 + 100 * at, 150), ids.group_name("other"), now_s=NOW_S + at)
    volume.put("packs/20200101-000000-000000-0123456789abcdef/0", b"left over")
    volume.put(f"groups/{GROUP}/20200101-000000-000000/member-x", b"left over")
    before = list(volume.list())
    keep = Retention(keep_last=2)
    preview = store.prune(keep, group=GROUP, now_s=NOW_S + 9, dry_run=True)
    assert list(volume.list()) == before
    report = store.prune(keep, group=GROUP, now_s=NOW_S + 9)
    after = list(volume.list())
    assert report == preview
    assert len(report.removed) == 3
    assert report.leftovers == 2
    assert report.freed_bytes == sum(i.size_bytes for i in before) - sum(
        i.size_bytes for i in after
    )
    assert len(store.epochs(GROUP)) == 2
    assert len(store.epochs(ids.group_name("other"))) == 5
    assert all(store.verify(each.group, each.epoch).good for each in store.epochs())


def test_a_prune_spares_what_a_living_writer_uses(store: Store, volume: Volume) -> None:
    first = dump(store, images.simple())
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, images.simple(20))
        epoch.member(ids.member_name("other")).finish()
        report = store.delete(GROUP, first.epoch)
        assert report.blocked == ()
        assert len(names(volume, layout.PACKS)) == 2
        summary = epoch.commit({})
    images.assert_member(store.read(GROUP, summary.epoch).member(MEMBER), images.simple(20)[MEMBER])
    assert store.verify(GROUP, summary.epoch).good


def test_what_a_dead_writer_left_goes_with_a_prune(store: Store, volume: Volume) -> None:
    attempt = "20260101-000000-000000-0123456789abcdef"
    me = intents.Owner.myself()
    dead = intents.Owner(me.boot_id, me.pid_namespace, me.pid, me.start_ticks + 1)
    elsewhere = intents.Owner("another boot", 1, me.pid, me.start_ticks)
    for owner, age_s, stays in ((dead, 0.0, False), (elsewhere, 0.0, True), (me, 0.0, True),
                                (elsewhere, 1.01 * intents.STALE_S, False),
                                (me, 1.01 * intents.STALE_S, False)):  # fmt: skip
        intents.announce(volume, intents.Intent(attempt, "write", owner, GROUP))
        volume.put(f"packs/{attempt}/0", b"half")
        store.prune(Retention(keep_last=1), now_s=clock.wall_s() + age_s)
        assert (f"packs/{attempt}/0" in names(volume)) == stays
        assert (layout.intent_name(attempt) in names(volume)) == stays
        volume.delete(f"packs/{attempt}/0")
        intents.withdraw(volume, attempt)


def test_an_intent_that_cannot_be_read_blocks_a_prune_until_it_is_old(
    store: Store, volume: Volume
) -> None:
    name = layout.intent_name("20260101-000000-000000-0123456789abcdef")
    pack = "packs/20250101-000000-000000-0123456789abcdef/0"
    volume.put(name, b"damaged")
    volume.put(pack, b"left over")
    assert store.prune(Retention(keep_last=1), now_s=clock.wall_s()).blocked != ()
    assert pack in names(volume)
    now_s = clock.wall_s() + 1.01 * intents.STALE_S
    assert store.prune(Retention(keep_last=1), now_s=now_s).blocked == ()
    assert names(volume) == EMPTY


def test_two_deleters_at_once_are_one_too_many(store: Store, volume: Volume) -> None:
    summary = dump(store, images.simple())
    caught: list[bool] = []

    def plan(number: int, method: str, name: str) -> None:
        if method == "list" and name == layout.PACKS and not caught:
            with pytest.raises(errors.Conflict) as conflict:
                store.prune(Retention(keep_last=1), now_s=NOW_S)
            caught.append(conflict.value.retryable)

    Store.open(FaultyVolume(volume, plan)).delete(GROUP, summary.epoch)
    assert caught == [True]
    assert names(volume) == EMPTY


def test_a_writer_whose_base_vanishes_at_the_start_chooses_again(
    store: Store, volume: Volume
) -> None:
    older = dump(store, images.simple())
    newer = dump(store, images.simple(21))

    def plan(number: int, method: str, name: str) -> None:
        if method == "put" and name.startswith(layout.INTENTS) and newer in store.epochs():
            store.delete(GROUP, newer.epoch)

    summary = dump(Store.open(FaultyVolume(volume, plan)), images.simple(21))
    assert older.epoch in [each.epoch for each in store.epochs()]
    images.assert_epoch(store.read(GROUP, summary.epoch), images.simple(21))
    assert store.verify(GROUP, summary.epoch).good


def test_an_epoch_open_for_too_long_is_not_committed(
    store: Store, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prune elsewhere may have taken its writer for dead by then."""
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, images.simple())
        late_s = clock.boottime_s() + intents.WRITER_LIMIT_S + 1
        monkeypatch.setattr(clock, "boottime_s", lambda: late_s)
        with pytest.raises(errors.DeadlineExceeded):
            epoch.commit({})
    assert names(volume) == EMPTY


def test_an_epoch_that_somebody_else_committed_is_a_conflict(store: Store, volume: Volume) -> None:
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, images.simple())
        volume.put(layout.epoch_name(GROUP, epoch.epoch), b"somebody else's")
        with pytest.raises(errors.Conflict):
            epoch.commit({})
    assert names(volume, layout.PACKS) == []
    assert volume.read(layout.epoch_name(GROUP, epoch.epoch)) == b"somebody else's"


def test_a_commit_whose_reply_was_lost_does_not_harm_who_built_on_it(
    store: Store, volume: Volume
) -> None:
    """The failed epoch was visible for a moment, and another writer took it for its base."""
    others = contextlib.ExitStack()
    building: list[EpochWriter] = []

    class LosesReply(FaultyVolume):
        def put(self, name: str, data: bytes) -> None:
            super().put(name, data)
            if name.startswith(layout.GROUPS) and name.endswith("/epoch"):
                building.append(others.enter_context(store.begin(GROUP, now_s=NOW_S)))
                images.write(building[0], images.simple())
                raise errors.VolumeError("timed out")

    with pytest.raises(errors.VolumeError):
        dump(Store.open(LosesReply(volume)), images.simple())
    assert store.epochs() == []
    store.prune(Retention(keep_last=1), now_s=NOW_S)
    summary = building[0].commit({})
    others.close()
    assert summary.new_bytes == 0
    images.assert_epoch(store.read(GROUP, summary.epoch), images.simple())
    store.delete(GROUP, summary.epoch)
    assert names(volume) == EMPTY


def test_a_volume_that_says_exists_of_its_own_retry_has_committed(volume: Volume) -> None:
    class Retries(FaultyVolume):
        def put(self, name: str, data: bytes) -> None:
            super().put(name, data)
            if name.startswith(layout.GROUPS) and name.endswith("/epoch"):
                super().put(name, data)

    store = Store.open(Retries(volume), create=True)
    summary = dump(store, images.simple())
    assert store.epochs() == [summary]


def test_an_epoch_whose_storing_was_broken_off_cannot_be_committed(
    store: Store, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a caller goes on after an interrupt that hit the store."""

    def interrupted(self: packing.Packer) -> None:
        raise KeyboardInterrupt

    with store.begin(GROUP, now_s=NOW_S) as epoch:
        member = epoch.member(MEMBER)
        with monkeypatch.context() as patch:
            patch.setattr(packing.Packer, "buffer", interrupted)
            member.metadata("a", io.BytesIO())
            with pytest.raises(KeyboardInterrupt):
                member.metadata("b", io.BytesIO(b"x"))
        with pytest.raises(errors.DumpFailed):
            member.finish()
        with pytest.raises(errors.DumpFailed):
            epoch.commit({})
    assert names(volume) == EMPTY


def test_a_volume_that_takes_nothing_does_not_hold_a_job_for_ever(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_STALLED_S", 0.2)
    # On any number of cores less than what is written.
    monkeypatch.setattr(packing, "_BUFFERS", 1)
    released = threading.Event()

    def plan(number: int, method: str, name: str) -> None:
        if method == "write":
            released.wait(30)

    store = Store.open(FaultyVolume(volume, plan), create=True)
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        with pytest.raises(errors.VolumeGone, match="took nothing"):
            images.write(epoch, images.simple(1, 10_000))
        released.set()
    assert names(volume) == EMPTY


def test_progress_of_a_verification_reaches_its_end(store: Store) -> None:
    told: list[tuple[int, int]] = []
    summary = dump(store, images.simple(1, 2000))
    report = store.verify(GROUP, summary.epoch, lambda done, total: told.append((done, total)))
    assert report.good
    assert told[-1] == (report.read_bytes, report.read_bytes)
    assert told == sorted(told)


def test_what_an_epoch_had_is_taken_over_without_being_given_again(store: Store) -> None:
    pages = {number: bytes([number]) * 4096 for number in range(1, 9)} | {9: bytes(4096)}
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        sink = epoch.member(MEMBER)
        sink.draft(SPACE, [PageRun(4096, 9, 0)], memoryview(b"".join(pages.values())))
        sink.settle(SPACE, [PageRun(4096, 9, 5)])
        first = epoch.commit({})
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        sink = epoch.member(MEMBER)
        assert sink.recall("20200101-000000-000000", SPACE) == []
        assert sink.recall(first.epoch, AddressSpace("process", 8)) == []
        assert sink.recall(first.epoch, SPACE) == [PageRun(4096, 9, 0)]
        sink.draft(SPACE, [PageRun(3 * 4096, 1, 0)], memoryview(b"n" * 4096))
        sink.settle(SPACE, [PageRun(2 * 4096, 2, 0), PageRun(6 * 4096, 4, 0)])
        second = epoch.commit({})
    assert second.new_bytes == 4096
    source = store.read(GROUP, second.epoch).member(MEMBER)
    found = {}
    for address, data, count in source.read(SPACE):
        for number in range(count):
            page = bytes(4096) if data is None else bytes(data[number * 4096 : (number + 1) * 4096])
            found[address // 4096 + number] = page
    assert found == {
        2: pages[2],
        3: b"n" * 4096,
        6: pages[6],
        7: pages[7],
        8: pages[8],
        9: pages[9],
    }


def test_what_is_better_stored_anew_is_not_taken_over(store: Store) -> None:
    """So that old packs die: see test_pages_that_few_need_move_to_a_new_pack."""
    dump(store, images.simple(1, 1024))
    second = dump(store, images.simple(900, 1024))
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        sink = epoch.member(MEMBER)
        taken = sum(run.pages for run in sink.recall(second.epoch, SPACE))
        assert 899 <= taken <= 1024 + 2 - 124
        epoch.commit({})
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        assert epoch.member(MEMBER).recall(second.epoch, SPACE) == []  # another one is its base
