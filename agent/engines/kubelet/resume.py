"""A container that its runtime stopped for a checkpoint and never let go on.

containerd pauses a container while it writes and packs the checkpoint, and only that containerd
knows. If it ends meanwhile, by a crash or an ordinary restart, the container stays paused, its
successor cannot make sense of that, and the kubelet then kills the container and starts it from the
beginning. So when a call has failed, the container is looked at, and if it stands still, its shim
is asked to let it go on: before the successor looks, which takes it some tenths of a second. That
succeeds once CRIU is done and the runtime only packs, which is most of the time; a container whose
runtime is ended while CRIU works and is back before it is done cannot be saved from here.

The shim (one a pod, the parent of its containers' first processes) speaks ttrpc on a socket of its
own. What must be said is one message: ``Resume`` with the container's name. Its answer does not
matter, the freezer shows what came of it. Without a shim (CRI-O), the freezer is the whole state.

Sources: github.com/containerd/ttrpc (PROTOCOL.md), containerd's api/runtime/task/v3/shim.proto.

Promises: a container that ran before the call does not stand still after one that failed, or that
is logged; one that stood still stays so.
Does not: raise; the call's own error is what is to be told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator

from agent import errors
from agent.engines.kubelet import pause
from agent.host import clock, proc, sockets
from agent.model.container import Container

log = logging.getLogger(__name__)

# A pause that was on its way when the runtime ended comes within this time.
_QUIET_S = 0.5
# A checkpoint that nobody waits for any more is still written to its end.
_GIVE_UP_S = 60.0
_LOOK_S = 0.02
_SHIM_SOCKET = re.compile(r"/\S*/containerd/s/[0-9a-f]{64}")
# containerd 2 and 1.
_SERVICES = ("containerd.task.v3.Task", "containerd.task.v2.Task")
# ttrpc: length of what follows, stream (odd for clients), type 1 for a request, no flags.
_HEAD = struct.Struct(">IIBB")
_REQUEST = 1
_ANSWER_BYTES = 4096


@contextlib.contextmanager
def guarded(container: Container) -> Iterator[None]:
    """Around a call that has the runtime checkpoint ``container``: if it fails, the container
    runs.
    """
    freezer = pause.Freezer(container.pid)
    before = freezer.frozen()
    try:
        yield
    except BaseException:
        if not before:
            _let_go_on(container, freezer)
        raise


def _let_go_on(container: Container, freezer: pause.Freezer) -> None:
    """Return when the container has run for ``_QUIET_S``."""
    facts = {"container": container.id, "pid": container.pid}
    shim = _shim_socket(container.pid)
    deadline = clock.Deadline.after(_GIVE_UP_S)
    while True:
        paused = freezer.frozen()
        for service in _SERVICES if shim else ():
            # One that is still at the checkpoint answers when that has ended: until then its
            # processes may run, and be stopped again at the end.
            _ask(shim, service, container.id, deadline)
        if not shim and paused:
            freezer.thaw()
        if _stays(freezer):
            if paused:
                log.warning("the runtime had left a container paused; it goes on", extra=facts)
            return
        if deadline.expired:
            log.error("a container stays paused after a checkpoint that failed", extra=facts)
            return


def _stays(freezer: pause.Freezer) -> bool:
    """Whether it runs for a while from now."""
    return not clock.wait_until(freezer.frozen, clock.Deadline.after(_QUIET_S), every_s=_LOOK_S)


def _shim_socket(init: int) -> str:
    """Where the shim of the container with this first process listens, as this program sees it;
    "" if its parent is no shim.
    """
    with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
        shim = proc.stat(init).ppid
        known = sockets.table(shim)
        for file in proc.open_files(shim):
            each = known.get(file.inode) if file.link.startswith("socket:") else None
            if each is not None and each.state == "listen" and _SHIM_SOCKET.fullmatch(each.local):
                return f"/proc/{shim}/root{each.local}"
    return ""


def _ask(path: str, service: str, container_id: str, deadline: clock.Deadline) -> None:
    """Say ``Resume``; wait for the answer, whatever it is. To one that runs it is an error of no
    consequence.
    """
    message = _text(1, service) + _text(2, "Resume") + _text(3, _text(1, container_id))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as shim:
            shim.settimeout(max(_LOOK_S, deadline.remaining_s))
            # The name of a socket has at most 107 bytes; the one by a descriptor is short.
            folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                shim.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
            finally:
                os.close(folder)
            shim.sendall(_HEAD.pack(len(message), 1, _REQUEST, 0) + message)
            shim.recv(_ANSWER_BYTES)
    except OSError as exc:
        log.warning("a container's shim cannot be asked: %s", exc, extra={"path": path})


def _text(number: int, value: str | bytes) -> bytes:
    """A field of a protobuf message: text, or a message."""
    raw = value.encode() if isinstance(value, str) else value
    length, size = len(raw), b""
    while length >= 0x80:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + raw
