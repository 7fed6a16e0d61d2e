"""The page server's protocol: what is understood, what is refused, and that nothing hangs."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import errors
from agent.engines.criu import pageserver
from agent.engines.criu.pageserver import PE_LAZY, PE_PRESENT, Command, PageServer, Receiver, parse
from agent.host import clock
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun

PROCESS = AddressSpace("process", 4711)
SHMEM = AddressSpace("shmem", 9)


def header(
    command: int, space: AddressSpace = PROCESS, address: int = 0, pages: int = 0, flags: int = 0
) -> bytes:
    kind = {"process": 1, "shmem": 2}[space.kind]
    return pageserver.HEADER.pack(flags << 16 | command, 0, pages, address, space.id << 8 | kind)


def run(page: int, pages: int, space: AddressSpace = PROCESS, flags: int = PE_PRESENT) -> bytes:
    return header(Command.ADD_F, space, page * PAGE_BYTES, pages, flags)


class Peer:
    """CRIU's side of a server whose sink keeps what it is given."""

    def __init__(self, deadline_s: float = 10.0) -> None:
        self.got: list[tuple[AddressSpace, PageRun, bytes]] = []
        self.raises: BaseException | None = None
        self.server = PageServer(self._pages, clock.Deadline.after(deadline_s))
        self.sock = self.server.for_criu
        self.sock.settimeout(10)
        self.server.start()

    def _pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        if self.raises:
            raise self.raises
        self.got.append((space, run, bytes(data)))

    def open(self, space: AddressSpace = PROCESS) -> None:
        self.sock.sendall(header(Command.OPEN2, space))
        assert self.sock.recv(1) == b"\0"

    def end(self) -> None:
        self.sock.sendall(header(Command.FORCE_CLOSE))
        assert self.sock.recv(4) == bytes(4)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.close()


def test_runs_reach_the_sink_in_order_and_byte_for_byte() -> None:
    with Peer() as criu:
        criu.open()
        criu.sock.sendall(run(1, 2) + b"a" * 2 * PAGE_BYTES)
        criu.sock.sendall(run(7, 1, flags=PE_PRESENT | PE_LAZY) + b"b" * PAGE_BYTES)
        criu.open(SHMEM)
        criu.sock.sendall(run(0, 1, SHMEM) + b"c" * PAGE_BYTES)
        criu.end()
        criu.server.finish()
        assert criu.got == [
            (PROCESS, PageRun(PAGE_BYTES, 2, PE_PRESENT), b"a" * 2 * PAGE_BYTES),
            (PROCESS, PageRun(7 * PAGE_BYTES, 1, PE_PRESENT | PE_LAZY), b"b" * PAGE_BYTES),
            (SHMEM, PageRun(0, 1, PE_PRESENT), b"c" * PAGE_BYTES),
        ]
        assert criu.server.raw_bytes == 4 * PAGE_BYTES
        assert criu.server.spaces == [PROCESS, SHMEM]


def test_a_long_run_comes_in_pieces_of_bounded_size() -> None:
    pages = pageserver.PIECE_BYTES // PAGE_BYTES * 2 + 3
    content = struct.pack(f"<{pages}Q", *range(pages))
    with Peer() as criu:
        criu.open()
        criu.sock.sendall(run(0, pages))
        for page in range(pages):
            criu.sock.sendall(content[page * 8 : page * 8 + 8] * (PAGE_BYTES // 8))
        criu.end()
        criu.server.finish()
        assert [piece.pages for _, piece, _ in criu.got] == [512, 512, 3]
        whole = b"".join(data for _, _, data in criu.got)
        assert whole[::PAGE_BYTES] == content[::8]


def test_an_address_space_without_a_page_is_remembered() -> None:
    with Peer() as criu:
        criu.open()
        criu.end()
        criu.server.finish()
        assert criu.server.spaces == [PROCESS]
        assert criu.got == []


def test_a_parent_is_never_claimed() -> None:
    with Peer() as criu:
        criu.sock.sendall(header(Command.PARENT))
        assert criu.sock.recv(4) == bytes(4)


def test_what_the_sink_raises_ends_the_stream_and_is_raised_again() -> None:
    with Peer() as criu:
        criu.raises = errors.VolumeFull("full")
        criu.open()
        criu.sock.sendall(run(1, 1) + bytes(PAGE_BYTES))
        assert criu.sock.recv(1) == b""
        with pytest.raises(errors.VolumeFull):
            criu.server.finish()


def test_a_stream_that_ends_early_is_an_error() -> None:
    with Peer() as criu:
        criu.open()
        criu.sock.sendall(run(1, 2) + bytes(PAGE_BYTES))
        criu.sock.close()
        with pytest.raises(errors.CriuFailed, match="ended early"):
            criu.server.finish()


def test_a_silent_criu_is_given_up_at_the_deadline() -> None:
    with Peer(deadline_s=0.2) as criu:
        # On a busy machine it is over before a word was said, or before it was heard.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            criu.sock.sendall(header(Command.OPEN2))
        with pytest.raises(errors.DeadlineExceeded):
            criu.server.finish()
        with contextlib.suppress(ConnectionResetError):
            assert criu.sock.recv(1) in (b"", b"\0")
            assert criu.sock.recv(1) == b""


def test_closing_ends_the_thread_also_in_the_middle() -> None:
    criu = Peer()
    criu.open()
    criu.server.close()
    assert not any(thread.name == "pages" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (header(Command.ADD_F)[:-1], "cut short"),
        (header(3), "unknown command"),
        (header(7), "unknown command"),
        (pageserver.HEADER.pack(4, 0, 0, 0, 4711 << 8 | 3), "unknown kind"),
        (run(1, 1, flags=0), "flags"),
        (run(1, 1, flags=1), "flags"),
        (run(1, 1, flags=PE_LAZY), "flags"),
        (run(1, 0), "0 pages"),
        (header(Command.ADD_F, address=4095, pages=1, flags=4), "pages at"),
        (run(1, 1 << 46), "pages at"),
        (header(Command.ADD_F, address=(1 << 57) - 4096, pages=2, flags=4), "pages at"),
    ],
)
def test_what_breaks_the_protocol_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(errors.CriuFailed, match=says):
        parse(raw)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ([run(1, 1)], "not open"),
        ([header(Command.OPEN2), run(1, 1, SHMEM)], "not open"),
        ([header(Command.OPEN2), header(Command.OPEN2)], "opened twice"),
        ([header(Command.OPEN2), run(5, 2), run(6, 1)], "out of order"),
        ([header(Command.OPEN2), run(5, 2), run(4, 1)], "out of order"),
        ([header(Command.FORCE_CLOSE), header(Command.OPEN2)], "after the end"),
    ],
)
def test_what_comes_out_of_turn_is_refused(headers: list[bytes], says: str) -> None:
    receiver = Receiver()
    for raw in headers[:-1]:
        receiver.accept(parse(raw))
    with pytest.raises(errors.CriuFailed, match=says):
        receiver.accept(parse(headers[-1]))


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_header_or_refused(raw: bytes) -> None:
    with contextlib.suppress(errors.CriuFailed):
        found = parse(raw)
        assert len(raw) == 32
        if found.run is not None:
            assert found.run.pages > 0
            assert found.run.address % PAGE_BYTES == 0


words = st.sampled_from([4, 5, 6, 6 | 4 << 16, 6 | 6 << 16, 0x1023, 0x1024, 0, 0xFFFFFFFF])
numbers = st.sampled_from([0, 1, 2, 4096, 8192, 1 << 40, (1 << 64) - 1])
destinations = st.sampled_from([1, 2, 4711 << 8 | 1, 9 << 8 | 2, 3, (1 << 64) - 1])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(words, numbers, numbers, destinations, st.binary(max_size=64)), max_size=6)
)
def test_any_stream_ends_in_an_error_or_its_end_and_never_hangs(
    parts: list[tuple[int, int, int, int, bytes]],
) -> None:
    with Peer(deadline_s=60) as criu:
        criu.sock.settimeout(None)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for word, pages, address, destination, tail in parts:
                criu.sock.sendall(pageserver.HEADER.pack(word, 0, pages, address, destination))
                criu.sock.sendall(tail)
        criu.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(errors.CriuFailed):
            criu.server.finish()
            assert any(word & 0xFFFF in (0x1023, 0x1024) for word, *_ in parts)
