"""An image in memory: the sink and the source that the engine's tests use in place of a store.

It holds a sink to its contract: order of runs, length of data, one call of ``facts``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from agent import errors
from agent.model.streams import PAGE_BYTES, AddressSpace, FileEntry, PageRun

_ZERO = bytes(PAGE_BYTES)


class MemoryImage:
    """A ``MemberSink`` and, afterwards, a ``MemberSource``."""

    def __init__(self, before: tuple[str, MemoryImage] | None = None) -> None:
        self.before = before
        self.runs_of: dict[AddressSpace, list[tuple[PageRun, bytes]]] = {}
        self.drafts: dict[AddressSpace, dict[int, bytes]] = {}
        self.drafted_bytes = 0
        self.images: dict[str, bytes] = {}
        self.file_entries: list[FileEntry] = []
        self.contents: dict[str, bytes] = {}
        self.known: dict[str, Any] | None = None
        self.checked = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise AssertionError("two threads in the sink at once")
        try:
            yield
        finally:
            self._lock.release()

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        with self._alone():
            assert len(data) == run.pages * PAGE_BYTES
            assert run.address % PAGE_BYTES == 0
            runs = self.runs_of.setdefault(space, [])
            if runs:
                last = runs[-1][0]
                assert run.address >= last.address + last.pages * PAGE_BYTES
            runs.append((run, bytes(data)))

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        with self._alone():
            drafts = self.drafts.setdefault(space, {})
            at = 0
            for run in runs:
                assert run.address % PAGE_BYTES == 0
                for page in range(run.address, run.address + run.pages * PAGE_BYTES, PAGE_BYTES):
                    drafts[page] = bytes(data[at : at + PAGE_BYTES])
                    at += PAGE_BYTES
            assert at == len(data)
            self.drafted_bytes += at

    def recall(self, epoch: str, space: AddressSpace) -> list[PageRun]:
        """What the image ``before`` has, if that is the epoch's."""
        if self.before is None or epoch != self.before[0]:
            return []
        drafts = self.drafts.setdefault(space, {})
        runs = self.before[1].runs_of.get(space, [])
        for run, data in runs:
            for at in range(0, run.pages * PAGE_BYTES, PAGE_BYTES):
                drafts[run.address + at] = data[at : at + PAGE_BYTES]
        return [run for run, _ in runs]

    def settle(self, space: AddressSpace, runs: Sequence[PageRun]) -> None:
        for run in runs:
            end = run.address + run.pages * PAGE_BYTES
            drafts = self.drafts[space]
            data = b"".join(drafts[page] for page in range(run.address, end, PAGE_BYTES))
            self.pages(space, run, memoryview(data))

    def metadata(self, name: str, content: BinaryIO) -> None:
        with self._alone():
            assert "/" not in name
            assert name not in self.images
            self.images[name] = content.read()

    def file(self, entry: FileEntry, content: BinaryIO | None) -> None:
        with self._alone():
            self.file_entries.append(entry)
            if content is not None:
                self.contents[entry.path] = content.read()

    def facts(self, facts: dict[str, Any] | None = None) -> Any:
        if facts is None:
            return self.known
        with self._alone():
            assert self.known is None
            self.known = facts
        return None

    @property
    def memory_bytes(self) -> int:
        return sum(len(data) for runs in self.runs_of.values() for _, data in runs)


class MemorySource:
    """The image read back; zero pages come as None, as from a store."""

    def __init__(self, image: MemoryImage) -> None:
        self._image = image
        self.checked = 0
        self.reading = 0

    def facts(self) -> dict[str, Any]:
        assert self._image.known is not None
        return self._image.known

    def metadata(self) -> Iterator[tuple[str, bytes]]:
        yield from self._image.images.items()

    def metadata_file(self, name: str) -> bytes:
        try:
            return self._image.images[name]
        except KeyError:
            raise errors.Missing(f"no {name}") from None

    def files(self) -> Iterator[FileEntry]:
        yield from self._image.file_entries

    def file_content(self, path: str) -> Iterator[bytes]:
        yield self._image.contents[path]

    def spaces(self) -> list[AddressSpace]:
        return list(self._image.runs_of)

    def runs(self, space: AddressSpace) -> list[PageRun]:
        merged: list[PageRun] = []
        for run, _ in self._image.runs_of[space]:
            last = merged[-1] if merged else None
            if (
                last
                and last.flags == run.flags
                and last.address + last.pages * PAGE_BYTES == run.address
            ):
                merged[-1] = PageRun(last.address, last.pages + run.pages, run.flags)
            else:
                merged.append(run)
        return merged

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        self.reading += 1
        for run, data in self._pieces(space, runs):
            at = 0
            while at < run.pages:
                zero = data[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] == _ZERO
                end = at + 1
                while (
                    end < run.pages
                    and (data[end * PAGE_BYTES : (end + 1) * PAGE_BYTES] == _ZERO) == zero
                ):
                    end += 1
                piece = memoryview(data)[at * PAGE_BYTES : end * PAGE_BYTES]
                yield run.address + at * PAGE_BYTES, None if zero else piece, end - at
                at = end

    def _pieces(
        self, space: AddressSpace, wanted: Sequence[PageRun] | None
    ) -> Iterator[tuple[PageRun, bytes]]:
        if wanted is None:
            yield from self._image.runs_of[space]
            return
        for want in wanted:
            end = want.address + want.pages * PAGE_BYTES
            for run, data in self._image.runs_of[space]:
                low = max(want.address, run.address)
                high = min(end, run.address + run.pages * PAGE_BYTES)
                if low < high:
                    piece = data[low - run.address : high - run.address]
                    yield PageRun(low, (high - low) // PAGE_BYTES, run.flags), piece

    def check(self) -> None:
        self.checked += 1

    def present(self) -> None:
        """All of it is in memory."""

    def beside(self) -> MemorySource:
        return self
