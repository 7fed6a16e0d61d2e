"""Epochs that several write and that are decided once, example by example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.ids import EpochId, MemberName
from agent.model.protocol import Decision
from agent.store import decisions, envelope, intents, layout
from agent.store.repository import EpochSummary, JointWriter, Part, Store
from agent.store.retention import Retention
from agent.volumes.base import Volume
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import Fault, FaultyVolume
from tests.images import EMPTY, GROUP, NOW_S

RANKS = tuple(ids.member_name(f"rank-{number}") for number in range(3))
KEEP = Retention(keep_last=100)


@pytest.fixture
def volume() -> Volume:
    return MemoryVolume()


@pytest.fixture
def store(volume: Volume) -> Store:
    return Store.open(volume, create=True)


@pytest.fixture
def epoch(store: Store) -> EpochId:
    return store.new_epoch(GROUP, now_s=NOW_S)


def image(rank: MemberName, first: int = 1) -> images.Image:
    return {rank: images.simple(first)[images.MEMBER]}


def part_of(writer: JointWriter, *members: images.Image) -> Part:
    for member in members:
        images.write(writer, member)
    return Part.decode(writer.finish().encode())


@contextlib.contextmanager
def joined(store: Store, epoch: EpochId, *members: images.Image) -> Iterator[JointWriter]:
    """A writer that has handed out its part."""
    with store.join(GROUP, epoch, now_s=NOW_S) as writer:
        part_of(writer, *members)
        yield writer


def crashed(store: Store, epoch: EpochId, member: images.Image) -> Part:
    """What a writer leaves that has handed out its part and died."""
    with joined(store, epoch, member) as writer:
        part = writer.finish()
    images.bury(store.volume, part.attempt)
    return part


def commit(store: Store, epoch: EpochId, *parts: Part) -> EpochSummary:
    return store.commit_joint(GROUP, epoch, parts, {"step": 1}, now_s=NOW_S)


def names(volume: Volume, prefix: str = "") -> list[str]:
    return [info.name for info in volume.list(prefix)]


def late_s(volume: Volume) -> float:
    """A time when every intent there is is stale."""
    return max(info.modified_s for info in volume.list()) + 1.01 * intents.STALE_S


def test_several_writers_make_one_epoch(store: Store, volume: Volume, epoch: EpochId) -> None:
    whole = {**image(RANKS[0], 1), **image(RANKS[1], 30), **image(RANKS[2], 50)}
    with (
        store.join(GROUP, epoch, now_s=NOW_S) as one,
        store.join(GROUP, epoch, now_s=NOW_S) as two,
    ):
        first = part_of(one, {RANKS[0]: whole[RANKS[0]]}, {RANKS[1]: whole[RANKS[1]]})
        second = part_of(two, {RANKS[2]: whole[RANKS[2]]})
        assert store.epochs() == []
        assert store.decision(GROUP, epoch) is None
        summary = commit(store, epoch, first, second)
        one.keep()
        two.keep()
    assert store.decision(GROUP, epoch) is Decision.COMMITTED
    assert store.epochs() == [summary]
    assert summary.facts == {"step": 1}
    assert summary.raw_bytes == first.totals.raw_bytes + second.totals.raw_bytes
    assert store.verify(GROUP, epoch).good
    images.assert_epoch(store.read(GROUP, epoch), whole)
    assert names(volume, layout.INTENTS) == []
    store.delete(GROUP, epoch)
    assert names(volume) == EMPTY


def test_equal_pages_of_one_writers_members_are_stored_once(store: Store, epoch: EpochId) -> None:
    with store.join(GROUP, epoch, now_s=NOW_S) as writer:
        alone = part_of(writer, image(RANKS[0]), image(RANKS[1]))
        writer.drop()
    # Files and image files are equal as well.
    assert alone.totals.new_bytes < 0.6 * alone.totals.raw_bytes


def test_a_joint_epoch_is_built_on_and_builds_on_others(store: Store) -> None:
    with store.begin(GROUP, now_s=NOW_S) as plain:
        images.write(plain, image(RANKS[0]))
        plain.commit({})
    for _ in range(2):
        epoch = store.new_epoch(GROUP, now_s=NOW_S)
        with (
            joined(store, epoch, image(RANKS[0])) as one,
            joined(store, epoch, image(RANKS[1], 20)) as two,
        ):
            summary = commit(store, epoch, one.finish(), two.finish())
            one.keep()
            two.keep()
    assert summary.new_bytes == 0
    for found in store.epochs()[:-1]:
        store.delete(GROUP, found.epoch)
    images.assert_epoch(
        store.read(GROUP, summary.epoch), {**image(RANKS[0]), **image(RANKS[1], 20)}
    )


def test_a_commit_is_the_same_however_often_and_by_whom(store: Store, epoch: EpochId) -> None:
    with joined(store, epoch, image(RANKS[0])) as one, joined(store, epoch, image(RANKS[1])) as two:
        parts = [one.finish(), two.finish()]
        summary = commit(store, epoch, *parts)
        again = store.commit_joint(GROUP, epoch, parts[::-1], {}, now_s=NOW_S + 99)
        assert again == summary
        with pytest.raises(errors.Conflict):
            commit(store, epoch, parts[0])
        one.keep()
        two.keep()
        assert commit(store, epoch, *parts) == summary


def test_abandoned_is_for_good(store: Store, volume: Volume, epoch: EpochId) -> None:
    with joined(store, epoch, image(RANKS[0])) as writer:
        assert store.abandon(GROUP, epoch) is Decision.ABANDONED
        assert store.abandon(GROUP, epoch) is Decision.ABANDONED
        assert store.decision(GROUP, epoch) is Decision.ABANDONED
        with pytest.raises(errors.Conflict):
            commit(store, epoch, writer.finish())
        with pytest.raises(errors.Conflict), store.join(GROUP, epoch, now_s=NOW_S):
            pass
        writer.drop()
    assert names(volume) == sorted([layout.epoch_name(GROUP, epoch), *EMPTY])


def test_committed_is_for_good(store: Store, epoch: EpochId) -> None:
    with joined(store, epoch, image(RANKS[0])) as writer:
        commit(store, epoch, writer.finish())
        assert store.abandon(GROUP, epoch) is Decision.COMMITTED
        with pytest.raises(errors.Conflict):
            writer.drop()
        with pytest.raises(errors.Conflict), store.join(GROUP, epoch, now_s=NOW_S):
            pass
        writer.keep()
        writer.drop()  # too late for anything
    images.assert_epoch(store.read(GROUP, epoch), image(RANKS[0]))


def test_an_abandoned_epoch_is_none_to_any_reader(store: Store, volume: Volume) -> None:
    with store.begin(GROUP, now_s=NOW_S) as plain:
        images.write(plain, images.simple())
        good = plain.commit({})
    epoch = store.new_epoch(GROUP, now_s=NOW_S)
    store.abandon(GROUP, epoch)
    assert epoch > good.epoch
    assert store.epochs() == [good]
    assert store.resolve(GROUP) == (GROUP, good.epoch)
    for refused in (store.read, store.verify, store.delete):
        with pytest.raises(errors.NotFound):
            refused(GROUP, epoch)
    with pytest.raises(errors.NotFound):
        store.resolve(f"{GROUP}@{epoch}")
    with store.begin(GROUP, now_s=NOW_S) as plain:
        images.write(plain, images.simple())
        again = plain.commit({})
    assert again.epoch > epoch
    assert (again.new_bytes, "store_warnings" in again.facts) == (0, False)
    store.abandon(GROUP, store.new_epoch(GROUP, now_s=NOW_S + 9))
    report = store.prune(Retention(keep_last=1), now_s=NOW_S)
    assert report.removed == ((GROUP, good.epoch),)
    assert report.kept == ((GROUP, again.epoch),)
    assert report.blocked == ()


def test_leaving_before_the_part_is_handed_out_leaves_nothing(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    with store.join(GROUP, epoch, now_s=NOW_S) as writer:
        images.write(writer, image(RANKS[0]))
        writer.member(RANKS[1]).finish()
        assert names(volume, layout.PACKS) != []
    assert names(volume) == EMPTY


def test_what_was_handed_out_stays_until_the_outcome_is_known(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    with joined(store, epoch, image(RANKS[0])) as writer:
        part = writer.finish()
        with pytest.raises(errors.InvalidInput):
            writer.member(RANKS[1])
    assert store.prune(KEEP, now_s=clock.wall_s()).leftovers == 0
    commit(store, epoch, part)
    images.assert_epoch(store.read(GROUP, epoch), image(RANKS[0]))


def test_a_member_of_another_writer_is_left_alone(store: Store, epoch: EpochId) -> None:
    with joined(store, epoch, image(RANKS[0])) as writer:
        with (
            pytest.raises(errors.BlobExists),
            store.join(GROUP, epoch, now_s=NOW_S) as second,
        ):
            part_of(second, image(RANKS[0], 77))
        commit(store, epoch, writer.finish())
        writer.keep()
    images.assert_epoch(store.read(GROUP, epoch), image(RANKS[0]))


def test_a_prune_abandons_what_only_the_dead_worked_on(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    parts = [crashed(store, epoch, image(rank)) for rank in RANKS[:2]]
    preview = store.prune(KEEP, now_s=clock.wall_s(), dry_run=True)
    assert store.decision(GROUP, epoch) is None
    report = store.prune(KEEP, now_s=clock.wall_s())
    assert report == preview
    assert report.leftovers == 4
    assert store.decision(GROUP, epoch) is Decision.ABANDONED
    assert names(volume) == sorted([layout.epoch_name(GROUP, epoch), *EMPTY])
    with pytest.raises(errors.Conflict):
        commit(store, epoch, *parts)


def test_a_prune_waits_while_one_of_an_epoch_lives(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    dead = crashed(store, epoch, image(RANKS[0]))
    with joined(store, epoch, image(RANKS[1])) as writer:
        assert store.prune(KEEP, now_s=clock.wall_s()).leftovers == 0
        commit(store, epoch, dead, writer.finish())
        writer.keep()
    assert store.prune(KEEP, now_s=clock.wall_s()).leftovers == 0
    assert names(volume, layout.INTENTS) == []
    images.assert_epoch(store.read(GROUP, epoch), {**image(RANKS[0]), **image(RANKS[1])})


def test_what_the_dead_left_of_an_abandoned_epoch_goes_at_once(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    crashed(store, epoch, image(RANKS[0]))
    with joined(store, epoch, image(RANKS[1])) as writer:
        store.abandon(GROUP, epoch)
        store.prune(KEEP, now_s=clock.wall_s())
        assert names(volume, layout.PACKS) == list(writer.finish().packs)
        writer.drop()
    assert store.prune(KEEP, now_s=clock.wall_s()).leftovers == 1  # the other's manifest
    assert names(volume) == sorted([layout.epoch_name(GROUP, epoch), *EMPTY])


def test_abandonments_go_when_nobody_can_ask_any_more(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    name = layout.epoch_name(GROUP, epoch)
    with joined(store, epoch, image(RANKS[0])) as writer:
        store.abandon(GROUP, epoch)
        store.prune(KEEP, now_s=late_s(volume))  # which takes the writer for dead
        assert names(volume) == sorted([name, *EMPTY])
        part = writer.finish()
    age_s = volume.info(name).modified_s
    store.prune(KEEP, now_s=age_s + 0.99 * intents.STALE_S)
    assert store.decision(GROUP, epoch) is Decision.ABANDONED
    store.prune(KEEP, now_s=age_s + 1.01 * intents.STALE_S)
    assert names(volume) == EMPTY
    # Whoever slept through all this cannot commit what is gone.
    with pytest.raises(errors.Conflict):
        commit(store, epoch, part)
    assert store.epochs() == []


def test_a_dropped_part_cannot_be_committed(store: Store, epoch: EpochId) -> None:
    with joined(store, epoch, image(RANKS[0])) as one, joined(store, epoch, image(RANKS[1])) as two:
        parts = [one.finish(), two.finish()]
        one.drop()
        assert store.decision(GROUP, epoch) is Decision.ABANDONED
        with pytest.raises(errors.Conflict):
            commit(store, epoch, *parts)
        two.drop()
        two.drop()


def test_what_is_too_old_is_neither_joined_nor_finished_nor_committed(
    store: Store, volume: Volume, epoch: EpochId, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = NOW_S + intents.WRITER_LIMIT_S + 60
    with pytest.raises(errors.DeadlineExceeded), store.join(GROUP, epoch, now_s=late):
        pass
    with joined(store, epoch, image(RANKS[0])) as writer:
        part = writer.finish()
        old_s = volume.info(layout.intent_name(part.attempt)).modified_s + 60
        with pytest.raises(errors.DeadlineExceeded):
            store.commit_joint(GROUP, epoch, [part], {}, now_s=old_s + intents.WRITER_LIMIT_S)
        writer.drop()
    second = store.new_epoch(GROUP, now_s=NOW_S)
    with store.join(GROUP, second, now_s=NOW_S) as writer:
        images.write(writer, image(RANKS[0]))
        later_s = clock.boottime_s() + intents.WRITER_LIMIT_S + 1
        monkeypatch.setattr(clock, "boottime_s", lambda: later_s)
        with pytest.raises(errors.DeadlineExceeded):
            writer.finish()
    assert names(volume, layout.PACKS) == []


@pytest.mark.parametrize("apart_s", [600.0, -600.0, 3600.0, -3600.0])
def test_machines_that_do_not_agree_on_the_time_lose_nothing(
    store: Store, volume: Volume, apart_s: float
) -> None:
    """One names the epoch, one writes a part, one deletes, one commits: by two clocks."""
    here_s = clock.wall_s()
    there_s = here_s + apart_s
    done = []
    for named_s, written_s in ((here_s, there_s), (there_s, here_s), (here_s, here_s)):
        epoch = store.new_epoch(GROUP, now_s=named_s)
        with (
            store.join(GROUP, epoch, now_s=named_s) as one,
            store.join(GROUP, epoch, now_s=written_s) as two,
        ):
            given = [part_of(one, image(RANKS[0])), part_of(two, image(RANKS[1], 30))]
            for now_s in (named_s, written_s):
                assert store.prune(KEEP, now_s=now_s).leftovers == 0
            store.commit_joint(GROUP, epoch, given, {}, now_s=written_s)
            one.keep()
            two.keep()
        done.append(epoch)
    assert [each.epoch for each in store.epochs(GROUP)] == done
    for now_s in (here_s, there_s):
        within = Retention(keep_within_s=2 * abs(apart_s))
        assert store.prune(within, now_s=now_s).removed == ()
    report = store.prune(Retention(keep_last=1), now_s=there_s)
    assert [epoch for _, epoch in report.removed] == done[:-1]
    assert store.verify(GROUP, done[-1]).good


def test_an_epoch_is_not_deleted_while_its_writers_are_at_it(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    """Else one of them could still hear that it was abandoned, or commit it again."""
    with joined(store, epoch, image(RANKS[0])) as writer:
        commit(store, epoch, writer.finish())
        newer = store.new_epoch(GROUP, now_s=NOW_S)
        with joined(store, newer, image(RANKS[0])) as other:
            commit(store, newer, other.finish())
            other.keep()
        with pytest.raises(errors.Conflict) as caught:
            store.delete(GROUP, epoch)
        assert caught.value.retryable
        assert store.prune(Retention(keep_last=1), now_s=clock.wall_s()).removed == ()
        writer.keep()
    assert store.prune(Retention(keep_last=1), now_s=clock.wall_s()).removed == ((GROUP, epoch),)


def test_who_committed_and_died_does_not_keep_an_epoch_from_going(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    part = crashed(store, epoch, image(RANKS[0]))
    commit(store, epoch, part)
    store.delete(GROUP, epoch)
    assert names(volume) == EMPTY
    with pytest.raises(errors.Conflict):
        commit(store, epoch, part)


def test_a_commit_whose_reply_was_lost_is_settled_by_asking(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    lost = Fault(errors.VolumeError("timed out"), after=True)

    def plan(number: int, method: str, name: str) -> Fault | None:
        return lost if method == "put" and name.endswith("/epoch") else None

    there = Store.open(FaultyVolume(volume, plan))
    with joined(store, epoch, image(RANKS[0])) as writer:
        with pytest.raises(errors.VolumeError):
            commit(there, epoch, writer.finish())
        assert store.abandon(GROUP, epoch) is Decision.COMMITTED
        writer.keep()
    second = store.new_epoch(GROUP, now_s=NOW_S)
    with pytest.raises(errors.VolumeError):
        there.abandon(GROUP, second)
    assert store.abandon(GROUP, second) is Decision.ABANDONED


def test_a_full_volume_can_be_freed_of_what_the_dead_left() -> None:
    inner = MemoryVolume()
    store = Store.open(inner, create=True)
    epoch = store.new_epoch(GROUP, now_s=NOW_S)
    crashed(store, epoch, image(RANKS[0]))
    used = sum(info.size_bytes for info in inner.list())
    full = MemoryVolume(capacity_bytes=used)
    for info in inner.list():
        full.put(info.name, inner.read(info.name))
    with pytest.raises(errors.VolumeFull):
        Store.open(full).abandon(GROUP, epoch)
    Store.open(full).prune(KEEP, now_s=clock.wall_s())
    assert names(full) == sorted([layout.epoch_name(GROUP, epoch), *EMPTY])


def test_parts_must_make_the_epoch(store: Store, epoch: EpochId) -> None:
    other = EpochId(epoch[:-6] + "ffffff")
    with joined(store, epoch, image(RANKS[0])) as writer:
        part = writer.finish()
        for wrong in ((epoch, []), (epoch, [part, part]), (other, [part])):
            with pytest.raises(errors.InvalidInput):
                commit(store, *wrong[:1], *wrong[1])
        writer.drop()
    text = part.encode()
    assert Part.decode(text) == part
    for old, new in (
        (b"packs/", b"intents/"),
        (b'"attempt":"2', b'"attempt":"3'),
        (epoch.encode(), b"../.."),
        (b'"members"', b'"others"'),
        (b"{", b"["),
    ):
        assert old in text
        with pytest.raises(errors.Corrupt):
            Part.decode(text.replace(old, new))


def test_a_damaged_decision_is_known_as_damage(store: Store, volume: Volume) -> None:
    with store.begin(GROUP, now_s=NOW_S) as plain:
        images.write(plain, images.simple())
        good = plain.commit({})
    epoch = store.new_epoch(GROUP, now_s=NOW_S)
    name = layout.epoch_name(GROUP, epoch)
    sealed = decisions.encode_abandonment(GROUP, epoch)
    for damaged in (sealed[:-1], sealed[:40] + b"?" + sealed[41:], b"", sealed[:12]):
        volume.put(name, damaged)
        for ask in (store.abandon, store.decision):
            with pytest.raises(errors.Corrupt):
                ask(GROUP, epoch)
        assert [each.damage is None for each in store.epochs()] == [True, False]
        assert store.prune(KEEP, now_s=NOW_S).blocked != ()
        store.delete(GROUP, epoch)
    volume.put(name, decisions.encode_abandonment(ids.group_name("other"), epoch))
    with pytest.raises(errors.Corrupt):
        store.decision(GROUP, epoch)
    store.delete(GROUP, epoch)
    assert store.epochs() == [good]


def test_an_older_program_cannot_take_a_joint_writer_for_dead(
    store: Store, volume: Volume, epoch: EpochId
) -> None:
    """What it cannot read blocks its prune until it is old, and what it takes for an epoch's
    manifest is damaged to it.
    """
    part = crashed(store, epoch, image(RANKS[0]))
    name = layout.intent_name(part.attempt)
    with pytest.raises(errors.Corrupt):
        envelope.unseal(envelope.Kind.INTENT, volume.read(name), part=name)
    store.abandon(GROUP, epoch)
    name = layout.epoch_name(GROUP, epoch)
    with pytest.raises(errors.Corrupt):
        envelope.unseal(envelope.Kind.EPOCH, volume.read(name), part=name)


def test_a_base_that_was_deleted_and_then_abandoned_is_not_built_on(
    store: Store, volume: Volume
) -> None:
    first = store.new_epoch(GROUP, now_s=NOW_S)
    with joined(store, first, image(RANKS[0])) as writer:
        commit(store, first, writer.finish())
        writer.keep()

    def plan(number: int, method: str, name: str) -> None:
        if method == "put" and name.startswith(layout.INTENTS) and store.epochs():
            store.delete(GROUP, first)
            store.abandon(GROUP, first)

    there = Store.open(FaultyVolume(volume, plan))
    second = store.new_epoch(GROUP, now_s=NOW_S)
    with joined(there, second, image(RANKS[0])) as writer:
        commit(store, second, writer.finish())
        writer.keep()
    images.assert_epoch(store.read(GROUP, second), image(RANKS[0]))
