"""Whatever stands in a checkpoint archive: it is stored whole, or refused with nothing left."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent import errors
from agent.engines.kubelet import archive, ingest, tarindex
from agent.model import ids
from agent.store.repository import Store
from agent.volumes.memory import MemoryVolume
from tests import archives
from tests.archives import Entry
from tests.images import EMPTY, GROUP, MEMBER, NOW_S

GOOD = archives.entries()
WHOLE = archives.tar(GOOD)
NAMES = tuple(entry.name for entry in GOOD)
IMAGES = tuple(name for name in NAMES if name.endswith((".img", ".dump", ".tar", "status")))


def store_it(content: bytes) -> bool:
    """Take an archive into a store as the product does; whether it was committed.

    Any error but damage fails the test, and so does anything left of a refused one.
    """
    volume = MemoryVolume()
    store = Store.open(volume, create=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = archives.write(Path(folder) / "a.tar", content)
            with archive.opened(path) as source, store.begin(GROUP, now_s=NOW_S) as writer:
                ingest.ingest(source, writer.member(MEMBER), {})
                writer.commit({})
    except errors.Corrupt:
        assert [blob.name for blob in volume.list()] == EMPTY
        return False
    epoch = store.epochs(GROUP)[0].epoch
    store.read(GROUP, ids.epoch_id(epoch)).member(MEMBER).check()
    return True


_flips = st.lists(
    st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(_flips)
def test_changed_bytes_anywhere(flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(WHOLE)
    for at, bits in flips:
        damaged[at] ^= bits
    store_it(bytes(damaged))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
@example(len(WHOLE.rstrip(b"\0")) + 512)
def test_cut_short_anywhere(length: int) -> None:
    # The padding behind the two blocks of zeros that end a tar file may be missing.
    complete = len(WHOLE.rstrip(b"\0")) + 1024 + 511
    assert store_it(WHOLE[:length]) <= (length >= complete // 512 * 512)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(IMAGES), st.data())
def test_a_part_with_other_content(name: str, data: st.DataObject) -> None:
    original = next(entry.content for entry in GOOD if entry.name == name)
    at = data.draw(st.integers(0, len(original)))
    removed = data.draw(st.integers(0, 16))
    put = data.draw(st.binary(max_size=16))
    changed = original[:at] + put + original[at + removed :]
    store_it(
        archives.tar(tuple(Entry(e.name, changed, e.type) if e.name == name else e for e in GOOD))
    )


_TEXT = st.characters(exclude_characters="\0", codec="utf-8")
_names = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(("..", "/", "./", "checkpoint/..", "a/../b", "checkpoint/x/", "\n", "x" * 300)),
    st.text(_TEXT, max_size=12),
)
_entries = st.builds(
    Entry,
    name=_names,
    content=st.binary(max_size=40),
    type=st.sampled_from([bytes([number]) for number in range(0x20, 0x7F)]),
    link=_names,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_entries, min_size=1, max_size=3), st.integers(0, len(GOOD)))
def test_foreign_members(foreign: list[Entry], where: int) -> None:
    mixed = (*GOOD[:where], *foreign, *GOOD[where:])
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):  # noqa: A001
        store_it(archives.tar(mixed, format))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(GOOD), max_size=len(GOOD), unique_by=lambda entry: entry.name))
def test_missing_members(kept: list[Entry]) -> None:
    whole = {entry.name for entry in kept} >= {
        entry.name for entry in GOOD if entry.name.startswith("checkpoint/pag")
    }
    if store_it(archives.tar(tuple(kept))):
        assert whole


@settings(max_examples=100, deadline=None)
@given(st.permutations(GOOD))
def test_the_order_of_members_does_not_matter(entries: list[Entry]) -> None:
    assert store_it(archives.tar(tuple(entries)))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=4096))
def test_bytes_that_are_no_tar_file(raw: bytes) -> None:
    try:
        found = tarindex.members(io.BytesIO(raw))
    except errors.Corrupt:
        return
    assert found == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(
                st.characters(exclude_characters="\0/", codec="utf-8"),
                min_size=1,
                max_size=150,
            ).filter(lambda name: name not in (".", "..")),
            st.binary(max_size=1500),
        ),
        max_size=5,
        unique_by=lambda each: each[0],
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_what_tarfile_writes_is_found_again(members: list[tuple[str, bytes]], format: int) -> None:  # noqa: A002
    raw = archives.tar(tuple(Entry(name, content) for name, content in members), format)
    found = tarindex.members(io.BytesIO(raw))
    assert [(each.name, raw[each.offset :][: each.size_bytes]) for each in found] == members
