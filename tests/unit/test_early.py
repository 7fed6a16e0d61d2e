"""What a tree needs before it runs is read while CRIU makes the tree: all of it, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from agent import errors
from agent.engines.criu import early, pour
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun

SPACE = AddressSpace("process", 7)


class Pages:
    """A source of one space whose pieces are valid until the next step, as a store's."""

    def __init__(self, failure: errors.CkptError | None = None) -> None:
        self._buffer = bytearray(PAGE_BYTES)
        self._failure = failure

    def beside(self) -> Pages:
        return self

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        assert space == SPACE
        for run in runs or ():
            if self._failure is not None:
                raise self._failure
            number = run.address // PAGE_BYTES
            self._buffer[:] = bytes([number]) * PAGE_BYTES
            yield run.address, memoryview(self._buffer) if number else None, 1


def runs(*pages: int) -> tuple[PageRun, ...]:
    return tuple(PageRun(page * PAGE_BYTES, 1, 0) for page in pages)


def begun(source: Pages, share: pour.Split) -> contextlib.closing[early.Early]:
    found = early.Early.of(cast("MemberSource", source), {SPACE: share}, 1)
    assert found is not None
    return contextlib.closing(found)


def test_each_page_is_kept_as_it_was_read() -> None:
    with begun(Pages(), pour.Split(runs(9), runs(1, 2), runs(0, 3))) as reading:
        found = reading.take()
    kept = [(at, None if data is None else data[0], fresh) for at, data, _, fresh in found[SPACE]]
    places = [page * PAGE_BYTES for page in (1, 2, 0, 3)]
    assert kept == [
        (places[0], 1, False),
        (places[1], 2, False),
        (places[2], None, True),
        (places[3], 3, True),
    ]


def test_what_cannot_be_had_is_told_to_who_takes_it() -> None:
    with (
        begun(Pages(errors.Corrupt("a block is damaged")), pour.Split((), runs(1), ())) as reading,
        pytest.raises(errors.Corrupt, match="damaged"),
    ):
        reading.take()


def test_more_than_may_be_held_is_not_read_early() -> None:
    much = PageRun(0, (32 << 20) // PAGE_BYTES + 1, 0)
    share = pour.Split((), (), (much,))
    assert early.Early.of(cast("MemberSource", Pages()), {SPACE: share}, 1) is None
