"""Brings the memory of a tree that runs already.

``Fill`` hands the tree's userfaultfds to the ``keeper``, a program of its own, and sends it the
pages: those that a process waits for first, beside them all others, by several threads, each of
which reads, verifies and decompresses what it has taken (``pending``).

Promises: what a process finds in its memory has been verified and belongs there. A tree whose
memory cannot be completed is ended, whoever fails or dies (see ``keeper``), never left running with
holes; a volume that fails for a moment ends no tree. Memory is bounded: 16 MiB and a byte a page,
besides what three readers of the store hold; where several members are filled at once, they share
that and have fewer threads each.
Does not: choose what comes late (``lazy``), or what comes first (``pending``).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import agent
from agent import errors
from agent.engines.criu import journal, keeper, lazy, pending, rereading
from agent.host import clock, proc, subprocesses
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun

# What is copied in one step while nobody else is served.
_PIECE_BYTES = 1 << 20
_PIECES, _ANSWERS = 12, 4
# How many threads send what nobody waits for yet, beside the one for what somebody does. Each holds
# up to 34 MiB of blocks and pages (store/blocks.Limits), and the agent stays below 256 MiB.
_SENDERS = 2
# Zero pages in so long a row are told of, so that nobody asks for each; more often costs more.
_ZERO_PAGES = 16
_POLL_S = 0.2
_PACKAGES = os.path.dirname(os.path.dirname(agent.__file__))
# A volume that fails is given so long, while the tree waits: a server that is started anew, a link
# that was lost. One that is away for longer is more likely gone.
_AGAIN_S = 30.0
# Between two looks no more passes but where this program stands still, or many trees are filled.
_STOOD_S = 5.0
_READY_S = 10.0
_ENDED_S = 60.0
# A thread that hangs in a read of the volume is not waited for.
_LEFT_S = 5.0


class Fill:
    """The filling of one tree; see ``agent.engines.base.Filling``.

    ``tree`` are its processes on this host, held against dumps until it is complete. ``patience_s``
    may pass without a page before it is given up. ``parties`` members are filled at the same time.

    The keeper takes a moment to start; ``begin`` waits for it.

    Raises:
        lazy.LateRefused: the keeper cannot be had; nothing of it is left.
    """

    def __init__(
        self,
        places: journal.Places,
        source: MemberSource,
        deferred: Mapping[AddressSpace, lazy.Deferred],
        descriptors: Mapping[AddressSpace, int],
        tree: Sequence[proc.Identity],
        patience_s: float,
        parties: int = 1,
    ) -> None:
        self._source = source
        self._spaces = [space for space in deferred if deferred[space].runs]
        self._deferred = deferred
        self._senders = max(1, min(_SENDERS, len(os.sched_getaffinity(0))) // parties)
        # So many pieces are on their way at once, and so many of those that somebody waits for.
        self._most = max(2, _PIECES // parties), max(1, _ANSWERS // parties)
        self._pending = pending.Pending([deferred[s].runs for s in self._spaces], self._senders)
        self._patience_s = patience_s
        self.total_bytes = sum(each.size_bytes for each in deferred.values())
        # When the last page came, and when somebody last looked. Of the time between two looks only
        # so much counts, since this program may have stood still (Ctrl-Z, SIGSTOP).
        self._last_s = self._looked_s = clock.monotonic_s()
        self._failure: errors.CkptError | None = None
        self._complete = self._left = False
        self._over = threading.Event()
        self._whole = threading.Lock()
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

    @property
    def filled_bytes(self) -> int:
        """See ``agent.engines.base.Filling``."""
        return self._pending.sent_pages * PAGE_BYTES

    def begin(self) -> None:
        """The tree runs next: send its pages.

        Raises:
            lazy.LateRefused: the keeper cannot be had; nothing of it is left.
        """
        try:
            self._hear_ready()
        except BaseException:
            self.give_up()
            raise
        self._last_s = self._looked_s = clock.monotonic_s()
        works: list[tuple[str, Callable[[], None]]] = [
            ("fill-hear", self._hear),
            ("fill-answer", self._answer),
            *(("fill-stream", functools.partial(self._stream, n)) for n in range(self._senders)),
        ]
        for name, work in works:
            thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait(self, timeout_s: float) -> bool:
        """See ``agent.engines.base.Filling``."""
        if not self._over.wait(timeout_s):
            now_s = clock.monotonic_s()
            stood_s = now_s - self._looked_s - timeout_s - _STOOD_S
            if stood_s > 0:
                self._last_s = min(now_s, self._last_s + stood_s)
            self._looked_s = now_s
            if now_s - self._last_s > self._patience_s:
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
        if not self._complete:
            self._no_more()
        try:
            if hasattr(self, "_child"):
                self._end_keeper(self._child)
        finally:
            self._owned.close()

    def _end_keeper(self, child: subprocesses.Child) -> None:
        try:
            child.wait(clock.Deadline.after(_ENDED_S))
        except errors.DeadlineExceeded:
            child.kill()  # stopped, or it hangs: the second one ends the tree
        finally:
            for thread in self._threads:
                thread.join(_LEFT_S)
            # Whoever of the two keepers is left ends the tree, and then holds this no more.
            self._channel.settimeout(_ENDED_S)
            while not self._complete and self._said():
                pass
            self._channel.close()
            self._urgent.close()
            self._view.release()
            self._memory.close()

    def _start(
        self,
        places: journal.Places,
        operation: journal.Operation,
        descriptors: Mapping[AddressSpace, int],
        tree: Sequence[proc.Identity],
    ) -> None:
        pieces, answers = self._most
        size = (pieces + answers) * _PIECE_BYTES
        memory = os.memfd_create("fill", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._urgent, urgent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            os.ftruncate(memory, size)
            self._memory = mmap.mmap(memory, size)
            self._view = memoryview(self._memory)
            path = places.entry_path(operation.entry.name)
            argv = [
                *(sys.executable, "-I", "-S", "-c", keeper.START, keeper.__file__, _PACKAGES),
                *map(str, (theirs.fileno(), urgent.fileno(), memory, size, path)),
            ]
            shared = [theirs.fileno(), urgent.fileno(), memory]
            self._child = subprocesses.start(argv, pass_fds=shared)
            self._channel = ours
        finally:
            os.close(memory)
            theirs.close()
            urgent.close()
        for each in range(pieces):
            self._pieces.put(each * _PIECE_BYTES)
        for each in range(pieces, pieces + answers):
            self._answers.put(each * _PIECE_BYTES)
        self._channel.settimeout(_READY_S)
        with _listened_to():
            self._introduce(descriptors, tree)

    def _introduce(
        self, descriptors: Mapping[AddressSpace, int], tree: Sequence[proc.Identity]
    ) -> None:
        """Tell the keeper all that it needs to know."""
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

    def _hear_ready(self) -> None:
        with _listened_to():
            if self._channel.recv(1) != keeper.READY:
                raise lazy.LateRefused(
                    "the program that fills the tree's memory ended before it began",
                    hint="restore it again, or with --eager",
                )
        self._channel.settimeout(None)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except errors.CkptError as exc:
            self._fail(exc)
        except (_Over, BrokenPipeError):
            pass  # if the keeper has ended, it says why, or ``_hear`` notices
        except BaseException as exc:  # noqa: BLE001 - carried to whoever waits
            failure = errors.RestoreFailed(f"filling failed: {exc}", hint="restore it again")
            failure.__cause__ = exc
            self._fail(failure)

    def _fail(self, failure: errors.CkptError) -> None:
        if self._failure is None and not self._complete and not self._left:
            self._failure = failure
            self._no_more()

    def _no_more(self) -> None:
        """Let the keeper end the tree. Waits for nothing, also where it takes in nothing."""
        if hasattr(self, "_channel"):
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)

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
                    mine = place < self._most[0] * _PIECE_BYTES
                    (self._pieces if mine else self._answers).put(place)
                    self._last_s = clock.monotonic_s()
                elif kind == keeper.QUESTION:
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

    def _stream(self, sender: int) -> None:
        reader = self._source.beside()
        while (share := self._pending.take(sender)) is not None:
            self._bring(reader, share, self._channel, self._pieces)

    def _answer(self) -> None:
        reader = self._source.beside()
        for number, space in enumerate(self._spaces):
            for start, pages in self._deferred[space].holes(_ZERO_PAGES):
                self._urgent.send(_zero(number, start, pages))
        while (question := self._questions.get()) is not None:
            number, address = question
            found = self._pending.ask(number, address)
            if isinstance(found, pending.Share):
                self._bring(reader, found, self._urgent, self._answers)
            elif found is not None:
                # Behind what was sent, which may not have been taken in yet.
                self._tell(self._channel, number, address, found)

    def _bring(
        self,
        reader: MemberSource,
        share: pending.Share,
        channel: socket.socket,
        places: queue.SimpleQueue[int],
    ) -> None:
        """Send a share, and what was asked meanwhile; and when that was the last one, say so."""
        space = self._spaces[share.number]
        for address, data, pages in self._read(reader, space, share.runs):
            if data is not None:
                self._send(channel, share.number, address, data, places)
            else:
                self._pending.zero(share, address, pages)
                if pages >= _ZERO_PAGES:
                    channel.send(_zero(share.number, address, pages))
            if self._over.is_set():
                raise _Over
        for address, answer in self._pending.finish(share):
            self._tell(channel, share.number, address, answer)
        if self._pending.complete and self._whole.acquire(blocking=False):
            # Where all places are free again, the keeper has taken in whatever was sent.
            for each, count in zip((self._pieces, self._answers), self._most, strict=True):
                for _ in range(count):
                    self._free(each)
            self._channel.send(keeper.WHOLE)

    def _tell(
        self, channel: socket.socket, number: int, address: int, answer: pending.Answer
    ) -> None:
        kind = keeper.ANSWERED if answer is pending.Answer.ZERO else keeper.SENT
        channel.send(kind + keeper.ADDRESS.pack(number, address))

    def _read(
        self, source: MemberSource, space: AddressSpace, runs: Sequence[PageRun]
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        return rereading.read(source, space, runs, self._pause, min(_AGAIN_S, self._patience_s))

    def _pause(self, pause_s: float) -> None:
        if self._over.wait(pause_s):
            raise _Over

    def _send(
        self,
        channel: socket.socket,
        number: int,
        address: int,
        data: memoryview,
        places: queue.SimpleQueue[int],
    ) -> None:
        """Raises ``_Over`` unless all of it was sent: who waits for it must go on waiting then."""
        for at in range(0, len(data), _PIECE_BYTES):
            part = data[at : at + _PIECE_BYTES]
            place = self._free(places)
            self._view[place : place + len(part)] = part
            said = keeper.PIECE.pack(number, address + at, len(part), place)
            channel.send(keeper.DATA + said)

    def _free(self, places: queue.SimpleQueue[int]) -> int:
        while not self._over.is_set():
            with contextlib.suppress(queue.Empty):
                return places.get(timeout=_POLL_S)
        raise _Over


class _Over(Exception):
    """Nothing is to be sent any more."""


@contextlib.contextmanager
def _listened_to() -> Iterator[None]:
    """What the keeper's channel says becomes ours."""
    try:
        yield
    except OSError as exc:
        raise lazy.LateRefused(
            f"the program that fills the tree's memory does not listen: {exc}",
            hint="restore it again, or with --eager",
        ) from exc


def _zero(number: int, address: int, pages: int) -> bytes:
    return keeper.ZERO + keeper.PIECE.pack(number, address, pages * PAGE_BYTES, 0)


def _keeper_lost() -> errors.RestoreFailed:
    return errors.RestoreFailed(
        "the program that fills the tree's memory was killed; the tree was ended",
        hint="restore it again",
    )
