"""One request over a connection that somebody else made, wherever it leads.

Promises: it has ended by its deadline, however slowly the other end speaks; an answer of any size
costs a few kilobytes; the other end has let go of the connection, if it does so within a second
of its answer, so that a peer that is frozen next has nothing of it left; redirections are not
followed.
Does not: judge the answer's content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import threading

from agent import errors
from agent.host import clock

_KEPT_BYTES = 4096
_READ_BYTES = 65536
# Servers close at once when they were asked to; some never do.
_CLOSES_S = 1.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """The status, and how the content ends."""

    status: int
    tail: bytes


def post(connected: socket.socket, path: str, body: bytes, deadline: clock.Deadline) -> Answer:
    """Send JSON and read the answer; closes the socket.

    Raises:
        errors.DeadlineExceeded: the answer was not whole in time.
        errors.Unreachable: the other end does not speak HTTP, or hung up.
    """
    connection = http.client.HTTPConnection("localhost")
    connection.sock = connected
    # The client closes its own when it has read all that was announced.
    kept = connected.dup()
    # A time limit of the socket's own would begin anew with every byte.
    cut = threading.Timer(deadline.remaining_s, _cut, (kept,))
    cut.daemon = True
    cut.start()
    try:
        # With HTTP/1.1 and this, the other end closes when it has answered.
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        tail = b""
        while piece := response.read(_READ_BYTES):
            tail = (tail + piece)[-_KEPT_BYTES:]
        _await_end(kept, deadline.sooner(_CLOSES_S))
    except (OSError, http.client.HTTPException, ValueError) as exc:
        if deadline.expired:
            raise _late() from exc
        raise errors.Unreachable(
            f"what listens there does not answer as an HTTP server does: {type(exc).__name__}",
            hint="look at what listens there",
        ) from exc
    finally:
        cut.cancel()
        connection.close()
        connected.close()
        kept.close()
    if deadline.expired:
        raise _late()
    return Answer(response.status, tail)


def _await_end(connected: socket.socket, deadline: clock.Deadline) -> None:
    """Read until the other end has closed."""
    # Reset is closed as well.
    with contextlib.suppress(OSError):
        while not deadline.expired:
            connected.settimeout(deadline.remaining_s or _CLOSES_S)
            if not connected.recv(_READ_BYTES):
                return


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has just ended by itself
        connected.shutdown(socket.SHUT_RDWR)


def _late() -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded("it did not answer in time", hint="allow more time")
