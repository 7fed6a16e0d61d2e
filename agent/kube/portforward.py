"""A pod's port as a local socket, through the API server, with the caller's own rights.

The API server speaks port-forward over a websocket: a first byte names the stream (0 data, 1 what
went wrong), and the first message of each stream holds the port. One websocket is one connection.

Promises: the local end is an AF_UNIX socket in a directory that only the caller may enter; each
connection to it is one to the pod's port; bytes flow both ways at once with bounded memory, and
what was sent before one side closed is delivered; leaving the context ends everything.
Does not: say anything to the pod when the local side stops writing but goes on reading, for which
the protocol has no word.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import websocket
from kubernetes.stream import ws_client
from websocket import ABNF

from agent import errors
from agent.host import clock
from agent.kube import connection

# Two reads ahead of a slow reader; the rest waits in the kernel's buffers.
_AHEAD_BYTES = 256 << 10
# A frame is masked byte by byte and sent whole: larger ones gain nothing.
_FRAME_BYTES = 64 << 10
# Load balancers drop what is silent for a minute, and an API server that is gone must be noticed.
_PING_S = 20.0
_SILENT_S = 90.0
# The handshake passes through the API server to the node's kubelet.
_CONNECT_S = 30.0
_JOIN_S = 5.0
_DATA, _ERROR = 0, 1

T = TypeVar("T")


class Forward:
    """A port-forward that stands: ``path`` is the socket. ``reason`` tells why the last
    connection could not be made or broke, "" if none did.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.reason = ""


@contextlib.contextmanager
def forward(api: connection.Connection, namespace: str, pod: str, port: int) -> Iterator[Forward]:
    """Forward connections to ``port`` of a pod until the context is left.

    A pod that is not there or rights that lack show when the first connection is made: it is
    closed at once and ``Forward.reason`` says why.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-agent-"))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        made = Forward(os.path.join(folder, "agent"))
        listener.bind(made.path)
        listener.listen()
        stopped, stop = os.pipe()
        stack.callback(os.close, stopped)
        server = threading.Thread(
            target=_serve, args=(api, f"{namespace}/{pod}", port, listener, stopped, made)
        )
        server.start()
        stack.callback(server.join)
        stack.callback(os.close, stop)
        yield made


def _serve(
    api: connection.Connection,
    pod: str,
    port: int,
    listener: socket.socket,
    stopped: int,
    made: Forward,
) -> None:
    """Accept until ``stopped`` is readable, then wait for every connection's end."""
    running: list[threading.Thread] = []
    while _readable(listener.fileno(), stopped):
        local, _ = listener.accept()

        def carry(local: socket.socket = local) -> None:
            with local:
                try:
                    with _dialled(api, pod, port) as remote:
                        _Pump(local, remote, stopped).run()
                except errors.CkptError as exc:
                    made.reason = exc.message
                except (websocket.WebSocketException, OSError) as exc:
                    made.reason = f"the connection to pod {pod} broke: {exc}"

        thread = threading.Thread(target=carry)
        thread.start()
        running = [*(each for each in running if each.is_alive()), thread]
    deadline = clock.Deadline.after(_JOIN_S)
    for thread in running:
        thread.join(deadline.remaining_s)


def _readable(fd: int, stopped: int) -> bool:
    """Wait for ``fd``; False if ``stopped`` came first."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(stopped, select.POLLIN)
    return all(ready != stopped for ready, _ in poll.poll())


@contextlib.contextmanager
def _dialled(
    api: connection.Connection, pod: str, port: int
) -> Iterator[tuple[websocket.WebSocket, socket.socket]]:
    """A websocket to a pod's port and the socket below it."""
    namespace, name = pod.split("/")
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/portforward?ports={port}"
    headers = {"sec-websocket-protocol": ws_client.V4_CHANNEL_PROTOCOL}
    bearer = api.authorization()
    if bearer:
        headers["authorization"] = bearer
    # The package's maker of websockets takes no timeout; this is where one is read from.
    websocket.setdefaulttimeout(_CONNECT_S)
    try:
        made = ws_client.create_websocket(
            api.configuration(), ws_client.get_websocket_url(api.url + path), headers
        )
    except websocket.WebSocketBadStatusException as exc:
        raise _refusal(exc, pod, api.name) from exc
    wire = made.sock
    try:
        if wire is None:
            raise errors.Unreachable(f"the API server closed the port-forward to pod {pod}")
        yield made, wire
    finally:
        # Not close(), which waits seconds for the other side to agree.
        made.shutdown()


def _refusal(
    exc: websocket.WebSocketBadStatusException, pod: str, cluster: str
) -> errors.CkptError:
    body = exc.resp_body or b""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body)
    what = f"pod {pod} to forward to"
    return connection.refusal(exc.status_code, connection.parsed(text.encode()), what, cluster)


class _Pump:
    """Carries bytes between a local socket and a websocket, in one thread, never blocking on
    one direction while the other could go on.
    """

    def __init__(
        self,
        local: socket.socket,
        remote: tuple[websocket.WebSocket, socket.socket],
        stopped: int,
    ) -> None:
        self._local = local
        self._remote, self._wire = remote
        self._stopped = stopped
        self._out = bytearray()
        self._in = bytearray()
        # It writes no more; it takes no more either.
        self._local_ended = False
        self._local_gone = False
        self._remote_ended = False
        self._problem = ""
        self._greeted: set[int] = set()
        local.setblocking(False)
        # The websocket's own timeout would also be that of each of its reads.
        self._wire.setblocking(False)

    def run(self) -> None:
        """Carry until both sides have ended, or the caller leaves.

        Raises:
            errors.Unreachable: the node refused the connection.
            OSError | websocket.WebSocketException: the connection to the API server broke.
        """
        heard_s = clock.monotonic_s()
        while not self._ended():
            ready = self._poll()
            if self._stopped in ready:
                return
            now_s = clock.monotonic_s()
            if self._wire.fileno() in ready:
                heard_s = now_s
            elif now_s - heard_s > _SILENT_S:
                raise errors.Unreachable("the API server has been silent for too long")
            elif not ready and not self._out:
                self._out += ABNF.create_frame(b"", ABNF.OPCODE_PING).format()
            self._step(ready)
        if self._problem:
            raise errors.Unreachable(self._problem)

    def _ended(self) -> bool:
        if self._remote_ended:
            return not self._in or self._local_gone
        # A peer that is gone can take nothing; one that only stopped writing still reads.
        return self._local_ended and not self._out and self._hung_up()

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._local, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))

    def _poll(self) -> dict[int, int]:
        poll = select.poll()
        poll.register(self._stopped, select.POLLIN)
        local = 0
        if not self._local_ended and len(self._out) < _AHEAD_BYTES:
            local |= select.POLLIN
        if self._in:
            local |= select.POLLOUT
        if local or not self._out:
            poll.register(self._local, local)
        remote = 0
        if not self._remote_ended:
            remote |= select.POLLIN if len(self._in) < _AHEAD_BYTES else 0
            remote |= select.POLLOUT if self._out else 0
            poll.register(self._wire, remote)
        at_once = bool(remote & select.POLLIN) and self._decrypted()
        ready = dict(poll.poll(0 if at_once else _PING_S * 1000))
        if at_once:
            number = self._wire.fileno()
            ready[number] = ready.get(number, 0) | select.POLLIN
        return ready

    def _decrypted(self) -> bool:
        """Whether TLS holds bytes that no poll of the socket would show."""
        return isinstance(self._wire, ssl.SSLSocket) and self._wire.pending() > 0

    def _step(self, ready: dict[int, int]) -> None:
        local = ready.get(self._local.fileno(), 0)
        remote = ready.get(self._wire.fileno(), 0)
        ended = select.POLLHUP | select.POLLERR
        if remote & (select.POLLIN | ended):
            self._receive()
        if self._in and local & (select.POLLOUT | ended):
            self._deliver()
        if not self._local_ended and local & (select.POLLIN | ended):
            self._take()
        if self._out and not self._remote_ended:
            self._send()

    def _take(self) -> None:
        """From the local side into a frame."""
        part = _unless_blocked(lambda: self._local.recv(_FRAME_BYTES))
        if part is None:
            return
        if part:
            frame = ABNF.create_frame(bytes((_DATA,)) + part, ABNF.OPCODE_BINARY)
            self._out += frame.format()
        else:
            self._local_ended = True

    def _send(self) -> None:
        sent = _unless_blocked(lambda: self._wire.send(self._out))
        if sent:
            del self._out[:sent]

    def _deliver(self) -> None:
        try:
            sent = _unless_blocked(lambda: self._local.send(self._in))
        except (BrokenPipeError, ConnectionResetError):
            self._in.clear()
            self._local_ended = self._local_gone = True
            return
        if sent:
            del self._in[:sent]

    def _receive(self) -> None:
        """One frame; a part of one stays in the websocket's own buffer."""
        try:
            frame = _unless_blocked(self._remote.recv_frame)
        except websocket.WebSocketConnectionClosedException:
            self._remote_ended = True
            return
        if frame is None:
            return
        if frame.opcode == ABNF.OPCODE_CLOSE:
            self._remote_ended = True
        elif frame.opcode == ABNF.OPCODE_PING:
            self._out += ABNF.create_frame(frame.data, ABNF.OPCODE_PONG).format()
        elif frame.opcode in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and frame.data:
            self._understand(frame.data[0], frame.data[1:])

    def _understand(self, stream: int, data: bytes) -> None:
        if stream not in self._greeted:
            self._greeted.add(stream)  # its first message repeats the port
        elif stream == _DATA:
            self._in += data
        elif stream == _ERROR:
            self._problem += data.decode("utf-8", "replace")
            self._remote_ended = True


def _unless_blocked(act: Callable[[], T]) -> T | None:
    """Call ``act``; None if it would have to wait."""
    try:
        return act()
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None
