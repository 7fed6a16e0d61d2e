"""How an engine and a store meet: the sink of a dump and the source of a restore.

An image of one member is three kinds of content: *memory* (pages at addresses of an address
space), *metadata* (the engine's own small image files, by name) and *files* (ephemeral files of
the job that travel with it). Both halves use the same nouns, so that either engine's image can be
restored by an engine that knows its ``layout``.

Promises: nothing here depends on CRIU, on a store format or on an operating system.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal, Protocol

PAGE_BYTES = 4096

SpaceKind = Literal["process", "shmem"]


@dataclasses.dataclass(frozen=True, order=True)
class AddressSpace:
    """Where pages live: a process's private memory or one shared memory object.

    ``id`` is the engine's number for it (for CRIU: the pid, or the shmid), unique within its kind
    and member.
    """

    kind: SpaceKind
    id: int


@dataclasses.dataclass(frozen=True)
class PageRun:
    """``pages`` consecutive pages from byte ``address`` (a multiple of ``PAGE_BYTES``).

    ``flags`` are the engine's own bits for the run and come back as they were given.
    """

    address: int
    pages: int
    flags: int


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One ephemeral file or directory of the job, as it stood at the cut.

    ``path`` is absolute. ``kind`` is ``file``, ``directory`` or ``symlink`` (then ``target``).
    Times are nanoseconds since 1970. ``origin`` says why it travels: an open descriptor or a
    ``--include``.
    """

    path: str
    kind: Literal["file", "directory", "symlink"]
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int
    origin: Literal["open", "include"]
    target: str = ""
    xattrs: tuple[tuple[str, bytes], ...] = ()


class MemberSink(Protocol):
    """Takes the content of one member. What ``pages``, ``settle``, ``metadata`` and ``file`` are
    given is what it was while the processes stood still; a ``draft`` may be given before.

    Calls come from one thread at a time. A call returns when the bytes may be overwritten by the
    caller, and may block for back-pressure; memory used does not grow with the image but for
    about 40 bytes a page of bookkeeping. Any call may raise an ``errors.VolumeError``: the capture
    is then to be given up and the job to be left running.
    """

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        """Store the run; ``len(data) == run.pages * PAGE_BYTES``. Runs of one address space come
        in ascending order and do not overlap.
        """

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        """Store the content of ``runs``, one after the other in ``data``, in case it is still that
        at the cut: a later draft of the same page takes its place, and nothing of a draft belongs
        to the image until it is settled. ``flags`` do not count.
        """

    def recall(self, epoch: str, space: AddressSpace) -> list[PageRun]:
        """Take the pages that this member had in this address space in the group's committed
        ``epoch`` for drafts, without being given them; which ones, in ascending order. Of an epoch
        that the new one does not build on, and of pages that are better stored anew, none.
        """

    def settle(self, space: AddressSpace, runs: Sequence[PageRun]) -> None:
        """The address space has these runs, with the content of their last drafts; every page must
        have one. Calls of this and of ``pages`` come in ascending order together.
        """

    def metadata(self, name: str, content: BinaryIO) -> None:
        """Store an image file of the engine under ``name`` (one path component)."""

    def file(self, entry: FileEntry, content: BinaryIO | None) -> None:
        """Store an ephemeral file; ``content`` is read to its end, and is None unless a file."""

    def facts(self, facts: dict[str, Any]) -> None:
        """Store what a person or a later restore wants to know of the member, as JSON values:
        engine, layout, pids, kernel, needed files. Called once.
        """


class MemberSource(Protocol):
    """Gives the content of one member back. Everything read has been verified when returned.

    All methods raise ``errors.Corrupt`` or ``errors.Missing``, naming the part, if it cannot be
    had whole.
    """

    def facts(self) -> dict[str, Any]:
        """What the sink was given."""

    def metadata(self) -> Iterator[tuple[str, bytes]]:
        """All image files of the engine, in the order they were stored."""

    def metadata_file(self, name: str) -> bytes:
        """One of them; raises ``errors.Missing`` if the image has none of that name."""

    def files(self) -> Iterator[FileEntry]:
        """All ephemeral files, in the order they were stored, without their content."""

    def file_content(self, path: str) -> Iterator[bytes]:
        """The content of one ephemeral file in pieces of bounded size."""

    def spaces(self) -> list[AddressSpace]:
        """All address spaces, in the order they were first stored."""

    def runs(self, space: AddressSpace) -> list[PageRun]:
        """The runs of an address space, ascending, merged where neighbours have equal flags."""

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        """Yield ``(address, data, pages)`` over ``runs`` (parts of the space's own, ascending) or
        all of them, in ascending order. ``data`` is None for zero pages, else holds ``pages``
        pages and is valid until the next step. Reads ahead in parallel; memory is bounded.
        """

    def check(self) -> None:
        """Read and verify every byte that a restore would need, without keeping it."""

    def present(self) -> None:
        """Verify all that says what the image holds and where, and that every file with its memory
        is there in its full length; memory itself is verified when it is read.
        """

    def beside(self) -> MemberSource:
        """Another source of the same member, for another thread."""
