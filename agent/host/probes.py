"""What a kubelet asks: does the program live, and does it serve?

``/livez`` is 200 as long as the program answers at all, ``/readyz`` 200 or 503. In plain HTTP,
since the answer holds nothing else, and kubelets check no certificates.

Promises: an answer costs a millisecond and needs no identity; who holds a connection open holds up
nobody for longer than ``_PATIENCE_S``, and not more than ``_AT_ONCE`` are served at once.
Does not: say why it is not ready; the log does.
"""

from __future__ import annotations

import http.server
import socketserver
import threading
from collections.abc import Callable
from typing import Any

from agent import errors

_PATIENCE_S = 3.0
_AT_ONCE = 8
_OK, _UNAVAILABLE, _NOT_FOUND = 200, 503, 404


class Probes:
    """Listens on ``port`` (0 takes any that is free); ``ready`` is asked for each ``/readyz``."""

    def __init__(self, port: int, ready: Callable[[], bool]) -> None:
        """Bind the port.

        Raises:
            errors.EnvironmentUnfit: it is taken.
        """

        class Handler(_Handler):
            is_ready = staticmethod(ready)

        try:
            self._server = _Server(("", port), Handler)
        except OSError as exc:
            raise errors.EnvironmentUnfit(
                f"cannot listen on port {port}: {exc.strerror}",
                hint="is another agent running here?",
                port=port,
            ) from exc
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="probes", daemon=True
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Answer."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_PATIENCE_S)


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = _AT_ONCE

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self._free = threading.Semaphore(_AT_ONCE)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(timeout=_PATIENCE_S):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of callers who leave."""

    def server_bind(self) -> None:
        # Without the base's look-up of this host's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "", self.server_address[1]


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = _PATIENCE_S
    is_ready: Callable[[], bool]

    def do_GET(self) -> None:
        """Answer one question."""
        match self.path:
            case "/livez":
                status = _OK
            case "/readyz":
                status = _OK if self.is_ready() else _UNAVAILABLE
            case _:
                status = _NOT_FOUND
        self.send_response_only(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing: a kubelet asks thousands of times a day."""
