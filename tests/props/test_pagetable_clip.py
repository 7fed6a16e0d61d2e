"""Reading parts of an address space: exactly the wanted pages, each from its own place."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.store.pagetable import Table, clip


def table(runs: list[tuple[int, int, int, int]]) -> Table:
    """Runs of (gap, pages, pack or -1, ordinal)."""
    rows, at = [], 0
    for gap, pages, pack, ordinal in runs:
        rows.append((at + gap, pages, 4, pack, ordinal if pack >= 0 else 0))
        at += gap + pages
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return Table(*columns)


def places(of: Table) -> dict[int, tuple[int, int]]:
    """Page number to (pack, ordinal)."""
    found: dict[int, tuple[int, int]] = {}
    for start, pages, pack, ordinal in zip(of.start, of.pages, of.pack, of.ordinal, strict=True):
        for i in range(int(pages)):
            assert int(start) + i not in found
            found[int(start) + i] = (int(pack), int(ordinal) + i if pack >= 0 else 0)
    return found


RUNS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(-1, 2), st.integers(0, 99)),
    max_size=12,
)


@given(RUNS, st.lists(st.tuples(st.integers(0, 9), st.integers(1, 15)), max_size=12))
def test_a_clipped_table_has_the_wanted_pages_at_their_places_and_no_others(
    runs: list[tuple[int, int, int, int]], wanted: list[tuple[int, int]]
) -> None:
    whole = table(runs)
    start, at = [], 0
    for gap, pages in wanted:
        start.append(at + gap)
        at += gap + pages
    pages_wanted = [pages for _, pages in wanted]
    part = clip(whole, np.array(start, dtype=np.int64), np.array(pages_wanted, dtype=np.int64))
    chosen = {s + i for s, n in zip(start, pages_wanted, strict=True) for i in range(n)}
    assert places(part) == {p: place for p, place in places(whole).items() if p in chosen}
    assert (np.diff(part.start) > 0).all()
