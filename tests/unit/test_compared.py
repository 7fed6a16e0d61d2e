"""A copy of memory whose writes nobody notes is what the memory was when it was looked at last."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from agent import errors
from agent.engines.tracking.compared import Compared
from agent.host import clock, pagemap
from agent.host.fingerprints import Fingerprinter
from agent.host.pagemap import Ranges
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun

_SPACE = AddressSpace("process", 1)
_FIRST = 7 << 20  # not where a step begins
_PAGES = 3000


class Memory:
    """Some pages with a byte in each that tells them apart; also what was drafted of them."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.drafted: dict[int, bytes] = {}
        self.drafts, self.full = 0, False
        self.unreadable: set[int] = set()
        self.sink = cast(Any, self)

    def put(self, at: int, value: int) -> None:
        self.pages[_FIRST + at * PAGE_BYTES] = value.to_bytes(2) * (PAGE_BYTES // 2)

    def take(self, at: int, _: int) -> None:
        self.pages.pop(_FIRST + at * PAGE_BYTES, None)

    def existing(self) -> Ranges:
        return _ranges(self.pages)

    def read(self, into: memoryview, start: int, wanted: Ranges) -> Ranges:
        into[:] = bytes(len(into))
        there = set()
        for low, high in wanted.tolist():
            for page in range(low, high, PAGE_BYTES):
                if page not in self.unreadable:
                    into[page - start : page - start + PAGE_BYTES] = self.pages[page]
                    there.add(page)
        found = _ranges(there)
        return wanted if np.array_equal(found, wanted) else found

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        assert space == _SPACE
        self.drafts += 1
        if self.full:
            raise errors.VolumeFull("it is full")
        at = 0
        for run in runs:
            for number in range(run.pages):
                page = run.address + number * PAGE_BYTES
                self.drafted[page] = bytes(data[at : at + PAGE_BYTES])
                at += PAGE_BYTES
        assert at == len(data)


def _ranges(pages: dict[int, bytes] | set[int]) -> Ranges:
    rows = [(page, page + PAGE_BYTES) for page in sorted(pages)]
    return pagemap.union(pagemap.none(), np.array(rows, dtype=np.int64).reshape(-1, 2))


def test_every_page_is_had_as_it_is_whatever_came_went_or_changed() -> None:
    draw = random.Random(1)
    memory = Memory()
    compared = Compared(_SPACE, Fingerprinter())
    for at in range(_PAGES):
        memory.put(at, 1)
    for turn in range(12):
        for _ in range(draw.choice((0, 1, 40))):
            at = draw.randrange(_PAGES)
            # Where pages went and came, also as they were.
            for page in range(at, min(_PAGES, at + draw.choice((1, 20, 600)))):
                draw.choice((memory.put, memory.put, memory.take))(page, draw.choice((1, turn)))
        memory.unreadable = {page for page in memory.pages if draw.random() < turn % 3 / 1000}
        if memory.unreadable or turn % 2:
            deadline = clock.Deadline.after(60)
            compared.round(memory.existing(), memory.read, memory.sink, deadline, None)
        else:
            compared.finish(memory.existing(), memory.read, memory.sink)
        for page, content in memory.pages.items():
            assert page in memory.unreadable or memory.drafted[page] == content


def test_what_is_as_it_was_is_not_drafted_again() -> None:
    memory = Memory()
    compared = Compared(_SPACE, Fingerprinter())
    for at in range(_PAGES):
        memory.put(at, at)
    for drafted_bytes in (_PAGES * PAGE_BYTES, 0):
        found = compared.finish(memory.existing(), memory.read, memory.sink)
        assert found == drafted_bytes
    memory.put(1000, 1)
    assert compared.finish(memory.existing(), memory.read, memory.sink) == 64 << 10


def test_at_the_cut_a_page_that_cannot_be_read_is_an_error_and_so_is_a_sink_that_fails() -> None:
    memory = Memory()
    compared = Compared(_SPACE, Fingerprinter())
    for at in range(_PAGES):
        memory.put(at, at)
    memory.unreadable = {_FIRST + 2000 * PAGE_BYTES}
    with pytest.raises(errors.ShortStopFailed):
        compared.finish(memory.existing(), memory.read, memory.sink)
    memory.unreadable, memory.drafts = set(), 0

    memory.full = True
    with pytest.raises(errors.VolumeFull):
        compared.finish(memory.existing(), memory.read, memory.sink)
    # Nobody goes on with the rest.
    assert memory.drafts <= 2
