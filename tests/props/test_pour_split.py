"""Which pages of a tree the agent writes itself and which it leaves to CRIU."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.engines.criu.pour import Area, ProcessMemory, Split, split
from agent.model.streams import PAGE_BYTES, PageRun

ANON, FILE, SHARED, VDSO, HUGETLB = 1 << 9, 1 << 6, 1 << 8, 1 << 3, 0x40000


def area(start: int, pages: int, status: int = ANON, flags: int = 0) -> Area:
    begin = start * PAGE_BYTES
    return Area(begin, begin + pages * PAGE_BYTES, status | 1, flags, 0, 0)


def process(
    *areas: Area, pid: int = 7, parent: int = 0, rseq: tuple[int, ...] = ()
) -> ProcessMemory:
    return ProcessMemory(pid, parent, areas, rseq)


def run(start: int, pages: int, flags: int = 4) -> PageRun:
    return PageRun(start * PAGE_BYTES, pages, flags)


def pages_of(runs: tuple[PageRun, ...]) -> list[tuple[int, int]]:
    return [(r.address // PAGE_BYTES + page, r.flags) for r in runs for page in range(r.pages)]


def alone(subject: ProcessMemory, *runs: PageRun) -> Split:
    return split(subject, {subject.pid: subject}, runs)


def test_private_memory_is_poured_and_a_fresh_mapping_is_known_as_fresh() -> None:
    share = alone(process(area(10, 5), area(20, 5, FILE)), run(10, 5), run(20, 2))
    assert share == Split(criu=(), poured=(run(20, 2),), poured_fresh=(run(10, 5),))


def test_a_run_over_two_mappings_is_cut_at_their_border() -> None:
    share = alone(process(area(10, 5), area(15, 5, FILE)), run(13, 4))
    assert share == Split(criu=(), poured=(run(15, 2),), poured_fresh=(run(13, 2),))


def test_shared_huge_and_kernel_mappings_stay_with_criu() -> None:
    subject = process(area(1, 1, SHARED), area(2, 1, ANON, HUGETLB), area(3, 1, ANON | VDSO))
    assert alone(subject, run(1, 3)).criu == (run(1, 1), run(2, 1), run(3, 1))


def test_a_page_outside_every_mapping_stays_with_criu() -> None:
    assert alone(process(area(10, 1)), run(9, 3)).criu == (run(9, 1), run(11, 1))


def test_the_page_of_an_rseq_area_stays_with_criu() -> None:
    subject = process(area(10, 10), rseq=(14 * PAGE_BYTES + 96,))
    share = alone(subject, run(10, 10))
    assert share.criu == (run(14, 1),)
    assert share.poured_fresh == (run(10, 4), run(15, 5))


def test_what_parent_and_child_may_share_by_copy_on_write_stays_with_criu_in_both() -> None:
    parent = process(area(10, 5), area(40, 5), pid=1)
    child = process(area(10, 5), area(60, 5), pid=2, parent=1)
    family = {1: parent, 2: child}
    assert split(parent, family, [run(10, 5), run(40, 5)]).criu == (run(10, 5),)
    assert split(child, family, [run(10, 5), run(60, 5)]).criu == (run(10, 5),)


@given(
    spans=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=12),
    kinds=st.lists(st.sampled_from([ANON, FILE, SHARED, ANON | VDSO]), min_size=12, max_size=12),
    gaps=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 20), st.integers(0, 7)), max_size=12),
    rseq=st.lists(st.integers(0, 150 * PAGE_BYTES), max_size=4),
)
def test_every_page_goes_one_way_and_only_one(
    spans: list[tuple[int, int]],
    kinds: list[int],
    gaps: list[tuple[int, int, int]],
    rseq: list[int],
) -> None:
    areas, at = [], 0
    for (gap, pages), kind in zip(spans, kinds, strict=False):
        areas.append(area(at + gap, pages, kind))
        at += gap + pages
    runs, at = [], 0
    for gap, pages, flags in gaps:
        runs.append(run(at + gap, pages, flags))
        at += gap + pages
    share = alone(process(*areas, rseq=tuple(rseq)), *runs)
    everything = [pages_of(part) for part in (share.criu, share.poured, share.poured_fresh)]
    assert sorted(page for part in everything for page in part) == pages_of(tuple(runs))
    assert all(part == sorted(part) for part in everything)
