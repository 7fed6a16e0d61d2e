"""The one page of a process that CRIU writes into while its memory is on the way.

CRIU lets a process make system calls by an instruction that it puts at the start of the first
executable mapping, and takes away again each time. The kernel moves memory to us by reference, not
by copy: if such a call is made before we have received that page, we receive CRIU's instruction.

Promises: this page is stored as it was when the process had stopped and CRIU had not begun.
Does not: cover an instruction that CRIU would put elsewhere (criu/parasite-syscall.c of 4.2,
``get_exec_start``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from agent import errors
from agent.engines.tracking import areas
from agent.host import layouts, proc
from agent.host.foreign import ForeignMemory
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink, PageRun


class CodePages:
    """These pages of one tree."""

    def __init__(self) -> None:
        self._pages: dict[AddressSpace, tuple[int, memoryview]] = {}

    def note(self, pids: Iterable[int]) -> None:
        """Read them, of processes that stand still."""
        for pid in pids:
            with contextlib.suppress(errors.NotFound):
                address = layouts.first_executable(pid)
                if address is not None:
                    self._note(pid, address)

    def _note(self, pid: int, address: int) -> None:
        page = memoryview(bytearray(PAGE_BYTES))
        memory = ForeignMemory(proc.identity(pid))
        try:
            (count,) = memory.read([(address, PAGE_BYTES)], page)
        finally:
            memory.close()
        # Beyond the end of its file there is no page, and CRIU cannot write there either.
        if count == PAGE_BYTES:
            self._pages[AddressSpace("process", areas.private_id(pid))] = (address, page)

    def put_back(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        """Have the page as it was in ``data``, the pages of ``run``, if it is one of them."""
        if space not in self._pages:
            return
        address, page = self._pages[space]
        at = address - run.address
        if 0 <= at < len(data):
            data[at : at + PAGE_BYTES] = page

    def drafts(self, sink: MemberSink) -> Drafts:
        """What of a sink takes drafts, of pages that were read while CRIU worked."""
        return Drafts(self, sink)


class Drafts:
    """Gives drafts to a sink, with these pages as they were."""

    def __init__(self, code: CodePages, sink: MemberSink) -> None:
        self._code = code
        self._sink = sink

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        """As ``MemberSink.draft``."""
        at = 0
        for run in runs:
            size_bytes = run.pages * PAGE_BYTES
            self._code.put_back(space, run, data[at : at + size_bytes])
            at += size_bytes
        self._sink.draft(space, runs, data)
