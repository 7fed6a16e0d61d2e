"""The receiving end of a dump's memory: CRIU's page server protocol, spoken over ``ps.fd``.

CRIU >= 4.2 sends headers of 32 bytes, little endian: u32 command, u32 padding, u64 pages,
u64 address, u64 destination. The command's low 16 bits say what it is, the high 16 bits are the
flags of the run; the destination's low 8 bits are the kind of address space, the rest its id.
OPEN2 wants one byte back (whether there is a parent), PARENT a u32 (likewise), CLOSE and
FORCE_CLOSE a u32 status: without it CRIU waits forever with the tree frozen.

Promises: the sink gets every run once, in CRIU's order, in pieces of at most ``PIECE_BYTES`` of
a few reused buffers; anything that breaks the protocol is an error, never a guess; whatever goes
wrong, the socket is shut, so that CRIU fails and thaws the tree.
Does not: speak the protocol of CRIU <= 4.1 or >= 4.3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import queue
import socket
import struct
import threading
from collections.abc import Callable

from agent import errors
from agent.host import clock, threads
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun, SpaceKind

HEADER = struct.Struct("<IIQQQ")
_STATUS = struct.Struct("<i")
_TIMEVAL = struct.Struct("@ll")

# Large enough that a piece costs few system calls, small enough to stay in a core's cache level
# that it shares with the compressor.
PIECE_BYTES = 2 << 20
# One that arrives, one that is handed on, and one between them.
_BUFFERS = 3
# What the kernel may hold between CRIU and us: CRIU splices pages in chunks of 1 MiB.
_SOCKET_BYTES = 4 << 20
# asm-generic/socket.h; not in the socket module.
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

# criu/include/pagemap.h; PE_PARENT (1) never comes, since no dump has a parent.
PE_LAZY = 2
PE_PRESENT = 4

# Addresses of user space end below 2^57 with five-level page tables; shared objects start at 0.
_ADDRESS_END = 1 << 57


class Command(enum.IntEnum):
    """The low half of a header's command."""

    OPEN2 = 4
    PARENT = 5
    ADD_F = 6
    CLOSE = 0x1023
    FORCE_CLOSE = 0x1024


_KINDS: dict[int, SpaceKind] = {1: "process", 2: "shmem"}


@dataclasses.dataclass(frozen=True)
class Header:
    """A header taken apart and found to make sense. ``space`` and ``run`` are set where the
    command has them.
    """

    command: Command
    space: AddressSpace | None
    run: PageRun | None


def parse(raw: bytes | bytearray | memoryview) -> Header:
    """Take one header apart.

    Raises:
        errors.CriuFailed: it breaks the protocol.
    """
    if len(raw) != HEADER.size:
        raise _broken("a header is cut short")
    word, _, pages, address, destination = HEADER.unpack(raw)
    flags = word >> 16
    try:
        command = Command(word & 0xFFFF)
    except ValueError:
        raise _broken(f"unknown command {word:#x}") from None
    if command in (Command.CLOSE, Command.FORCE_CLOSE):
        return Header(command, None, None)
    kind = _KINDS.get(destination & 0xFF)
    if kind is None:
        raise _broken(f"unknown kind of address space {destination & 0xFF}")
    space = AddressSpace(kind, destination >> 8)
    if command is not Command.ADD_F:
        return Header(command, space, None)
    if flags not in (PE_PRESENT, PE_PRESENT | PE_LAZY):
        raise _broken(f"a run has flags {flags:#x}")
    if pages == 0 or address % PAGE_BYTES or address + pages * PAGE_BYTES > _ADDRESS_END:
        raise _broken(f"a run of {pages} pages at {address:#x}")
    return Header(command, space, PageRun(address, pages, flags))


class Receiver:
    """The state of one stream: what may come next. Knows no socket."""

    def __init__(self) -> None:
        self._open: AddressSpace | None = None
        self.spaces: list[AddressSpace] = []
        self._next_address = 0
        self.raw_bytes = 0
        self.complete = False

    def accept(self, header: Header) -> bytes:
        """Take note of ``header`` and return what is to be sent back.

        Raises:
            errors.CriuFailed: it may not come here.
        """
        if self.complete:
            raise _broken("a message after the end")
        if header.command is Command.OPEN2 and header.space is not None:
            if header.space in self.spaces:
                raise _broken(f"{header.space} is opened twice")
            self.spaces.append(header.space)
            self._open = header.space
            self._next_address = 0
            return b"\0"
        if header.command is Command.PARENT:
            return _STATUS.pack(0)
        if header.run is not None:
            if header.space is None or header.space != self._open:
                raise _broken(f"a run for {header.space}, which is not open")
            if header.run.address < self._next_address:
                raise _broken(f"runs of {header.space} are out of order")
            self._next_address = header.run.address + header.run.pages * PAGE_BYTES
            self.raw_bytes += header.run.pages * PAGE_BYTES
            return b""
        self.complete = True
        return _STATUS.pack(0)


PageHandler = Callable[[AddressSpace, PageRun, memoryview], None]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Part of a run on its way to the sink, and the buffer that it lies in."""

    space: AddressSpace
    run: PageRun
    data: memoryview
    buffer: memoryview


class PageServer:
    """Receives one dump's memory in one thread and hands it to the sink in another.

    ``for_criu`` is the end to hand to CRIU; close ours of it (``release``) once CRIU has it.
    """

    def __init__(self, pages: PageHandler, deadline: clock.Deadline) -> None:
        self._pages = pages
        self._deadline = deadline
        self._ours, self.for_criu = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self._ours, self.for_criu):
            _widen(end)
        self._receiver = Receiver()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(PIECE_BYTES)))
        self._full: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="receive", daemon=True)
        self._storer = threading.Thread(target=self._store, name="pages", daemon=True)

    @property
    def raw_bytes(self) -> int:
        """Bytes of memory received so far."""
        return self._receiver.raw_bytes

    @property
    def spaces(self) -> list[AddressSpace]:
        """The address spaces opened so far, also those without a single page."""
        return list(self._receiver.spaces)

    @property
    def failure(self) -> BaseException | None:
        """What ended the stream before its end, if anything did."""
        return self._failure

    def start(self) -> None:
        """Begin to receive.

        Raises:
            errors.EnvironmentUnfit: no thread can be started.
        """
        threads.start(self._storer)
        try:
            threads.start(self._thread)
        except BaseException:
            self._full.put(None)  # nobody else ends the other one
            raise

    def release(self) -> None:
        """Close this process's copy of CRIU's end, so that CRIU's death is seen."""
        self.for_criu.close()

    def finish(self) -> None:
        """Wait for the end of the stream; all of it is in the sink when this returns.

        Raises:
            BaseException: what the sink or the protocol raised.
        """
        for thread in (self._thread, self._storer):
            thread.join(self._deadline.remaining_s)
            if thread.is_alive():
                raise errors.DeadlineExceeded("the memory of the tree did not arrive in time")
        if self._failure is not None:
            raise self._failure
        if not self._receiver.complete:
            raise _broken("the stream ended early")

    def close(self) -> None:
        """Shut the stream, so that both sides notice, and wait for the threads; safe to repeat.

        A sink that blocks holds this up: only the sink knows when it gives in.
        """
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        for thread in (self._thread, self._storer):
            if thread.is_alive():
                thread.join()
        self._ours.close()
        self.for_criu.close()

    def _serve(self) -> None:
        try:
            self._receive_all()
        except BaseException as exc:  # noqa: BLE001 - carried to the thread that asked, by finish
            self._fail(exc)
        finally:
            self._full.put(None)

    def _store(self) -> None:
        """Hand pieces on while the next ones arrive; after a failure only give buffers back."""
        while (piece := self._full.get()) is not None:
            if self._failure is None:
                try:
                    self._pages(piece.space, piece.run, piece.data)
                except BaseException as exc:  # noqa: BLE001 - likewise
                    self._fail(exc)
            self._free.put(piece.buffer)

    def _fail(self, exc: BaseException) -> None:
        # The first failure is the cause, what the other thread then meets is its consequence.
        with self._lock:
            self._failure = self._failure or exc
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)

    def _receive_all(self) -> None:
        header = bytearray(HEADER.size)
        while not self._receiver.complete:
            self._fill(memoryview(header))
            parsed = parse(header)
            answer = self._receiver.accept(parsed)
            if parsed.run is not None and parsed.space is not None:
                self._receive_run(parsed.space, parsed.run)
            if answer:
                self._answer(answer)

    def _receive_run(self, space: AddressSpace, run: PageRun) -> None:
        address, left = run.address, run.pages
        while left:
            pages = min(left, PIECE_BYTES // PAGE_BYTES)
            buffer = self._free.get()
            data = buffer[: pages * PAGE_BYTES]
            self._fill(data)
            self._full.put(_Piece(space, PageRun(address, pages, run.flags), data, buffer))
            address += pages * PAGE_BYTES
            left -= pages

    def _answer(self, answer: bytes) -> None:
        try:
            self._ours.send(answer, socket.MSG_NOSIGNAL)
        except ConnectionError as exc:
            raise _broken("CRIU broke the stream off") from exc

    def _fill(self, target: memoryview) -> None:
        while target:
            try:
                self._wait_at_most(self._deadline.remaining_s)
                # Not a look at every 64 KiB that CRIU sends: each would wait for the interpreter.
                got = self._ours.recv_into(target, len(target), socket.MSG_WAITALL)
            except BlockingIOError:
                raise errors.DeadlineExceeded(
                    "the memory of the tree did not arrive in time"
                ) from None
            except ConnectionError as exc:
                raise _broken("CRIU broke the stream off") from exc
            if not got:
                raise _broken("the stream ended early")
            target = target[got:]

    def _wait_at_most(self, seconds: float) -> None:
        # 0 would be no limit.
        whole, us = divmod(max(1, int(seconds * 1e6)), 10**6)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(whole, us))


def _widen(end: socket.socket) -> None:
    """Raise the socket's buffers above the system's limit, or to it without the privilege."""
    for force, plain in (
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
    ):
        try:
            end.setsockopt(socket.SOL_SOCKET, force, _SOCKET_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BYTES)


def _broken(what: str) -> errors.CriuFailed:
    return errors.CriuFailed(
        f"CRIU's memory stream: {what}",
        hint="CRIU died, or speaks a protocol that this program does not know",
    )
