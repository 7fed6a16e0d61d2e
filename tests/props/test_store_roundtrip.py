"""Whatever is stored comes back: formats, and whole epochs against a dictionary."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.model import ids
from agent.model.streams import AddressSpace
from agent.store import dedup, envelope, identity, pack, pagetable
from agent.store.repository import EpochSummary, Store
from agent.volumes.memory import MemoryVolume
from tests import images

KEY = bytes(range(16))


@given(st.sampled_from(envelope.Kind), st.binary(max_size=500))
def test_an_envelope_gives_its_body_back(kind: envelope.Kind, body: bytes) -> None:
    assert envelope.unseal(kind, envelope.seal(kind, body), part="x") == body


@st.composite
def tables(draw: st.DrawFn) -> tuple[pagetable.Table, list[int]]:
    sizes = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=4))
    runs = []
    page = 0
    for _ in range(draw(st.integers(0, 30))):
        page += draw(st.sampled_from([0, 0, 1, 7, 1 << 20, 1 << 40]))
        number = draw(st.integers(-1, len(sizes) - 1))
        most = sizes[number] if number >= 0 else 100_000
        pages = draw(st.integers(1, most))
        ordinal = draw(st.integers(0, most - pages)) if number >= 0 else 0
        runs.append((page, pages, draw(st.integers(0, pagetable.MAX_FLAGS)), number, ordinal))
        page += pages
    columns = np.array(runs, dtype=np.int64).reshape(-1, 5).T
    return pagetable.Table(*columns), sizes


@given(tables())
def test_a_page_table_comes_back(case: tuple[pagetable.Table, list[int]]) -> None:
    table, sizes = case
    found = pagetable.decode(pagetable.encode(table), sizes)
    for column in ("start", "pages", "flags", "pack", "ordinal"):
        assert (getattr(found, column) == getattr(table, column)).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(-1, 60)), max_size=60))
def test_joined_runs_say_the_same_of_every_page(pages: list[tuple[int, int, int]]) -> None:
    builder = pagetable.TableBuilder()
    expected = {}
    page = 0
    for gap, flags, row in pages:
        page += gap
        expected[page] = (flags, row)
        builder.add(np.array([page]), np.array([flags]), np.array([row]))
        page += 1
    found = {}
    runs = builder.runs().T.tolist()
    for start, count, flags, row in runs:
        for at in range(count):
            found[start + at] = (flags, row + at if row >= 0 else -1)
    assert found == expected
    for (start, count, flags, row), following in itertools.pairwise(runs):
        place = row + count if row >= 0 else -1
        assert following[:1] + following[2:] != [start + count, flags, place]


@given(st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=40), max_size=20), st.data())
def test_the_page_index_finds_exactly_what_it_was_given(
    batches: list[list[int]], data: st.DataObject
) -> None:
    """Tags that share their low bits go to the same slot first."""
    shift = data.draw(st.sampled_from([0, 40]))
    zero = np.zeros(2, dtype=np.uint64)

    def tag(number: int) -> list[int]:
        return [number << shift, number * 7]

    index = dedup.PageIndex(zero)
    expected: dict[int, int] = {}
    for batch in batches:
        new = sorted(set(batch) - expected.keys())
        if new:
            first = index.extend(np.array([tag(n) for n in new], dtype=np.uint64))
            expected.update({n: first + at for at, n in enumerate(new)})
        index.leave_out()
        asked = list(range(1, 501))
        rows = index.find(np.array([tag(n) for n in asked], dtype=np.uint64))
        assert rows.tolist() == [expected.get(n, -1) for n in asked]


def test_the_page_index_grows_past_a_million_pages_in_bounded_space() -> None:
    rng = np.random.default_rng(1)
    tags = rng.integers(0, 1 << 63, (1_100_000, 2)).astype(np.uint64)
    index = dedup.PageIndex(np.zeros(2, dtype=np.uint64))
    for start in range(0, len(tags), 10_000):
        index.extend(tags[start : start + 10_000])
    assert (index.find(tags) == np.arange(len(tags))).all()
    assert (index.find(tags[::-1].copy() + np.uint64(1)) == -1).all()
    assert index.memory_bytes < 40 * len(tags)


def test_tags_tell_pages_apart_by_every_bit() -> None:
    one = identity.Identity(KEY)
    data = bytearray(images.page(3) + images.page(0))
    tags = one.tags(memoryview(data))
    assert (tags[1] == one.zero).all()
    assert (identity.Identity(KEY).tags(memoryview(data)) == tags).all()
    assert (identity.Identity(bytes(16)).tags(memoryview(data)) != tags).any()
    for bit in range(0, 4096 * 8, 997):
        data[bit // 8] ^= 1 << bit % 8
        assert (one.tags(memoryview(data)[:4096])[0] != tags[0]).any()
        data[bit // 8] ^= 1 << bit % 8


@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=5))
def test_a_pack_index_comes_back(blocks: list[tuple[int, bool]]) -> None:
    pages = np.array([count for count, _ in blocks])
    raw = np.array([is_raw for _, is_raw in blocks])
    index = pack.PackIndex(
        pages,
        np.where(raw, pages * 4096, pages * 17),
        np.where(raw, 0, 1).astype(np.uint8),
        b"".join(bytes([at]) * 32 for at in range(len(blocks))),
        np.arange(2 * pages.sum(), dtype=np.uint64).reshape(-1, 2),
    )
    found = pack.decode(pack.encode(index), part="x")
    assert found.pages == index.pages == pages.sum()
    assert (found.tags == index.tags).all()
    assert [found.digest(at)[0] for at in range(len(blocks))] == list(range(len(blocks)))
    assert found.index_offset == found.offsets[-1] + found.stored_bytes[-1]


@st.composite
def runs(draw: st.DrawFn) -> images.Runs:
    result = []
    first = 0
    for _ in range(draw(st.integers(0, 4))):
        first += draw(st.sampled_from([0, 1, 5, 1 << 33]))
        # Long runs take another way through the writer than short ones.
        count = draw(st.sampled_from([1, 2, 3, 63, 64, 300, 700]))
        start, step = draw(st.integers(0, 900)), draw(st.sampled_from([0, 1, 1, 3]))
        numbers = tuple(start + step * at for at in range(count))
        result.append((first, draw(st.integers(0, 3)), numbers))
        first += count
    return tuple(result)


names = st.sampled_from(["a.img", "b.img", "pages.weird name"])
paths = st.sampled_from(["/a", "/b/c", "/\udcff", "/ä b"])
contents = st.one_of(
    st.binary(max_size=100),
    st.sampled_from([bytes(4096), bytes(10_000) + b"x", images.page(5) * 3, b"y" * 3_000_000]),
)
spaces = st.builds(AddressSpace, st.sampled_from(["process", "shmem"]), st.integers(1, 3))
members = st.builds(
    images.MemberImage,
    st.dictionaries(spaces, runs(), max_size=3),
    st.dictionaries(names, contents, max_size=2),
    st.dictionaries(paths, contents, max_size=2),
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=9)), max_size=3),
)
member_names = st.sampled_from(["rank-0", "rank-1"]).map(ids.member_name)
epochs = st.lists(st.dictionaries(member_names, members, min_size=1), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(epochs)
def test_every_epoch_comes_back_as_it_was_written(stored: list[images.Image]) -> None:
    store = Store.open(MemoryVolume(), create=True)
    written: list[EpochSummary] = []
    for image in stored:
        with store.begin(images.GROUP, now_s=images.NOW_S) as epoch:
            images.write(epoch, image)
            written.append(epoch.commit({"number": len(written)}))
    assert store.epochs() == written
    assert [summary.epoch for summary in written] == sorted(s.epoch for s in written)
    for number, (summary, image) in enumerate(zip(written, stored, strict=True)):
        reader = store.read(summary.group, summary.epoch)
        assert reader.facts == {"number": number}
        images.assert_epoch(reader, image)
        assert store.verify(summary.group, summary.epoch).good
