"""A container's shim: the program through which containerd has runc do things to it, and which
keeps what containerd knows of it while containerd is not there.

There is one for each pod, the parent of its containers' first processes. It speaks ttrpc on a
socket of its own, and all that must be said is one message: ``Resume`` with the container's name.

Sources: github.com/containerd/ttrpc (PROTOCOL.md, request.proto), containerd's
api/runtime/task/v3/shim.proto and cmd/containerd-shim-runc-v2.

Promises: every wait ends with the deadline.
Does not: raise for a shim that is gone or refuses; that is told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
from collections.abc import Callable

from agent import errors
from agent.host import clock, proc, sockets

log = logging.getLogger(__name__)

_SOCKET = re.compile(r"/\S*/containerd/s/[0-9a-f]{64}")
# containerd 2 and 1.
_SERVICES = ("containerd.task.v3.Task", "containerd.task.v2.Task")
# ttrpc: length of what follows, stream (odd for clients), type (1: a request), flags.
_HEAD = struct.Struct(">IIBB")
_REQUEST = 1
_ANSWER_BYTES = 4096
_LEAST_S = 0.02
# The field "status" of an answer, a message that is empty where all went well.
_STATUS = 0x0A


class Shim:
    """The shim with this pid, listening on a socket that this program reaches as ``path``."""

    def __init__(self, pid: int, path: str) -> None:
        self.pid = pid
        self._path = path

    @classmethod
    def of(cls, init: int) -> Shim | None:
        """The shim of the container with this first process; None if its parent is none."""
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
            pid = proc.stat(init).ppid
            known = sockets.table(pid)
            for file in proc.open_files(pid):
                each = known.get(file.inode) if file.link.startswith("socket:") else None
                if each is not None and each.state == "listen" and _SOCKET.fullmatch(each.local):
                    return cls(pid, f"/proc/{pid}/root{each.local}")
        return None

    def resume(
        self, container_id: str, deadline: clock.Deadline, just_before: Callable[[], None]
    ) -> bool | None:
        """Ask it to let the container go on. One that is still at a checkpoint answers when that
        has ended. Tell whether it did so; None if there was no answer. ``just_before`` is called
        when it can be asked, before it is.
        """
        found = None
        for service in _SERVICES:
            found = self._ask(service, container_id, deadline, just_before)
            if found or found is None:
                return found
        return found

    def _ask(
        self,
        service: str,
        container_id: str,
        deadline: clock.Deadline,
        just_before: Callable[[], None],
    ) -> bool | None:
        message = _text(1, service) + _text(2, "Resume") + _text(3, _text(1, container_id))
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.settimeout(max(_LEAST_S, deadline.remaining_s))
                self._connect(link)
                just_before()
                link.sendall(_HEAD.pack(len(message), 1, _REQUEST, 0) + message)
                answer = link.recv(_ANSWER_BYTES)
        except OSError as exc:
            log.warning(
                "a container's shim cannot be asked: %s", exc, extra={"facts": {"path": self._path}}
            )
            return None
        if len(answer) < _HEAD.size:
            return None
        status = answer[_HEAD.size : _HEAD.size + 2]
        return not (len(status) == 2 and status[0] == _STATUS and status[1] > 0)

    def _connect(self, link: socket.socket) -> None:
        # The name of a socket has at most 107 bytes; the one by a descriptor is short.
        folder = os.open(os.path.dirname(self._path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            link.connect(f"/proc/self/fd/{folder}/{os.path.basename(self._path)}")
        finally:
            os.close(folder)


def _text(number: int, value: str | bytes) -> bytes:
    """A field of a protobuf message: text, or a message."""
    raw = value.encode() if isinstance(value, str) else value
    length, size = len(raw), b""
    while length >= 0x80:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + raw
