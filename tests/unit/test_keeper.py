"""What the keeper of a tree's missing pages knows of mappings that move, shrink and go."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engines.criu import keeper, lazy, pour, treeend, uffd
from agent.engines.criu.keeper import View
from agent.engines.criu.uffd import PAGE_BYTES
from agent.model.streams import PageRun

_PAGES = 40
_places = st.integers(0, _PAGES - 1)
_spans = st.integers(1, _PAGES)
_changes = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), _places, _spans, st.just(0)),
        st.tuples(st.just("move"), _places, _spans, st.integers(_PAGES, 2 * _PAGES)),
        st.tuples(st.just("back"), _places, _spans, _places),
    ),
    max_size=12,
)


@pytest.mark.parametrize("many", [0, 64])
@given(changes=_changes, at=_places, span=_spans)
def test_pages_are_looked_for_where_they_went(
    many: int, changes: list[tuple[str, int, int, int]], at: int, span: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper, "_MANY", many)
        _look_for_pages_where_they_went(changes, at, span)


def _look_for_pages_where_they_went(
    changes: list[tuple[str, int, int, int]], at: int, span: int
) -> None:
    view = View(
        -1, 0, [(0, 10 * PAGE_BYTES, 0), (15 * PAGE_BYTES, 40 * PAGE_BYTES, 15 * PAGE_BYTES)]
    )
    model = {page: page for page in (*range(10), *range(15, 40))}
    for kind, start, pages, to in changes:
        begin = start + (_PAGES if kind == "back" else 0)
        if kind == "cut":
            view.cut(begin * PAGE_BYTES, (begin + pages) * PAGE_BYTES)
            model = {p: o for p, o in model.items() if not begin <= p < begin + pages}
        elif abs(begin - to) >= pages:  # the kernel moves to where it does not overlap
            view.move(begin * PAGE_BYTES, to * PAGE_BYTES, pages * PAGE_BYTES)
            moved = {p - begin + to: o for p, o in model.items() if begin <= p < begin + pages}
            gone = (*range(begin, begin + pages), *range(to, to + pages))
            model = {p: o for p, o in model.items() if p not in gone} | moved
    assert view.segments == sorted(view.segments)
    for page in range(4 * _PAGES):
        origin = model.get(page)
        found = view.origin(page * PAGE_BYTES + 5 & -PAGE_BYTES)
        assert found == (None if origin is None else origin * PAGE_BYTES)
    low, high = at * PAGE_BYTES, (at + span) * PAGE_BYTES
    seen = []
    while (first := view.first(low, high)) is not None:
        address, low, size = first
        seen += [(address + n, low + n) for n in range(0, size, PAGE_BYTES)]
        low += size
    wanted = sorted((o, p) for p, o in model.items() if at <= o < at + span)
    assert sorted((o, p) for p, o in seen) == [(o * PAGE_BYTES, p * PAGE_BYTES) for o, p in wanted]


def test_what_moved_to_where_something_else_has_just_left_is_still_missing() -> None:
    here, there, away = 16 * PAGE_BYTES, 64 * PAGE_BYTES, 128 * PAGE_BYTES
    length = 4 * PAGE_BYTES
    view = View(-1, 0, [(at, at + length, at) for at in (here, there)])
    # As the kernel tells of two threads that move at once (seen on 6.18).
    view.move(here, away, length)
    view.move(there, here, length)
    view.unmap(here, here + length)
    view.unmap(there, there + length)
    assert view.segments == [(here, here + length, there), (away, away + length, here)]
    view.unmap(here, here + length)
    assert view.segments == [(away, away + length, here)]


class _Unwalked(list[tuple[int, int, int]]):
    """May only be searched."""

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        raise AssertionError("a piece is looked for by walking through all segments")


def test_where_memory_is_sparse_a_piece_is_found_without_walking_through_all_of_it() -> None:
    pages = 4096
    view = View(-1, 0, [(0, 2 * pages * PAGE_BYTES, 0)])
    for page in range(0, 2 * pages, 2):
        view.cut(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
    assert len(view.segments) == pages
    view.segments = _Unwalked(view.segments)
    at = 1001 * PAGE_BYTES
    assert view.first(at - PAGE_BYTES, at) is None
    assert view.first(at - PAGE_BYTES, at + PAGE_BYTES) == (at, at, PAGE_BYTES)


# The kernel looks for the mapping first, and then whether mappings change; it tells of the move
# when the one who moves it comes to that. Before that, others may have moved.
_GONE, _CHANGING = (errno.ENOENT, 0), (errno.EAGAIN, -errno.EAGAIN)


@pytest.mark.parametrize(
    ("before", "quiet"), [([_GONE], 1), ([_CHANGING, _GONE], 2), ([_CHANGING] * 3 + [_GONE], 4)]
)
def test_a_page_that_moves_when_it_comes_is_filled_where_it_went(
    monkeypatch: pytest.MonkeyPatch, before: list[tuple[int, int]], quiet: int
) -> None:
    here, there = 16 * PAGE_BYTES, 64 * PAGE_BYTES
    answers = [*before, _CHANGING, (0, PAGE_BYTES)]
    told = [*([] for _ in range(quiet)), [(0x14, here, there, PAGE_BYTES)], []]
    tried = []

    def call(fd: int, request: int, *words: int) -> tuple[int, int]:
        if request != uffd.COPY:
            return 0, 0
        tried.append(words[0])
        return answers.pop(0)

    monkeypatch.setattr(uffd, "call", call)
    monkeypatch.setattr(uffd, "messages", lambda fd: told.pop(0) if told else [])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first = keeper.Keeper([ours, theirs], mmap.mmap(-1, PAGE_BYTES), "")
        first._add(os.eventfd(0), 0, [(here, here + PAGE_BYTES, here)])
        (view,) = first._views.values()
        first._fill(view, here, PAGE_BYTES, 0)
        first._drop(view)
    assert tried == [*[here] * (len(before) + 1), there]
    assert view.origin(there) is None  # it is there; who lets go of it finds zeros


def test_where_no_memory_comes_for_a_page_of_zeros_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(uffd, "zero", lambda fd, address: errno.ENOMEM)
    monkeypatch.setattr(treeend, "wait", waited.append)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        first = keeper.Keeper([ours, theirs], mmap.mmap(-1, PAGE_BYTES), "")
        first._add(os.eventfd(0), 0, [])
        (view,) = first._views.values()
        first._again.append((view, PAGE_BYTES))

        def serve() -> None:
            for _ in range(1000):
                assert not first._served()

        with pytest.raises(OSError, match="Cannot allocate memory"):
            serve()
        first._drop(view)
    assert sum(waited) >= 5000


def test_only_large_private_memory_waits_and_nothing_that_a_thread_ends_with() -> None:
    anonymous, page = 1 << 9, PAGE_BYTES
    large = pour.Area(0x100000, 0x100000 + (2 << 20), anonymous, 0, 0, 0)
    locked = pour.Area(0x800000, 0x800000 + (2 << 20), anonymous, 0x2000, 0, 0)
    wiped = pour.Area(0x1000000, 0x1000000 + (2 << 20), anonymous, 0, 0, 0, 1 << 18)
    small = pour.Area(0x2000000, 0x2000000 + (2 << 20), anonymous, 0, 0, 0)
    process = pour.ProcessMemory(
        1, 0, (large, locked, wiped, small), (), (0x100000 + 3 * page + 8,)
    )
    runs = [PageRun(area.start, 512, 4) for area in (large, locked, wiped)]
    runs.append(PageRun(small.start, 255, 4))
    now, later = lazy.defer(process, pour.Split((), (), tuple(runs)))
    assert later.areas == ((large.start, large.end),)
    assert later.runs == (PageRun(large.start, 3, 4), PageRun(large.start + 4 * page, 508, 4))
    assert now.poured_fresh == (PageRun(large.start + 3 * page, 1, 4), *runs[1:])
