"""How much memory readers hold, alone and beside those of other members."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import pytest

from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun
from agent.store.reader import EpochReader, MemberReader
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests.images import GROUP, MEMBER, NOW_S

_SPACE = AddressSpace("process", 7)
_MIB = 1 << 20
_SIZE_BYTES = 32 * _MIB
# What a restore reads a member with: the member itself, who answers, and who streams.
_READERS = 3


@pytest.fixture(scope="module")
def epoch(tmp_path_factory: pytest.TempPathFactory) -> EpochReader:
    """32 MiB of memory, of which no page is like another one."""
    store = Store.open(DirectoryVolume(str(tmp_path_factory.mktemp("store"))), create=True)
    noise = random.Random(7)
    with store.begin(GROUP, now_s=NOW_S) as writer:
        sink = writer.member(MEMBER)
        for start in range(0, _SIZE_BYTES, _MIB):
            run = PageRun(start, _MIB // PAGE_BYTES, 0)
            sink.pages(_SPACE, run, memoryview(noise.randbytes(_MIB)))
        sink.facts({})
        summary = writer.commit({})
    return store.read(GROUP, summary.epoch)


def _peak_bytes(readers: list[MemberReader]) -> int:
    """The most that these hold, reading all pages in turns."""
    tracemalloc.start()
    try:
        for step in itertools.zip_longest(*(reader.read(_SPACE) for reader in readers)):
            assert None not in step
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _beside(epoch: EpochReader, parties: int) -> list[MemberReader]:
    found = []
    for _ in range(parties):
        member = epoch.member(MEMBER, parties=parties)
        member.present()
        found += [member.beside() for _ in range(_READERS)]
    return found


@pytest.mark.parametrize("parties", [1, 2, 3, 8])
def test_the_readers_of_several_members_hold_no_more_than_those_of_one(
    epoch: EpochReader, parties: int
) -> None:
    assert _peak_bytes(_beside(epoch, parties)) < _READERS * 34 * _MIB
