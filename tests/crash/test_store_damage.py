"""Damage on the volume: whatever bit, byte or file it hits, it is found and named, and nothing of
it is ever given to a restore."""

from __future__ import annotations

import functools
import os
import random

import pytest

from agent import errors
from agent.model import ids
from agent.model.streams import AddressSpace
from agent.store import layout
from agent.store.repository import Store
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.images import GROUP, MEMBER, NOW_S

FLIPS = 10_000
SEED = int(os.environ.get("CKPT_TEST_SEED", "20261121"))

Blobs = dict[str, bytes]


@functools.cache
def _stored() -> Blobs:
    """An epoch of every kind of content, compressed and raw blocks among it."""
    noise = images.MemberImage(
        {AddressSpace("shmem", 2): ((3, 1, (0, 0, 1, 2)),)},
        {"pstree.img": random.Random(1).randbytes(20_000)},
        {"/log": b"text " * 5000},
        {"a": [1, 2.5, "x"]},
    )
    volume = MemoryVolume()
    with Store.open(volume, create=True).begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, {**images.simple(1, 30), ids.member_name("other"): noise})
        epoch.commit({})
    return {
        info.name: volume.read(info.name) for info in volume.list() if info.name != layout.RESERVE
    }


def _volume(blobs: Blobs) -> MemoryVolume:
    volume = MemoryVolume()
    for name, content in blobs.items():
        volume.put(name, content)
    return volume


def _restore_reads(store: Store) -> None:
    """Read what a restore reads, by the way that a restore takes."""
    reader = store.read(*store.resolve("group"))
    for name in reader.members:
        member = reader.member(name)
        member.check()
        for space in member.spaces():
            for _ in member.read(space):
                pass
        for _ in member.metadata():
            pass
        for entry in member.files():
            if entry.kind == "file":
                for _ in member.file_content(entry.path):
                    pass


def _assert_found(blobs: Blobs, name: str, what: str) -> None:
    volume = _volume(blobs)
    if name == layout.STORE:
        with pytest.raises((errors.DataError, errors.NotFound)) as caught:
            Store.open(volume)
        assert not isinstance(caught.value, errors.NotFound) or name not in blobs, what
        return
    store = Store.open(volume)
    file = layout.parse_group_file(name)
    if name not in blobs and file is not None and file.member is None:
        assert store.epochs() == []  # without the commit there is no epoch
        return
    report = store.verify(*store.resolve("group"), None)
    assert not report.good, what
    assert name in {damage.part for damage in report.damaged}, what
    with pytest.raises(errors.DataError) as damage:
        _restore_reads(store)
    assert name in f"{damage.value.facts} {damage.value.message}", what


def test_an_undamaged_store_is_good() -> None:
    store = Store.open(_volume(_stored()))
    assert store.verify(*store.resolve("group"), None).good
    _restore_reads(store)


@pytest.mark.slow
def test_no_flipped_bit_goes_unnoticed() -> None:
    """Ten thousand single bits, evenly over files of all sizes and over all bits of each."""
    rng = random.Random(SEED)
    blobs = _stored()
    names = sorted(blobs)
    for number in range(FLIPS):
        # Every second one anywhere, by size; the others in a file chosen first, for the small.
        weights = [len(blobs[name]) for name in names] if number % 2 else None
        name = rng.choices(names, weights)[0]
        bit = rng.randrange(len(blobs[name]) * 8)
        content = bytearray(blobs[name])
        content[bit // 8] ^= 1 << bit % 8
        _assert_found({**blobs, name: bytes(content)}, name, f"seed {SEED}: bit {bit} of {name}")


def test_no_truncation_or_extension_goes_unnoticed() -> None:
    blobs = _stored()
    for name, content in blobs.items():
        size = len(content)
        for length in sorted({0, 1, 8, 16, 31, 32, 33, size // 2, size - 33, size - 32, size - 1}):
            if 0 <= length < size:
                cut = {**blobs, name: content[:length]}
                _assert_found(cut, name, f"{name} cut to {length}")
        for tail in (b"\0", b"x" * 100, content):
            _assert_found({**blobs, name: content + tail}, name, f"{name} extended")


def test_no_removed_file_goes_unnoticed() -> None:
    blobs = _stored()
    for name in blobs:
        left = {other: content for other, content in blobs.items() if other != name}
        _assert_found(left, name, f"{name} removed")


def test_no_swapped_files_go_unnoticed() -> None:
    """Each is good by itself, and in the wrong place."""
    blobs = _stored()
    for one in blobs:
        for other in blobs:
            if one != other:
                _assert_found({**blobs, one: blobs[other]}, one, f"{other} in place of {one}")


def test_a_removed_file_is_missing_and_a_changed_one_is_corrupt() -> None:
    blobs = _stored()
    pack = next(name for name in blobs if name.startswith(layout.PACKS))
    store = Store.open(_volume({n: c for n, c in blobs.items() if n != pack}))
    with pytest.raises(errors.Missing):
        _restore_reads(store)
    store = Store.open(_volume({**blobs, pack: bytes(len(blobs[pack]))}))
    with pytest.raises(errors.Corrupt):
        _restore_reads(store)


def test_damage_of_one_member_leaves_the_others_readable() -> None:
    blobs = _stored()
    group, epoch = Store.open(_volume(blobs)).resolve("group")
    name = layout.member_name(group, epoch, ids.member_name("other"))
    store = Store.open(_volume({**blobs, name: b""}))
    images.assert_member(store.read(group, epoch).member(MEMBER), images.simple(1, 30)[MEMBER])
