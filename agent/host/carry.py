"""A connection that somebody else made, offered once more as a Unix socket: for libraries that only
know how to connect by themselves.

Promises: the socket lies in a directory that only this program's user may enter, and takes one
connection; bytes flow both ways at once with bounded memory until the deadline, at which both ends
are cut, whoever waits for what; leaving the context ends everything:
the far end has let go of its connection, if it does so within a second of our end's leaving and
before the deadline, so that a peer that is frozen next has nothing of it left.
Does not: look at what flows.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
import threading
from collections.abc import Iterator

from agent.host import clock

_READ_BYTES = 65536
# Servers close at once when their caller has; some never do.
_CLOSES_S = 1.0


@contextlib.contextmanager
def carried(far: socket.socket, deadline: clock.Deadline) -> Iterator[str]:
    """The path of a socket that leads to where ``far`` does, which is closed at the end."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(far)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-agent-"))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        path = os.path.join(folder, "far")
        listener.bind(path)
        listener.listen(1)
        stopped, stop = os.pipe()
        stack.callback(os.close, stopped)
        carrier = threading.Thread(
            target=_carry, args=(listener, far, stopped, deadline), name="carry"
        )
        carrier.start()
        stack.callback(carrier.join)
        stack.callback(os.close, stop)
        yield path


def _carry(
    listener: socket.socket, far: socket.socket, stopped: int, deadline: clock.Deadline
) -> None:
    """Carry one connection until it has ended, or the other end of ``stopped`` is closed."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(stopped, select.POLLIN)
    if all(ready == stopped for ready, _ in poll.poll()):
        return
    near, _ = listener.accept()
    # Whoever tries again is refused, as it would be by the far end.
    listener.close()
    with near:
        out = threading.Thread(target=_copy, args=(near, far), name="carry out")
        back = threading.Thread(target=_copy, args=(far, near), name="carry back")
        for each in (out, back):
            each.start()
        _wait_for_end(stopped, deadline)
        # Our end has left, or is about to: its last words go out, then the far end closes.
        _shut(near, socket.SHUT_RD)
        closes = deadline.sooner(_CLOSES_S)
        for each in (out, back):
            each.join(closes.remaining_s)
        for end in (near, far):
            _shut(end, socket.SHUT_RDWR)
        for each in (out, back):
            each.join()


def _wait_for_end(stopped: int, deadline: clock.Deadline) -> None:
    poll = select.poll()
    poll.register(stopped, select.POLLIN)
    poll.poll(deadline.remaining_s * 1000)


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Until the source ends, or one of them breaks."""
    with contextlib.suppress(OSError):
        while piece := source.recv(_READ_BYTES):
            target.sendall(piece)
    _shut(target, socket.SHUT_WR)


def _shut(end: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        end.shutdown(how)
