"""What a comparison of two epochs tells."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.model import ids
from agent.model.ids import EpochId
from agent.model.streams import AddressSpace
from agent.store import diff, layout
from agent.store.diff import NameChanges, PageChanges
from agent.store.repository import Store
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.images import GROUP, MEMBER, NOW_S

PROCESS, SHARED = AddressSpace("process", 7), AddressSpace("shmem", 1)
OTHER = ids.member_name("other")


@pytest.fixture
def store() -> Store:
    return Store.open(MemoryVolume(), create=True)


def dump(store: Store, image: images.Image) -> EpochId:
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, image)
        return epoch.commit({}).epoch


def test_pages_and_names_by_what_became_of_them(store: Store) -> None:
    before = images.MemberImage(
        {PROCESS: ((10, 0, (1, 2, 3, 0)), (50, 1, (4, 5))), SHARED: ((0, 0, (1,)),)},
        {"same.img": b"x", "other.img": b"y", "gone.img": b""},
        {"/data/same": b"a" * 5000, "/data/other": b"a" * 5000, "/data/gone": b""},
    )
    after = images.MemberImage(
        {PROCESS: ((10, 2, (1, 9, 0, 0)), (51, 1, (5, 6)))},
        {"same.img": b"x", "other.img": b"z", "new.img": b""},
        {"/data/same": b"a" * 5000, "/data/other": b"a" * 4999 + b"b", "/data/new": b"n"},
    )
    older = dump(store, {MEMBER: before})
    newer = dump(store, {MEMBER: after})
    found = store.diff(GROUP, older, newer)
    assert (found.older, found.newer) == (older, newer)
    (member,) = found.members
    assert member.memory == PageChanges(same=3, changed=2, added=1, removed=2)
    assert member.files == NameChanges(("/data/other",), ("/data/new",), ("/data/gone",))
    assert member.metadata == NameChanges(("other.img",), ("new.img",), ("gone.img",))
    (same,) = store.diff(GROUP, newer, newer).members
    assert (same.memory.none, same.files, same.metadata) == (True, NameChanges(), NameChanges())


def test_members_come_and_go(store: Store) -> None:
    member = images.simple(1, 20)[MEMBER]
    older, newer = dump(store, {MEMBER: member}), dump(store, {OTHER: member})
    gone, new = store.diff(GROUP, older, newer).members
    assert (gone.member, gone.in_older, gone.in_newer) == (MEMBER, True, False)
    assert (new.member, new.in_older, new.in_newer) == (OTHER, False, True)
    assert gone.memory == PageChanges(removed=22)
    assert new.memory == PageChanges(added=22)
    assert new.files.added == ("/data", "/data/log")


def test_equal_pages_in_other_packs_are_equal(store: Store) -> None:
    """As after a base that was damaged, or when two nodes wrote the same page."""
    image = images.simple(1, 700)
    older = dump(store, image)
    for info in list(store.volume.list(layout.PACKS)):
        store.volume.put(layout.suspect_name(info.name), b"")
    newer = dump(store, image)
    packs = {layout.pack_attempt(info.name) for info in store.volume.list(layout.PACKS)}
    assert len(packs) == 2
    (member,) = store.diff(GROUP, older, newer).members
    assert member.memory == PageChanges(same=702)
    assert (member.files, member.metadata) == (NameChanges(), NameChanges())


RUNS = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(0, 6), min_size=1, max_size=9)), max_size=6
)


def _memory(runs: list[tuple[int, list[int]]]) -> images.MemberImage:
    made, at = [], 0
    for gap, numbers in runs:
        made.append((at + gap, 0, tuple(numbers)))
        at += gap + len(numbers)
    return images.MemberImage({PROCESS: tuple(made)} if made else {})


@given(RUNS, RUNS, st.booleans())
def test_counts_are_those_of_the_pages(
    first: list[tuple[int, list[int]]], second: list[tuple[int, list[int]]], apart: bool
) -> None:
    store = Store.open(MemoryVolume(), create=True)
    before, after = _memory(first), _memory(second)
    older = dump(store, {MEMBER: before})
    for info in list(store.volume.list(layout.PACKS)) if apart else []:
        store.volume.put(layout.suspect_name(info.name), b"")
    newer = dump(store, {MEMBER: after})
    old, new = (
        {page: number for page, (_, number) in images.memory(each.spaces.get(PROCESS, ())).items()}
        for each in (before, after)
    )
    both = old.keys() & new.keys()
    same = sum(old[page] == new[page] for page in both)
    (member,) = store.diff(GROUP, older, newer).members
    assert member.memory == PageChanges(
        same, len(both) - same, len(new.keys() - old.keys()), len(old.keys() - new.keys())
    )


def test_long_stretches_are_compared_in_steps(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "_STEP_PAGES", 7)
    older, newer = dump(store, images.simple(1, 60)), dump(store, images.simple(31, 60))
    (member,) = store.diff(GROUP, older, newer).members
    assert member.memory == PageChanges(same=2, changed=60)


def test_what_is_not_there_or_damaged_is_told(store: Store) -> None:
    epoch = dump(store, images.simple())
    absent = store.new_epoch(GROUP, now_s=NOW_S)
    for pair in ((epoch, absent), (absent, epoch)):
        with pytest.raises(errors.NotFound):
            store.diff(GROUP, *pair)
    store.volume.delete(layout.member_name(GROUP, epoch, MEMBER))
    with pytest.raises(errors.Missing):
        store.diff(GROUP, epoch, epoch)
