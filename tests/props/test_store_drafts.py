"""Drafts: whatever was drafted before, what is settled comes back as last drafted."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import errors
from agent.model import ids
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun
from agent.store.repository import Store
from agent.volumes.memory import MemoryVolume

GROUP = ids.group_name("job")
SPACE = AddressSpace("process", 7)
# Neighbours, the borders of 2 MiB, and far away.
_PAGES = [*range(6), *range(508, 516), 1 << 20, (1 << 35) - 1]

_contents = st.sampled_from([bytes(PAGE_BYTES), *(os.urandom(PAGE_BYTES) for _ in range(4))])
_drafts = st.dictionaries(st.sampled_from(_PAGES), _contents, min_size=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(_drafts, min_size=1, max_size=5), st.data())
def test_settled_pages_have_their_last_drafts(
    rounds: list[dict[int, bytes]], data: st.DataObject
) -> None:
    store = Store.open(MemoryVolume(), create=True)
    last: dict[int, bytes] = {}
    with store.begin(GROUP, now_s=1_790_000_000.0) as writer:
        sink = writer.member(ids.member_name("tree"))
        for drafted in rounds:
            runs = [PageRun(page * PAGE_BYTES, 1, 0) for page in drafted]
            sink.draft(SPACE, runs, memoryview(b"".join(drafted.values())))
            last |= drafted
        kept = sorted(data.draw(st.sets(st.sampled_from(sorted(last)))))
        fresh = {page: os.urandom(PAGE_BYTES) for page in _PAGES if page not in last}
        for page in sorted({*kept, *fresh}):
            run = PageRun(page * PAGE_BYTES, 1, 4)
            if page in fresh:
                sink.pages(SPACE, run, memoryview(fresh[page]))
            else:
                sink.settle(SPACE, [run])
        sink.facts({})
        epoch = writer.commit({})
    image = store.read(GROUP, epoch.epoch).member(ids.member_name("tree"))
    found = {}
    for address, content, pages in image.read(SPACE) if image.spaces() else ():
        for number in range(pages):
            at = number * PAGE_BYTES
            found[address // PAGE_BYTES + number] = (
                bytes(PAGE_BYTES) if content is None else bytes(content[at : at + PAGE_BYTES])
            )
    assert found == {page: last[page] for page in kept} | fresh


def test_a_page_without_a_draft_cannot_be_settled() -> None:
    store = Store.open(MemoryVolume(), create=True)
    with store.begin(GROUP, now_s=1_790_000_000.0) as writer:
        sink = writer.member(ids.member_name("tree"))
        sink.draft(SPACE, [PageRun(0, 1, 0)], memoryview(os.urandom(PAGE_BYTES)))
        with pytest.raises(errors.InvalidInput):
            sink.settle(SPACE, [PageRun(0, 2, 0)])
