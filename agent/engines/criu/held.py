"""A sink that takes what it is given into memory while the job stands still, and passes it on to
the real one when the job runs again.

Memory that is touched for the first time takes ten times as long to write to, so what is expected
to be needed is touched before (``prepare``).

Promises: never more than ``budget_bytes`` of content are held in memory; what does not fit goes to
a file without a name on the local disk (``spool``), and if there is no room either, is passed on
at once, in order, at the real sink's pace. Safe from several threads, of which the real sink sees
one at a time. ``close`` leaves nothing.
Does not: hold anything before ``hold``, or after ``drain`` or ``renew`` until it is told again.
"""

from __future__ import annotations

import io
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast

from agent import errors
from agent.engines.criu.spool import Spool
from agent.model.streams import AddressSpace, FileEntry, MemberSink, PageRun

_PIECE_BYTES = 1 << 20
# Several pieces each, and given back one by one while what they hold is passed on.
_SLAB_BYTES = 8 << 20

# Gives back what was held.
_Load = Callable[[], memoryview]


class Content(io.BufferedReader):
    """A file's content; if it is ``steady``, it may as well be read when the job runs again."""

    def __init__(self, raw: io.RawIOBase, *, steady: bool) -> None:
        super().__init__(raw, _PIECE_BYTES)
        self.steady = steady


class HeldSink:
    """Holds back what is for ``sink``; ``folder`` is on the local disk, None for none. With a
    budget of 0 no content is held.
    """

    def __init__(self, sink: MemberSink, budget_bytes: int, folder: str | None = None) -> None:
        self._sink = sink
        self._budget_bytes = budget_bytes
        self._spool = Spool(folder if budget_bytes else None)
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []
        self._held_bytes = self._prepared_bytes = 0
        self._slabs: list[memoryview] = []
        self._slab = memoryview(b"")
        self._holding = self._refusing = False
        # Whether anything was held, or passed on, since memory was touched for it.
        self._used = False
        # Whether something could not be held, since it was renewed.
        self.overflowed = False

    @property
    def spooled_bytes(self) -> int:
        """How much went to the local disk."""
        return self._spool.size_bytes

    def prepare(self, expected_bytes: int, check: Callable[[], None] = lambda: None) -> None:
        """Be quick to hold so much; ``check`` is called between and may raise."""
        self._prepared_bytes, self._used = expected_bytes, False
        in_memory_bytes = min(expected_bytes, self._budget_bytes)
        for _ in range(0, in_memory_bytes, _SLAB_BYTES):
            check()
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            self._slabs.append(memoryview(mmap.mmap(-1, _SLAB_BYTES, flags=flags)))
        self._spool.prepare(expected_bytes - in_memory_bytes, check)

    def renew(self, check: Callable[[], None]) -> None:
        """Pass on what is held, if anything is or was, and be as quick as before."""
        with self._lock:
            if not self._used:
                return
            self._pass_on(check)
            self.overflowed = False
        self.prepare(self._prepared_bytes, check)

    def refuse(self) -> None:
        """Whoever gives pages from now on is told that nobody wants them any more."""
        self._refusing = True

    def close(self) -> None:
        """Let go of what is held; safe to repeat."""
        self._waiting = []
        self._slabs, self._slab = [], memoryview(b"")
        self._spool.close()

    def hold(self) -> None:
        """Begin to hold things back."""
        self._holding = True

    def drain(self, check: Callable[[], None] = lambda: None) -> None:
        """Pass everything on, and all that comes later at once; ``check`` is called before each
        piece and may raise.
        """
        with self._lock:
            self._pass_on(check)

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        """As ``MemberSink.pages``."""
        with self._lock:
            load = self._kept(data)
            if load is not None:
                self._add(lambda: self._sink.pages(space, run, load()))
            else:
                self._sink.pages(space, run, data)

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        """As ``MemberSink.draft``."""
        with self._lock:
            load = self._kept(data)
            if load is not None:
                self._add(lambda: self._sink.draft(space, runs, load()))
            else:
                self._sink.draft(space, runs, data)

    def recall(self, epoch: str, space: AddressSpace) -> list[PageRun]:
        """As ``MemberSink.recall``."""
        with self._lock:
            return self._sink.recall(epoch, space)

    def settle(self, space: AddressSpace, runs: Sequence[PageRun]) -> None:
        """As ``MemberSink.settle``."""
        self._later(lambda: self._sink.settle(space, runs))

    def metadata(self, name: str, content: BinaryIO) -> None:
        """As ``MemberSink.metadata``."""
        with self._lock:
            kept = self._content(content)
            self._add(lambda: self._sink.metadata(name, kept))

    def file(self, entry: FileEntry, content: BinaryIO | None) -> None:
        """As ``MemberSink.file``."""
        with self._lock:
            steady = content is None or (isinstance(content, Content) and content.steady)
            kept = content if content is None or steady else self._content(content)
            self._add(lambda: self._sink.file(entry, kept))

    def facts(self, facts: dict[str, Any]) -> None:
        """As ``MemberSink.facts``."""
        self._later(lambda: self._sink.facts(facts))

    def _later(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._add(call)

    def _add(self, call: Callable[[], None]) -> None:
        if self._holding:
            self._used = True
            self._waiting.append(call)
        else:
            call()

    def _kept(self, data: memoryview) -> _Load | None:
        """Hold ``data``; None if it cannot be, and then nothing is from now on."""
        if self._refusing:
            raise errors.DumpFailed("the dump was given up", hint="the error before says why")
        if not self._holding:
            return None
        if self._held_bytes + len(data) <= self._budget_bytes:
            self._held_bytes += len(data)
            kept = self._copy(data)
            return lambda: kept
        load = self._spool.put(data)
        if load is None:
            self.overflowed = True
            self._pass_on()
        return load

    def _copy(self, data: memoryview) -> memoryview:
        if len(self._slab) < len(data) and self._slabs:
            self._slab = self._slabs.pop()
        if len(self._slab) < len(data):
            return memoryview(bytes(data))
        kept, self._slab = self._slab[: len(data)], self._slab[len(data) :]
        kept[:] = data
        return kept

    def _content(self, content: BinaryIO) -> BinaryIO:
        """A stream of the same bytes, which are held if they fit."""
        pieces: list[_Load] = []
        while self._holding and (piece := content.read(_PIECE_BYTES)):
            data = memoryview(piece)
            pieces.append(self._kept(data) or _given(data))
        rest = io.BytesIO() if self._holding else content
        return cast("BinaryIO", io.BufferedReader(_Rest(pieces, rest), _PIECE_BYTES))

    def _pass_on(self, check: Callable[[], None] = lambda: None) -> None:
        waiting, self._waiting = self._waiting, []
        self._holding, self._used = False, True
        self._held_bytes = 0
        self._slabs, self._slab = [], memoryview(b"")
        waiting.reverse()
        while waiting:
            check()
            waiting.pop()()  # so that memory goes with each


def _given(data: memoryview) -> _Load:
    return lambda: data


class _Rest(io.RawIOBase):
    """What was read already, then the rest."""

    def __init__(self, pieces: list[_Load], content: BinaryIO) -> None:
        self._pieces = pieces[::-1]
        self._piece = memoryview(b"")
        self._content = content

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        into = memoryview(into).cast("B")
        if not self._piece and self._pieces:
            self._piece = self._pieces.pop()()
        if not self._piece:
            data = self._content.read(len(into))
            into[: len(data)] = data
            return len(data)
        count = min(len(self._piece), len(into))
        into[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count
