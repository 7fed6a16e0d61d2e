"""Holds a training loop at a step boundary while it is checkpointed: no collective communication is
under way then, on any rank.

    with Boundary("/run/quiesce.sock") as boundary:
        for step in range(steps):
            train(step)
            boundary.reached()

The loop serves a Unix socket for two calls, as hooks of its pod (docs/hooks.md) make them:
``POST /quiesce`` is answered when the loop stands in ``reached``; ``POST /resume`` lets it go on.

With several ranks, one that stands before a step would keep another waiting in the middle of it.
So that all stop before the same step, give ``agree``, which every rank calls at every boundary:

    def agree(wanted):  # a tiny all-reduce
        flag = torch.tensor(int(wanted))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

Promises: nobody has to be alive for the loop to go on: it does by itself after ``longest_s``, after
``unasked_s`` where only other ranks were asked, and when the boundary is closed; a boundary that
nobody asked for costs a look at a variable (and ``agree``). A loop that is restored stands where it
stood, and its time goes on where it stopped. Needs nothing but this file.
Does not: know what a checkpoint is, or tell ranks of each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

# Of a request: no hook's is larger, and no peer may hold up its thread for longer.
_REQUEST_BYTES = 65536
_REQUEST_S = 10.0
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    503: "Service Unavailable",
}


@dataclasses.dataclass(frozen=True)
class Resumed:
    """That the loop was held. ``outcome`` is captured, committed, aborted or restored, and "" where
    nobody said that it may go on; ``told`` is all that the hook said (docs/hooks.md).
    """

    outcome: str
    told: dict[str, Any]


class Boundary:
    """Listens at ``path``, for this user alone, from its making until it is closed.

    ``longest_s`` bounds how long the loop is held, and how long it may take to reach a boundary.
    ``prepare`` is called by a loop that is about to be held, such as to finish what a device does.
    ``agree`` gets whether this rank was asked and gives whether any was. A rank that was not asked
    itself goes on after ``unasked_s``: the others may have been given up before its turn came.
    """

    def __init__(
        self,
        path: str,
        *,
        longest_s: float = 120.0,
        unasked_s: float = 10.0,
        agree: Callable[[bool], bool] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Bind the socket.

        Raises:
            OSError: it cannot be there.
        """
        self._path = path
        self._longest_s, self._unasked_s = longest_s, unasked_s
        self._agree, self._prepare = agree, prepare
        self._changed = threading.Condition()
        self._wanted = False
        self._wanted_until_s = 0.0
        self._held = False
        self._resumed: Resumed | None = None
        self._closed = False
        self._listening = _listening(path)
        threading.Thread(target=self._serve, name="quiesce", daemon=True).start()

    def __enter__(self) -> Boundary:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more, and let everybody go who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):  # to wake the thread that accepts
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def reached(self) -> Resumed | None:
        """The loop stands between two steps: hold it here if that was asked for. None if not."""
        wanted = self._wanted and time.monotonic() < self._wanted_until_s
        if self._agree is not None:
            wanted = self._agree(wanted)
        if not wanted:
            return None
        if self._prepare is not None:
            self._prepare()
        with self._changed:
            self._held = True
            self._changed.notify_all()
            self._wait()
            if self._resumed is None:
                self._wanted = False  # else it was asked for anew since
            found = self._resumed or Resumed("", {})
            self._held, self._resumed = False, None
            self._changed.notify_all()
            return found

    def _wait(self) -> None:
        """Wait until the loop may go on."""
        began_s = time.monotonic()
        while self._resumed is None and not self._closed:
            asked = self._wanted
            if not asked and self._agree is None:
                return  # taken back while ``prepare`` ran
            left_s = began_s + (self._longest_s if asked else self._unasked_s) - time.monotonic()
            if left_s <= 0:
                return
            self._changed.wait(left_s)

    def _serve(self) -> None:
        while True:
            try:
                connected, _ = self._listening.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._answer, args=(connected,), daemon=True).start()

    def _answer(self, connected: socket.socket) -> None:
        # Nothing of the connection may be left when the answer is read: the process is frozen next.
        with connected, contextlib.suppress(OSError):
            connected.settimeout(_REQUEST_S)
            try:
                path, told = _request(connected)
            except ValueError:
                status, said = 400, {"problem": "this is no request"}
            else:
                status, said = self._asked(path, told)
            body = json.dumps(said).encode()
            head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connected.sendall(head.encode() + body)

    def _asked(self, path: str, told: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/quiesce":
            held = self._quiesce()
            return (200 if held else 503), {"held": held}
        if path == "/resume":
            return 200, {"held": self._resume(told)}
        return 404, {"problem": "there are /quiesce and /resume"}

    def _quiesce(self) -> bool:
        with self._changed:
            self._wanted = True
            self._wanted_until_s = time.monotonic() + self._longest_s
            self._changed.notify_all()
            # Not wanted any more: it was taken back, or the loop has gone on by itself.
            self._changed.wait_for(
                lambda: self._stands() or not self._wanted or self._closed, self._longest_s
            )
            if not self._stands():
                self._wanted = False
            return self._stands()

    def _stands(self) -> bool:
        """Held, and not about to go on."""
        return self._held and self._resumed is None

    def _resume(self, told: dict[str, Any]) -> bool:
        with self._changed:
            held, self._wanted = self._held, False
            if held:
                self._resumed = Resumed(str(told.get("outcome", "")), told)
            self._changed.notify_all()
            return held


def _listening(path: str) -> socket.socket:
    """A socket bound to ``path``, in place of one that a process before has left."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        made.bind(path)
        os.chmod(path, 0o600)
        made.listen()
    except BaseException:
        made.close()
        raise
    return made


def _request(connected: socket.socket) -> tuple[str, dict[str, Any]]:
    """Path and content of a POST; raises ``ValueError`` if it is none that can be read."""
    head, _, body = _read(connected, lambda text: b"\r\n\r\n" in text).partition(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    if method != "POST":
        raise ValueError(method)
    named = {name.strip().lower(): value for name, _, value in (f.partition(":") for f in fields)}
    length = int(named.get("content-length", "0"))
    body = _read(connected, lambda text: len(text) >= length, body)
    told = json.loads(body or b"{}")
    return path.partition("?")[0], told if isinstance(told, dict) else {}


def _read(connected: socket.socket, whole: Callable[[bytes], bool], text: bytes = b"") -> bytes:
    while not whole(text):
        piece = connected.recv(4096)
        text += piece
        if not piece or len(text) > _REQUEST_BYTES:
            raise ValueError("cut off")
    return text
