"""The webhook's HTTPS server: one path for reviews, two for probes.

From the standard library: what must be served is one small request at a time over HTTP/1.1, and
the limits below are easier to state than to configure.

Promises: bounded in everything that a stranger in the cluster's network could use up: connections,
bytes of a request, time for it; a handshake or a slow client holds up nobody else; a new
certificate is used by the next connection, without a restart; stopping lets what was begun end.
Does not: ask who calls: an answer tells nothing but what the caller sent.
"""

from __future__ import annotations

import contextlib
import http
import http.server
import io
import logging
import os
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from agent import errors
from agent.admission.certificates import Pair
from agent.host import clock
from agent.host.clock import Deadline

logger = logging.getLogger(__name__)

PATH = "/mutate"
# An API server takes at most 3 MiB from its clients and sends the object once.
_BODY_BYTES = 4 << 20
# Connections at once. Beyond half of them each is closed after its answer, so that idle ones of
# one API server do not keep another waiting; beyond all of them the kernel's queue holds the rest.
_CONNECTIONS = 128
# Requests in memory at once: with their bodies this bounds it to 64 MiB.
_REQUESTS = 16
_REQUEST_S = 5.0
# Longer than an API server's 90 s, so that it is never the one whose connection has just gone.
_IDLE_S = 120.0
_POLL_S = 0.1


def tls_context(pair: Pair) -> ssl.SSLContext:
    """What a server shows as itself. The key is in memory only: the ssl module reads files, and
    this one has no name.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        text = pair.certificate + pair.key
        while text:
            text = text[os.write(descriptor, text) :]
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Answers on ``port`` (0: one that is free) of all addresses. ``answer`` turns a review into
    its answer and raises ``errors.InvalidInput`` for what is none.

    Call ``present`` before ``serve_forever``.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, port: int, answer: Callable[[bytes], bytes]) -> None:
        both = socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if both else socket.AF_INET
        self.answer = answer
        self.ready = False
        self._context: ssl.SSLContext | None = None
        self._slots = threading.Semaphore(_CONNECTIONS)
        self.requests = threading.Semaphore(_REQUESTS)
        self._lock = threading.Lock()
        self._open = 0
        self._busy = 0
        self._draining = False
        self._stopping = False
        super().__init__(("::" if both else "", port), _Handler)

    def server_bind(self) -> None:
        """Bind for IPv6 and IPv4 alike, and ask no name service for our own name."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.socket.getsockname()[1]

    def present(self, pair: Pair) -> None:
        """Show this certificate from the next connection on."""
        self._context = tls_context(pair)

    def drain(self) -> None:
        """Be ready no more, and close each connection after its answer, so that clients turn to
        another replica between two requests, not in the middle of one.
        """
        self.ready = False
        self._draining = True

    def stop(self, deadline: Deadline) -> None:
        """Answer no new connections; return when every request was answered or at the deadline."""
        self.drain()
        self._stopping = True
        self.shutdown()
        if not clock.wait_until(lambda: self._busy == 0, deadline):
            logger.warning("stopped with requests unanswered")

    @property
    def crowded(self) -> bool:
        """Whether a connection is better closed after its answer."""
        return self._draining or self._open > _CONNECTIONS // 2

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around one request: it is waited for when the server stops."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to a thread of its own, once there is room for one."""
        while not self._slots.acquire(timeout=_POLL_S):
            if self._stopping:
                self.shutdown_request(request)
                return
        with self._lock:
            self._open += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection. The handshake is made here, where nobody else waits for it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open -= 1
            self._slots.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands, then serve requests until the client has no more."""
        if self._context is None:
            return
        request.settimeout(_REQUEST_S)
        with self._context.wrap_socket(request, server_side=True) as secured:
            _Handler(secured, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that speaks no TLS, or goes away, is no event; anything else is a defect."""
        error = sys.exception()
        if isinstance(error, OSError):
            logger.debug("a connection ended early: %s", error)
        else:
            logger.error("a request could not be served", exc_info=error)


class _Timed(io.RawIOBase):
    """Reads a socket against a deadline for all reads together."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline = Deadline.after(_IDLE_S)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining_s = self.deadline.remaining_s
        if remaining_s == 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(remaining_s)
        return self._connection.recv_into(buffer)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    server_version = "ckpt-agent"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._timed = _Timed(self.connection)
        self._reader = io.BufferedReader(self._timed)
        self.rfile = self._reader

    def handle_one_request(self) -> None:
        """Wait for a request while the client may idle, then for all of it within its time."""
        self._timed.deadline = Deadline.after(_IDLE_S)
        try:
            if not self._reader.peek(1):
                self.close_connection = True
                return
            self._timed.deadline = Deadline.after(_REQUEST_S)
            with self.server.working():
                super().handle_one_request()
        except (OSError, ValueError):
            self.close_connection = True

    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._send(http.HTTPStatus.OK, b"ok\n", "text/plain")
        elif self.path == "/readyz":
            ready = self.server.ready
            status = http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            self._send(status, b"ok\n" if ready else b"not ready\n", "text/plain")
        else:
            self._refuse(http.HTTPStatus.NOT_FOUND, "there is no such path")

    def do_POST(self) -> None:
        # The API server adds ?timeout=3s.
        if self.path.partition("?")[0] != PATH:
            self._refuse(http.HTTPStatus.NOT_FOUND, "there is no such path")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._refuse(http.HTTPStatus.LENGTH_REQUIRED, "say Content-Length")
            return
        if len(length) > len(str(_BODY_BYTES)) or int(length) > _BODY_BYTES:
            self._refuse(
                http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_BODY_BYTES} bytes are read"
            )
            return
        if not self.server.requests.acquire(timeout=self._timed.deadline.remaining_s):
            self._refuse(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once")
            return
        try:
            self._answer(self.rfile.read(int(length)), int(length))
        finally:
            self.server.requests.release()

    def _answer(self, body: bytes, length: int) -> None:
        if len(body) != length:
            self.close_connection = True
            return
        try:
            answer = self.server.answer(body)
        except errors.InvalidInput as exc:
            self._refuse(http.HTTPStatus.BAD_REQUEST, f"{exc.message}: {exc.hint}")
            return
        self._send(http.HTTPStatus.OK, answer, "application/json")

    def _refuse(self, status: http.HTTPStatus, reason: str) -> None:
        self.close_connection = True  # what is left of the request is not read
        self._send(status, f"{reason}\n".encode(), "text/plain")

    def _send(self, status: http.HTTPStatus, body: bytes, kind: str) -> None:
        self.close_connection = self.close_connection or self.server.crowded
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Probes and reviews are too many to log; ``review.py`` tells what was changed."""
