"""A sink that takes what it is given into memory while the job stands still, and passes it on to
the real one when the job runs again.

Promises: never more than ``budget_bytes`` of content are held; what does not fit any more is passed
on at once, in order, at the real sink's pace. Safe from several threads, of which the real sink
sees one at a time.
Does not: hold anything before ``hold`` or after ``drain``.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast

from agent.model.streams import AddressSpace, FileEntry, MemberSink, PageRun

_PIECE_BYTES = 1 << 20


class HeldSink:
    """Holds back what is for ``sink``."""

    def __init__(self, sink: MemberSink, budget_bytes: int) -> None:
        self._sink = sink
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []
        self._held_bytes = 0
        self._holding = False
        self.overflowed = False

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
            if self._fits(len(data)):
                kept = memoryview(bytes(data))
                self._waiting.append(lambda: self._sink.pages(space, run, kept))
            else:
                self._sink.pages(space, run, data)

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        """As ``MemberSink.draft``."""
        with self._lock:
            if self._fits(len(data)):
                kept = memoryview(bytes(data))
                self._waiting.append(lambda: self._sink.draft(space, runs, kept))
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
            kept = None if content is None else self._content(content)
            self._add(lambda: self._sink.file(entry, kept))

    def facts(self, facts: dict[str, Any]) -> None:
        """As ``MemberSink.facts``."""
        self._later(lambda: self._sink.facts(facts))

    def _later(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._add(call)

    def _add(self, call: Callable[[], None]) -> None:
        if self._holding:
            self._waiting.append(call)
        else:
            call()

    def _fits(self, size_bytes: int) -> bool:
        """Whether so much more can be held; if not, nothing is from now on."""
        if self._holding and self._held_bytes + size_bytes <= self._budget_bytes:
            self._held_bytes += size_bytes
            return True
        self.overflowed = self.overflowed or self._holding
        self._pass_on()
        return False

    def _content(self, content: BinaryIO) -> BinaryIO:
        """A stream of the same bytes, which are held if they fit."""
        pieces = []
        while self._holding and (piece := content.read(_PIECE_BYTES)):
            pieces.append(piece)
            if not self._fits(len(piece)):
                return cast("BinaryIO", io.BufferedReader(_Rest(pieces, content), _PIECE_BYTES))
        return cast("BinaryIO", io.BytesIO(b"".join(pieces))) if self._holding else content

    def _pass_on(self, check: Callable[[], None] = lambda: None) -> None:
        waiting, self._waiting = self._waiting, []
        self._holding = False
        self._held_bytes = 0
        waiting.reverse()
        while waiting:
            check()
            waiting.pop()()  # so that memory goes with each


class _Rest(io.RawIOBase):
    """What was read already, then the rest."""

    def __init__(self, pieces: list[bytes], content: BinaryIO) -> None:
        self._pieces = [memoryview(piece) for piece in reversed(pieces)]
        self._content = content

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        into = memoryview(into).cast("B")
        if not self._pieces:
            data = self._content.read(len(into))
            into[: len(data)] = data
            return len(data)
        piece = self._pieces.pop()
        count = min(len(piece), len(into))
        into[:count] = piece[:count]
        if count < len(piece):
            self._pieces.append(piece[count:])
        return count
