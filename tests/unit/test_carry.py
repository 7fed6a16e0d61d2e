"""A connection that is offered once more as a Unix socket."""

from __future__ import annotations

import os
import socket
import stat
import threading

import pytest

from agent.host import carry, clock


def test_bytes_flow_both_ways_and_the_far_end_hears_that_we_left() -> None:
    far, theirs = socket.socketpair()
    said: list[bytes] = []
    big = os.urandom(1 << 20)

    def answer() -> None:
        with theirs:
            while piece := theirs.recv(1 << 16):
                said.append(piece)
                theirs.sendall(piece)

    thread = threading.Thread(target=answer)
    thread.start()
    with carry.carried(far, clock.Deadline.after(60.0)) as path:
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        with socket.socket(socket.AF_UNIX) as near:
            near.connect(path)
            sender = threading.Thread(target=near.sendall, args=(big,))
            sender.start()
            back = b""
            while len(back) < len(big):
                piece = near.recv(1 << 16)
                assert piece
                back += piece
            sender.join()
    thread.join(30)
    assert not thread.is_alive()
    assert back == big == b"".join(said)
    assert far.fileno() == -1
    assert not os.path.exists(os.path.dirname(path))


def test_there_is_one_connection_and_no_more() -> None:
    far, theirs = socket.socketpair()
    with (
        theirs,
        carry.carried(far, clock.Deadline.after(60.0)) as path,
        socket.socket(socket.AF_UNIX) as near,
    ):
        near.connect(path)
        near.sendall(b"x")
        assert theirs.recv(1) == b"x"
        with (
            socket.socket(socket.AF_UNIX) as second,
            pytest.raises(ConnectionRefusedError),
        ):
            second.connect(path)


def test_a_far_end_that_never_leaves_is_left() -> None:
    far, theirs = socket.socketpair()
    with theirs:
        with (
            carry.carried(far, clock.Deadline.after(60.0)) as path,
            socket.socket(socket.AF_UNIX) as near,
        ):
            near.connect(path)
            near.sendall(b"last words")
        # It neither read nor closed, and what was said before is still there.
        assert theirs.recv(100) == b"last words"
        assert theirs.recv(100) == b""


def test_nobody_has_to_connect() -> None:
    far, theirs = socket.socketpair()
    with theirs:
        with carry.carried(far, clock.Deadline.after(60.0)):
            pass
        assert theirs.recv(1) == b""
