"""A read of the image that fails for a moment, and one that goes on failing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from agent import errors
from agent.engines.criu import rereading
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun
from agent.store.repository import Store
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import Fault, FaultyVolume
from tests.host.image import MemoryImage, MemorySource
from tests.images import GROUP, MEMBER, NOW_S

SPACE = AddressSpace("process", 7)
_RUNS = [PageRun(0x10000, 3, 4), PageRun(0x40000, 2, 4)]


class Failing(MemorySource):
    """Raises what ``plan`` gives for a page, when it comes to it; counts the tries."""

    def __init__(self, plan: Callable[[int, int], errors.CkptError | None]) -> None:
        image = MemoryImage()
        for run in _RUNS:
            for page in range(run.pages):
                at = run.address + page * PAGE_BYTES
                image.pages(SPACE, PageRun(at, 1, 4), memoryview(images.page(at)))
        super().__init__(image)
        self._plan = plan
        self.tries: dict[int, int] = {}

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        for address, data, pages in super().read(space, runs):
            self.tries[address] = self.tries.get(address, 0) + 1
            if (failure := self._plan(address, self.tries[address])) is not None:
                raise failure
            yield address, data, pages


def collected(source: MemorySource, patience_s: float = 20) -> list[tuple[int, bytes]]:
    read = rereading.read(source, SPACE, _RUNS, time.sleep, patience_s)
    return [(address, bytes(data)) for address, data, _ in read if data is not None]


_ALL = [
    (at, images.page(at))
    for run in _RUNS
    for at in range(run.address, run.address + run.pages * PAGE_BYTES, PAGE_BYTES)
]


def test_what_fails_for_a_moment_comes_once_and_in_order() -> None:
    def plan(address: int, tried: int) -> errors.CkptError | None:
        return errors.VolumeGone("away") if address in (0x11000, 0x41000) and tried < 3 else None

    source = Failing(plan)
    assert collected(source) == _ALL
    assert source.tries == {at: 3 if at in (0x11000, 0x41000) else 1 for at, _ in _ALL}


def test_each_damaged_place_is_read_once_more() -> None:
    def once(address: int, tried: int) -> errors.CkptError | None:
        return errors.Corrupt("rotten") if address in (0x10000, 0x41000) and tried < 2 else None

    assert collected(Failing(once)) == _ALL

    def always(address: int, tried: int) -> errors.CkptError | None:
        return errors.Corrupt("rotten") if address == 0x12000 else None

    source = Failing(always)
    with pytest.raises(errors.Corrupt):
        collected(source)
    assert source.tries[0x12000] == 2


@pytest.mark.parametrize("failure", [errors.Missing("gone"), errors.BlobNotFound("gone")])
def test_what_is_missing_is_not_asked_for_again(failure: errors.CkptError) -> None:
    source = Failing(lambda address, tried: failure if address == 0x11000 else None)
    with pytest.raises(type(failure)):
        collected(source)
    assert source.tries[0x11000] == 1


def test_a_volume_that_stays_away_is_given_up() -> None:
    source = Failing(lambda address, tried: errors.VolumeGone("away"))
    with pytest.raises(errors.VolumeGone):
        collected(source, patience_s=0.2)
    assert source.tries[0x10000] > 1


def test_a_failure_behind_the_last_page_is_none() -> None:
    class Late(Failing):
        def read(
            self, space: AddressSpace, runs: Sequence[PageRun] | None = None
        ) -> Iterator[tuple[int, memoryview | None, int]]:
            yield from super().read(space, runs)
            raise errors.Corrupt("rotten")

    source = Late(lambda address, tried: None)
    assert collected(source) == _ALL
    assert set(source.tries.values()) == {1}


def test_who_ends_it_is_heard_in_the_pause() -> None:
    def pause(pause_s: float) -> None:
        raise InterruptedError

    source = Failing(lambda address, tried: errors.VolumeGone("away"))
    with pytest.raises(InterruptedError):
        list(rereading.read(source, SPACE, _RUNS, pause, 20))


@pytest.mark.parametrize("ahead", [True, False])
def test_a_store_whose_volume_fails_for_a_moment_gives_what_it_holds(ahead: bool) -> None:
    """Also what was asked for ahead of time when the volume was away."""
    failed: list[str] = []
    away = False

    def plan(number: int, method: str, name: str) -> Fault | None:
        if not away or method != "read" or len(failed) == 3:
            return None
        failed.append(name)
        return Fault(errors.VolumeError("input/output error"))

    volume = FaultyVolume(MemoryVolume(), plan)
    store = Store.open(volume, create=True)
    numbers = tuple(range(1, 3001))
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, {MEMBER: images.MemberImage({SPACE: ((0, 0, numbers),)})})
        summary = epoch.commit({})
    member = store.read(GROUP, summary.epoch).member(MEMBER)
    member.present()
    reader = member if ahead else member.beside()
    away = True
    found = [
        (address, bytes(data))
        for address, data, _ in rereading.read(
            reader, SPACE, [PageRun(0, len(numbers), 0)], time.sleep, 20
        )
        if data is not None
    ]
    assert len(failed) == 3
    assert b"".join(data for _, data in found) == b"".join(map(images.page, numbers))
    assert [address for address, _ in found] == sorted({address for address, _ in found})


def test_another_reader_of_a_member_reads_no_index_again() -> None:
    reads: list[str] = []

    def plan(number: int, method: str, name: str) -> Fault | None:
        if method == "read":
            reads.append(name)
        return None

    store = Store.open(FaultyVolume(MemoryVolume(), plan), create=True)
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, {MEMBER: images.MemberImage({SPACE: ((0, 0, (1, 2, 3)),)})})
        summary = epoch.commit({})
    member = store.read(GROUP, summary.epoch).member(MEMBER)
    member.present()
    for _ in range(2):
        reads.clear()
        assert len(list(member.beside().read(SPACE, [PageRun(0, 3, 0)]))) == 1
        assert len(reads) == 1  # the block
