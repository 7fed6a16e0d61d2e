"""Whether memory comes while a tree runs or before: what is chosen, and what happens when that
fails.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, Fills, RestoreOptions
from agent.engines.criu import lazy
from agent.host import proc
from agent.model import ids
from agent.node import dump as node_dump
from agent.node import restore as node_restore
from agent.store import blocks, catalog
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests.host.conftest import TARGETS, Gate, Host
from tests.host.image import MemoryImage, MemorySource
from tests.host.test_epochs import flip
from tests.host.test_lazy_restore import Filled, keepers, until

GROUP = ids.group_name("job")


@pytest.fixture
def filled(host: Host) -> Filled:
    """A running tree with much memory of a known content."""
    folder = host.folder / "target"
    folder.mkdir()
    popen = host.popen([sys.executable, str(TARGETS / "filled.py"), str(folder)])
    target = Filled(folder, popen.pid)
    assert target.said() == "right"
    return target


def big_block(root: Path, epoch: str) -> tuple[Path, int, str]:
    """A block of this epoch's own packs that holds nothing but one of the large areas' pages: its
    pack's file, a place in it, and the pack's name.
    """
    volume = DirectoryVolume(str(root))
    reader = Store.open(volume).read(GROUP, ids.EpochId(epoch))
    member = catalog.read_member(volume, reader._manifest, reader.members[0])
    for ref in member.packs:
        table = blocks.BlockTable(ref, catalog.read_pack_index(volume, ref))
        for block in range(len(table.block_pages) if epoch in ref.name else 0):
            words = memoryview(table.load(volume, block)).cast("Q")[::512]
            if all(word >> 60 == 1 for word in words):
                return root / ref.name, int(table.offsets[block]), ref.name
    raise AssertionError("no such block")


def test_a_block_that_is_found_damaged_while_the_tree_runs_ends_it_and_an_older_image_is_named(
    host: Host, filled: Filled, tmp_path: Path
) -> None:
    other = host.start("memory")
    store = Store.open(DirectoryVolume(str(tmp_path / "store"), create=True), create=True)
    epochs = [
        node_dump.dump(
            *(store, host.engine, GROUP),
            [node_dump.Member(ids.member_name("tree-0"), pid)],
            CaptureOptions(),
        ).epoch.epoch
        for pid in (other.pid, filled.pid)
    ]
    host.kill(other)
    host.kill(filled)
    pack, at, part = big_block(tmp_path / "store", epochs[1])
    flip(pack, at)
    ran: list[bool] = []

    def look(now: node_restore.Progress) -> None:
        if now.phase == "fill":
            ran.append(proc.exists(filled.pid))

    with pytest.raises(errors.Corrupt, match="which ran already, were ended") as caught:
        node_restore.restore(
            store, host.engine, GROUP, RestoreOptions(fills=Fills()), progress=look
        )
    assert ran[0]
    assert caught.value.facts["part"] == part
    older = ids.image_name(GROUP, epochs[0])
    assert caught.value.facts["older_good"] == older
    assert older in caught.value.hint
    assert not proc.exists(filled.pid)
    until(lambda: not keepers())
    host.assert_clean()


class Looked(MemorySource):
    """Knows when it was verified whole."""

    def __init__(self, image: MemoryImage, refuse: bool = False) -> None:
        super().__init__(image)
        self.verified = threading.Event()
        self._refuse = refuse

    def check(self) -> None:
        self.verified.set()
        if self._refuse:
            raise errors.Corrupt("a block is damaged", part="packs/1")
        super().check()


def test_where_little_memory_could_come_late_all_of_it_is_verified_before_anything_starts(
    host: Host, filled: Filled
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    options = RestoreOptions(fills=Fills(least_bytes=1 << 30))
    with pytest.raises(errors.Corrupt, match="damaged"):
        host.engine.restore(Looked(image, refuse=True), options, Gate())
    assert not proc.exists(filled.pid)
    tree = host.engine.restore(Looked(image), options, Gate())
    host.trees.append(tree)
    assert options.fills is not None
    assert options.fills.total_bytes == 0
    assert keepers() == []
    filled.ask("some", "moved", "forgotten", "all")
    tree.kill()
    host.assert_clean()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A kernel that does not let a process wait for its memory; who asked."""
    asked: list[int] = []

    def refuse(descriptor: int, deferred: lazy.Deferred, pid: int) -> None:
        asked.append(pid)
        raise errors.RestoreFailed("the kernel refuses")

    monkeypatch.setattr(lazy, "ask_for", refuse)
    yield asked
    assert asked


def test_where_memory_cannot_come_late_all_of_it_comes_first(
    host: Host, filled: Filled, refused: list[int]
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    fills, source = Fills(), Looked(image)
    stood: list[bool] = []
    gate = Gate(restored=lambda: stood.append(source.verified.is_set()))
    tree = host.engine.restore(source, RestoreOptions(fills=fills), gate)
    host.trees.append(tree)
    assert refused == [filled.pid]
    assert stood == [True]
    assert fills.total_bytes == 0
    filled.ask("some", "moved", "forgotten", "all")
    os.kill(tree.pid, 0)
    tree.kill()
    host.assert_clean()


def test_once_others_count_on_it_a_restore_that_fails_is_not_tried_again(
    host: Host, filled: Filled
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    asked: list[str] = []

    def refuse() -> None:
        asked.append("restored")
        raise errors.RestoreFailed("another member failed")

    source = Looked(image)
    with pytest.raises(errors.RestoreFailed, match="another member failed"):
        host.engine.restore(source, RestoreOptions(fills=Fills()), Gate(restored=refuse))
    assert asked == ["restored"]
    assert not source.verified.is_set()
    assert not proc.exists(filled.pid)
    until(lambda: not keepers())
    host.assert_clean()
