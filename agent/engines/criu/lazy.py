"""A restored tree runs while its memory is still on the way.

Large private anonymous mappings are left empty; CRIU has each process open a userfaultfd for them
(its lazy mode, whose part of the daemon is played here), and when the tree stands, ``Fill`` hands
those to the ``keeper``, a program of its own, and sends it the pages: those that a process waits
for first, beside them all others in their order, with the store's read-ahead.

Promises: what a process finds in its memory has been verified and belongs there. A tree whose
memory cannot be completed is ended, whoever fails or dies (see ``keeper``), never left running with
holes. No dump takes it before it is complete. Memory is bounded: 16 MiB besides the store's.
Does not: defer what the kernel itself needs at a thread's end, stacks, locked memory, mappings that
children do not inherit as they are, and whatever is small: those are there before the tree runs.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import logging
import mmap
import os
import queue
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from agent import errors
from agent.engines.criu import journal, keeper, pour
from agent.host import clock, proc, subprocesses
from agent.host.pagemap import Pagemap
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun

logger = logging.getLogger(__name__)

# criu/include/uffd.h and image.h: where its lazy mode finds us, what it says at the end, and the
# mark of a page that it leaves to us.
_SOCKET = "lazy-pages.socket"
PAGEMAP_LAZY = 1 << 1
_PID_BYTES = 4
# Below this, a page at once costs less than a fault later.
_SMALLEST_BYTES = 1 << 20
# One message names all mappings of a process.
_MOST_AREAS = 4000
# include/uapi/asm-generic/mman.h and mman-common.h
_MAP_GROWSDOWN, _MAP_LOCKED = 0x100, 0x2000
_MADV_DONTFORK, _MADV_WIPEONFORK = 1 << 10, 1 << 18
# What is copied in one step while nobody else is served, and what comes along with a page that
# somebody waits for.
_PIECE_BYTES, _WINDOW_BYTES = 1 << 20, 1 << 20
_PIECES, _ANSWERS = 12, 4
# How long a piece of the rest makes room for what somebody waits for: so at least 50 MiB of it come
# in a second.
_ROOM_S = 0.02
_POLL_S = 0.2
_READY_S = 10.0
_ENDED_S = 60.0
# A thread that hangs in a read of the volume is not waited for.
_LEFT_S = 5.0


@dataclasses.dataclass(frozen=True)
class Deferred:
    """What comes later of one process: its mappings as (start, end), and the runs in them."""

    areas: tuple[tuple[int, int], ...]
    runs: tuple[PageRun, ...]


def defer(process: pour.ProcessMemory, share: pour.Split) -> tuple[pour.Split, Deferred]:
    """Share out what would be poured into fresh memory: what still is, and what comes later."""
    areas = sorted((a for a in process.areas if _may_wait(a)), key=lambda area: area.start)
    starts = [area.start for area in areas]

    def of(run: PageRun) -> int:
        at = bisect.bisect_right(starts, run.address) - 1
        return at if at >= 0 and run.address < areas[at].end else -1

    stored = [0] * len(areas)
    for run in share.poured_fresh:
        if (at := of(run)) >= 0:
            stored[at] += run.pages * PAGE_BYTES
    largest = sorted(range(len(areas)), key=lambda at: -stored[at])[:_MOST_AREAS]
    chosen = {at for at in largest if stored[at] >= _SMALLEST_BYTES}
    early = sorted({address // PAGE_BYTES * PAGE_BYTES for address in process.early_addresses})
    now: list[PageRun] = []
    later: list[PageRun] = []
    for run in share.poured_fresh:
        if of(run) in chosen:
            for part, wanted in _apart(run, early):
                (now if wanted else later).append(part)
        else:
            now.append(run)
    kept = tuple((areas[at].start, areas[at].end) for at in sorted(chosen))
    return dataclasses.replace(share, poured_fresh=tuple(now)), Deferred(kept, tuple(later))


def _may_wait(area: pour.Area) -> bool:
    return (
        pour.anonymous(area)
        and not area.flags & (_MAP_GROWSDOWN | _MAP_LOCKED)
        and not area.advice & (_MADV_DONTFORK | _MADV_WIPEONFORK)
    )


def _apart(run: PageRun, pages: Sequence[int]) -> Iterator[tuple[PageRun, bool]]:
    """The run in parts, and whether each is one of these pages."""
    at, end = run.address, run.address + run.pages * PAGE_BYTES
    for page in pages[bisect.bisect_left(pages, at) : bisect.bisect_left(pages, end)]:
        if page > at:
            yield PageRun(at, (page - at) // PAGE_BYTES, run.flags), False
        yield PageRun(page, 1, run.flags), True
        at = page + PAGE_BYTES
    if at < end:
        yield PageRun(at, (end - at) // PAGE_BYTES, run.flags), False


class Daemon:
    """CRIU's lazy mode speaks to this. Until ``take``, while CRIU itself works in the processes,
    their missing pages are zero, as they are for a process that was just made.
    """

    def __init__(self, folder: str) -> None:
        self._found: dict[int, int] = {}
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, name="lazy", daemon=True)
        self._connection: socket.socket | None = None
        # A socket's path is short, whatever the folder's is.
        at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._listening.bind(f"/proc/self/fd/{at}/{_SOCKET}")
            self._listening.listen()
        finally:
            os.close(at)
        self._thread.start()

    def take(self) -> dict[int, int]:
        """The userfaultfds by the processes' numbers in the image; the caller closes them."""
        self._stop()
        found, self._found = self._found, {}
        return found

    def close(self) -> None:
        """End; safe to repeat. Not before CRIU is done: it says good-bye."""
        self._stop()
        found, self._found = self._found, {}
        for descriptor in found.values():
            os.close(descriptor)
        for each in (self._connection, self._listening):
            if each is not None:
                each.close()

    def _stop(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
            self._thread.join()
            os.close(self._woken)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._woken, 0)  # hang-up: take or close was called
        poll.register(self._listening, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._woken in ready:
                return
            if self._connection is None:
                self._connection, _ = self._listening.accept()
                poll.unregister(self._listening)
                poll.register(self._connection, select.POLLIN)
                continue
            for descriptor in ready & set(self._found.values()):
                for event, _, address, _ in keeper.messages(descriptor):
                    if event == keeper.PAGEFAULT:
                        keeper.zero(descriptor, address & -PAGE_BYTES)
            if self._connection.fileno() in ready and not self._hear(self._connection, poll):
                poll.unregister(self._connection)

    def _hear(self, connection: socket.socket, poll: select.poll) -> bool:
        """One process: its number, then, with one byte, its descriptor."""
        said = connection.recv(_PID_BYTES, socket.MSG_WAITALL)
        if len(said) < _PID_BYTES:
            return False
        pid = int.from_bytes(said, sys.byteorder, signed=True)
        if pid > 0:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            for descriptor in descriptors:
                os.set_blocking(descriptor, False)
                self._found[pid] = descriptor
                poll.register(descriptor, select.POLLIN)
        return True


def refuse_unfilled(places: journal.Places, tree: Sequence[proc.Identity]) -> None:
    """Refuse to capture what is not complete: also children that were forked meanwhile.

    Raises:
        errors.TargetBusy: memory of one of the processes is still on the way.
    """
    if not any(each.action == "fill" for each in places.entries()):
        return
    for who in tree:
        if keeper.missing(str(who.pid)):
            raise errors.TargetBusy(
                f"the memory of process {who.pid} still comes from the image it was restored from",
                hint="wait until the restore says that it is complete",
                pid=who.pid,
            )


def release(descriptor: int, process: pour.ProcessMemory) -> None:
    """Have the kernel ask for none of this process's pages, so that they can be written."""
    for area in process.areas:
        # Refused where CRIU has not registered it.
        keeper.call(descriptor, keeper.UFFDIO_UNREGISTER, area.start, area.end - area.start)


def ask_for(descriptor: int, deferred: Deferred, pid: int) -> list[PageRun]:
    """Have the kernel ask for what is deferred of the process behind ``pid``; return the runs of it
    for which it will not, since something is there.

    Raises:
        errors.RestoreFailed: the kernel refuses.
    """
    there = []
    pages = Pagemap(pid)
    try:
        for start, end in deferred.areas:
            there += pages.occupied(start, end).tolist()
            length = end - start
            problem, _ = keeper.call(
                descriptor, keeper.UFFDIO_REGISTER, start, length, keeper.MODE_MISSING, 0
            )
            if problem:
                raise errors.RestoreFailed(
                    f"memory at {start:#x} cannot be filled later: {os.strerror(problem)}",
                    hint="restore it without --lazy",
                )
    finally:
        pages.close()
    return _within(deferred.runs, there)


def _within(runs: Sequence[PageRun], ranges: Sequence[tuple[int, int]]) -> list[PageRun]:
    """The parts of ``runs`` that lie in these ranges; both ascend."""
    starts = [run.address for run in runs]
    found = []
    for start, end in ranges:
        for run in runs[max(0, bisect.bisect_right(starts, start) - 1) :]:
            if run.address >= end:
                break
            low = max(start, run.address)
            high = min(end, run.address + run.pages * PAGE_BYTES)
            if low < high:
                found.append(PageRun(low, (high - low) // PAGE_BYTES, run.flags))
    return found


class Fill:
    """The filling of one tree; see ``agent.engines.base.Filling``.

    ``tree`` are its processes on this host, held against dumps until it is complete. ``patience_s``
    may pass without a page before it is given up.

    Raises:
        errors.RestoreFailed: the keeper cannot be had; nothing of it is left.
    """

    def __init__(
        self,
        places: journal.Places,
        source: MemberSource,
        deferred: Mapping[AddressSpace, Deferred],
        descriptors: Mapping[AddressSpace, int],
        tree: Sequence[proc.Identity],
        patience_s: float,
    ) -> None:
        self._source, self._beside = source, source.beside()
        self._spaces = [space for space in deferred if deferred[space].runs]
        self._deferred = deferred
        self._patience_s = patience_s
        self.total_bytes = sum(
            run.pages * PAGE_BYTES for each in deferred.values() for run in each.runs
        )
        self.filled_bytes = 0
        self._last_s = clock.monotonic_s()
        self._failure: errors.CkptError | None = None
        self._complete = self._left = False
        self._over = threading.Event()
        self._asked, self._quiet = 0, threading.Condition()
        self._questions: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._owned = contextlib.ExitStack()
        try:
            operation = self._owned.enter_context(places.operation("fill", tree))
            self._owned.enter_context(places.locked(tree))
            self._start(places, operation, descriptors, tree)
        except BaseException:
            self.give_up()
            raise

    def begin(self) -> None:
        """The tree runs next: send its pages."""
        for name, work in (
            ("fill-hear", self._hear),
            ("fill-stream", self._stream),
            ("fill-answer", self._answer),
        ):
            thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait(self, timeout_s: float) -> bool:
        """See ``agent.engines.base.Filling``."""
        if not self._over.wait(timeout_s):
            if clock.monotonic_s() - self._last_s > self._patience_s:
                self._fail(
                    errors.DeadlineExceeded(
                        f"no memory of the image came for {self._patience_s:g} s",
                        hint="look at the store's volume, then restore again",
                    )
                )
            if self._failure is None:
                return False
        self.give_up()
        if not self._complete:
            raise self._failure or _keeper_lost()
        return True

    def give_up(self) -> None:
        """End the tree unless it is complete, and leave nothing; safe to repeat."""
        if self._left:
            return
        self._left = True
        self._over.set()
        self._questions.put(None)
        if not self._complete and hasattr(self, "_channel"):
            with contextlib.suppress(OSError):
                self._channel.send(keeper.GIVE_UP)
        if hasattr(self, "_child"):
            self._child.wait(clock.Deadline.after(_ENDED_S))
        for thread in self._threads:
            thread.join(_LEFT_S)
        if hasattr(self, "_child"):
            # Whoever of the two keepers is left ends the tree, and then holds this no more.
            self._channel.settimeout(_ENDED_S)
            while not self._complete and self._said():
                pass
            self._channel.close()
            self._urgent.close()
            self._view.release()
            self._memory.close()
        self._owned.close()

    def _start(
        self,
        places: journal.Places,
        operation: journal.Operation,
        descriptors: Mapping[AddressSpace, int],
        tree: Sequence[proc.Identity],
    ) -> None:
        size = (_PIECES + _ANSWERS) * _PIECE_BYTES
        memory = os.memfd_create("fill", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._urgent, urgent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.ftruncate(memory, size)
            self._memory = mmap.mmap(memory, size)
            self._view = memoryview(self._memory)
            namespace = f"pid:[{proc.namespaces(tree[0].pid)['pid']}]"
            path = places.entry_path(operation.entry.name)
            argv = [
                *(sys.executable, "-I", "-S", keeper.__file__),
                *map(str, (theirs.fileno(), urgent.fileno(), memory, size, path, namespace)),
            ]
            shared = [theirs.fileno(), urgent.fileno(), memory]
            self._child = subprocesses.start(argv, pass_fds=shared)
            self._channel = ours
        finally:
            os.close(memory)
            theirs.close()
            urgent.close()
        for each in range(_PIECES):
            self._pieces.put(each * _PIECE_BYTES)
        for each in range(_PIECES, _PIECES + _ANSWERS):
            self._answers.put(each * _PIECE_BYTES)
        self._channel.settimeout(_READY_S)
        for who in tree:
            pidfd = os.pidfd_open(who.pid)
            try:
                socket.send_fds(self._channel, [keeper.PROCESS], [pidfd])
            finally:
                os.close(pidfd)
        for number, space in enumerate(self._spaces):
            areas = b"".join(keeper.RANGE.pack(*area) for area in self._deferred[space].areas)
            socket.send_fds(
                self._channel,
                [keeper.VIEW + keeper.SPACE.pack(number) + areas],
                [descriptors[space]],
            )
        self._channel.send(keeper.BEGIN)
        if self._channel.recv(1) != keeper.READY:
            raise _keeper_lost()
        self._channel.settimeout(None)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except errors.CkptError as exc:
            self._fail(exc)
        except BrokenPipeError:
            pass  # the keeper has ended; it says why, or ``_hear`` notices
        except BaseException as exc:  # noqa: BLE001 - carried to whoever waits
            failure = errors.RestoreFailed(f"filling failed: {exc}", hint="restore it again")
            failure.__cause__ = exc
            self._fail(failure)

    def _fail(self, failure: errors.CkptError) -> None:
        if self._failure is None and not self._complete and not self._left:
            self._failure = failure
            with contextlib.suppress(OSError):
                self._channel.send(keeper.GIVE_UP)

    def _said(self) -> bytes:
        while True:
            try:
                return self._channel.recv(keeper.MESSAGE_BYTES)
            except ConnectionResetError:
                # It ended without reading all; what it said before comes after this error.
                continue
            except TimeoutError:
                return b""

    def _hear(self) -> None:
        try:
            while said := self._said():
                kind, content = said[:1], said[1:]
                if kind == keeper.TAKEN:
                    (place,) = keeper.PLACE.unpack(content)
                    mine = place < _PIECES * _PIECE_BYTES
                    (self._pieces if mine else self._answers).put(place)
                    self._last_s = clock.monotonic_s()
                elif kind == keeper.QUESTION:
                    self._question(1)
                    self._questions.put(keeper.ADDRESS.unpack(content))
                elif kind == keeper.COMPLETE:
                    self._complete = True
                    return
                elif kind == keeper.ENDED:
                    if content and self._failure is None:
                        self._failure = errors.RestoreFailed(content.decode(), hint="restore again")
                    return
        finally:
            self._over.set()
            self._questions.put(None)

    def _stream(self) -> None:
        for number, space in enumerate(self._spaces):
            for address, data, pages in self._source.read(space, self._deferred[space].runs):
                if data is not None:
                    with self._quiet:
                        self._quiet.wait_for(lambda: self._asked == 0, _ROOM_S)
                    self._send(self._channel, number, address, data, self._pieces)
                if self._over.is_set():
                    return
                self.filled_bytes += pages * PAGE_BYTES
        self._channel.send(keeper.WHOLE)

    def _answer(self) -> None:
        while (question := self._questions.get()) is not None:
            number, address = question
            space = self._spaces[number]
            low = address // _WINDOW_BYTES * _WINDOW_BYTES
            runs = _within(self._deferred[space].runs, [(low, low + _WINDOW_BYTES)])
            for at, data, _ in self._beside.read(space, runs) if runs else ():
                if data is not None:
                    self._send(self._urgent, number, at, data, self._answers)
            self._urgent.send(keeper.ANSWERED + keeper.ADDRESS.pack(number, address))
            self._question(-1)

    def _question(self, more: int) -> None:
        with self._quiet:
            self._asked += more
            self._quiet.notify_all()

    def _send(
        self,
        channel: socket.socket,
        number: int,
        address: int,
        data: memoryview,
        places: queue.SimpleQueue[int],
    ) -> None:
        for at in range(0, len(data), _PIECE_BYTES):
            part = data[at : at + _PIECE_BYTES]
            place = self._free(places)
            if place is None:
                return
            self._view[place : place + len(part)] = part
            said = keeper.PIECE.pack(number, address + at, len(part), place)
            channel.send(keeper.DATA + said)

    def _free(self, places: queue.SimpleQueue[int]) -> int | None:
        while not self._over.is_set():
            with contextlib.suppress(queue.Empty):
                return places.get(timeout=_POLL_S)
        return None


def _keeper_lost() -> errors.RestoreFailed:
    return errors.RestoreFailed(
        "the program that fills the tree's memory was killed; the tree was ended",
        hint="restore it again",
    )
