"""The client of ``criu swrk``: one request, its notifications, its reply.

CRIU speaks over an AF_UNIX SEQPACKET socket, one protobuf message a packet. With
``notify_scripts`` it sends a NOTIFY at each stage and stands still until it is answered; "no"
makes it undo what it did. One ``swrk`` process serves one request.

Promises: every wait has the request's deadline; a CRIU that died or talks nonsense is a typed
error; what a handler raises is answered with "no", and raised again when CRIU has undone its work.
Does not: know what a dump or a restore is, or read CRIU's log.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError
from pycriu import rpc_pb2

from agent import errors
from agent.engines.criu import log
from agent.host import clock, subprocesses

# CRIU's largest reply holds a message text of a few KiB.
_PACKET_BYTES = 1 << 16
# Failing takes CRIU a thaw and a few system calls a process.
_UNDO_S = 20.0

# What a dump or restore is told about connections: CRIU locks none.
LOCK_NOTHING = rpc_pb2.SKIP

# The generated messages have no types.
Request: TypeAlias = Any
Response: TypeAlias = Any
# Called with the name of a stage and, for ``orphan-pts-master``, the descriptor that came along
# (the handler owns it); ``setup-namespaces`` carries the root's pid.
Handler = Callable[[str, int, int | None], None]
# Starts a program by its arguments, descriptors and directory.
Start = Callable[[list[str], list[int], str | None], subprocesses.Child]


class Gone(errors.CriuFailed):
    """CRIU closed the connection without a reply: it died."""


class Connection:
    """Our end of the socket to one ``criu swrk``, whose process is ``child``."""

    def __init__(self, sock: socket.socket, child: subprocesses.Child) -> None:
        self._sock = sock
        self._child = child

    def request(
        self, request: Request, handler: Handler | None, deadline: clock.Deadline
    ) -> Response:
        """Send ``request``, answer its notifications, return the reply, successful or not.

        Raises:
            Gone: CRIU ended without a reply.
            errors.DeadlineExceeded: no reply in time; CRIU is still at it, so close and end it.
            BaseException: what ``handler`` raised, after CRIU replied that it gave up.
        """
        self._send(request)
        raised: BaseException | None = None
        while True:
            response, descriptor = self._receive(deadline)
            if response.type != rpc_pb2.NOTIFY:
                if raised is not None:
                    raise raised
                return response
            if raised is None:
                try:
                    deadline.check(f"CRIU's {response.notify.script}")
                    if handler is not None:
                        handler(response.notify.script, response.notify.pid, descriptor)
                        descriptor = None
                except BaseException as exc:  # noqa: BLE001 - raised again when CRIU has undone its work
                    raised = exc
                    deadline = clock.Deadline.after(_UNDO_S)
            if descriptor is not None:
                os.close(descriptor)
            self._send(rpc_pb2.criu_req(type=rpc_pb2.NOTIFY, notify_success=raised is None))

    def close(self) -> None:
        """End the connection; a CRIU that waits for an answer takes it for a "no"."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _send(self, request: Request) -> None:
        try:
            self._sock.send(request.SerializeToString(), socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise Gone("CRIU died", hint="its log may say why") from exc

    def _receive(self, deadline: clock.Deadline) -> tuple[Response, int | None]:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        # A CRIU that is killed may leave children that hold its end of the socket.
        poll.register(self._child, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(deadline.remaining_s * 1000)]
        if not ready:
            raise errors.DeadlineExceeded("CRIU did not answer in time")
        if self._sock.fileno() not in ready and not select.select([self._sock], [], [], 0)[0]:
            raise Gone("CRIU died", hint="its log may say why")
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _PACKET_BYTES, 1)
        except ConnectionResetError:
            data, descriptors = b"", []
        descriptor = descriptors[0] if descriptors else None
        if not data:
            raise Gone("CRIU died", hint="its log may say why")
        response = rpc_pb2.criu_resp()
        try:
            response.ParseFromString(data)
        except DecodeError as exc:
            if descriptor is not None:
                os.close(descriptor)
            raise errors.CriuFailed("CRIU's reply is not a valid message") from exc
        return response, descriptor


class Worker:
    """One ``criu swrk`` process and the connection to it."""

    def __init__(self, child: subprocesses.Child, connection: Connection) -> None:
        self.child = child
        self.connection = connection

    def end(self, *, alone: bool = True) -> int:
        """Close the connection, let CRIU undo what it was doing, kill it if it does not; reap it
        and return its exit status (128 + N if signal N ended it).

        With ``alone``, what it left in its session is killed too: probes of the kernel that it was
        killed in the middle of, or a half-restored tree. Ending it again does nothing.
        """
        self.connection.close()
        if not self.child.ended(clock.Deadline.after(_UNDO_S)):
            self.child.send(signal.SIGKILL)
            self.child.ended(clock.Deadline.after(_UNDO_S))
        if alone:
            self.child.kill_session()
        return self.child.wait(clock.Deadline.after(_UNDO_S))


def _beside(argv: list[str], pass_fds: list[int], cwd: str | None) -> subprocesses.Child:
    return subprocesses.start(argv, pass_fds=pass_fds, cwd=cwd)


@contextlib.contextmanager
def worker(
    command: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
    start: Start | None = None,
) -> Iterator[Worker]:
    """Start ``criu swrk``; leaving the context ends and reaps it.

    ``command`` is CRIU with the options that come first. ``start`` is for another place than
    beside this program.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            # No configuration files: /etc/criu/*.conf would override what is asked for here.
            argv = [*command, "--no-default-config", "swrk", str(theirs.fileno())]
            child = (start or _beside)(argv, [theirs.fileno(), *pass_fds], cwd)
        except BaseException:
            ours.close()
            raise
    running = Worker(child, Connection(ours, child))
    try:
        yield running
    finally:
        running.end()


def checked(action: str, response: Response, log_path: str) -> Response:
    """Return a successful ``response``.

    Raises:
        errors.CriuFailed: with the telling part of the log.
    """
    if not response.success:
        raise log.failure(
            action, log.read(log_path), response.cr_errmsg, criu_errno=response.cr_errno
        )
    return response
