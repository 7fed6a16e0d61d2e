"""Talking to ``hold``, the first process of an opted-in container (hold/hold.c).

It says what it does by the arguments that /proc shows: ``hold: waiting`` for a restore,
``hold: following N``, N being the number inside of the process whose end is the container's, or
``hold: stopping N`` if it is going to wait when that process is killed. It is told of a restored
tree by SIGUSR2 with that number as value, sent from outside of its pid namespace; it then also
writes the stamp by which a restart of the container is an ordinary start. The negative of the
number lets it stop; the number again takes that back.

Promises: ``adopt`` returns when hold follows the tree, or is an error.
Does not: start or end hold.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import struct

from agent import errors
from agent.host import clock, proc
from agent.model.container import HOLD, HOLD_FOLLOWS

_WAITING = b"hold: waiting"
_FOLLOWING = re.compile(rb"hold: (?:following|stopping) (\d+)")
_STOPPING = b"hold: stopping %d"
# One from before it could be told does not answer; it will end with its child instead.
_STOPS_S = 1.0
# rt_sigqueueinfo has one number per architecture.
_SIGQUEUEINFO = {"x86_64": 129, "aarch64": 138}
# struct siginfo: signo, errno, code, padding, then pid, uid and the value; 128 bytes in all.
_SIGINFO = struct.Struct("=iiixxxxiii")
_SIGINFO_BYTES = 128
_SI_QUEUE = -1
# hold looks again every 20 ms, and a name that comes while another is pending is lost.
_ADOPTED_S = 10.0
_AGAIN_S = 0.2

_libc = ctypes.CDLL(None, use_errno=True)


def is_hold(init: int) -> bool:
    """Whether this pid 1 of a container is hold (an older one may have lost its name since)."""
    return proc.exe(init).removesuffix(" (deleted)") == HOLD


def waits(init: int) -> bool:
    """Whether it waits for a restore."""
    return is_hold(init) and _says(init) == _WAITING


def follows(init: int) -> int:
    """The number inside of the process that it follows; 0 if none."""
    match = _FOLLOWING.fullmatch(_says(init)) if is_hold(init) else None
    return int(match[1]) if match else 0


def adopt(init: proc.Identity, number: int) -> None:
    """Make hold follow the process with this number inside.

    Raises:
        errors.RestoreFailed: it does not; it may have ended.
    """
    deadline = clock.Deadline.after(_ADOPTED_S)
    while True:
        _tell(init, number)
        if clock.wait_until(lambda: _settled(init, number), deadline.sooner(_AGAIN_S)):
            return
        if deadline.expired:
            raise errors.RestoreFailed(
                "the placeholder does not follow the restored process",
                hint="restore into another placeholder",
                pid=init.pid,
            )


def stop(init: proc.Identity, number: int) -> bool:
    """Let hold wait when the process with this number inside, which it follows, is killed; False
    if it does not say that it will.
    """
    _tell(init, -number)
    return clock.wait_until(
        lambda: _says(init.pid) == _STOPPING % number, clock.Deadline.after(_STOPS_S)
    )


def _settled(init: proc.Identity, number: int) -> bool:
    # With the tree's end hold ends as well: then there is nothing more to tell.
    return not proc.alive(init) or _says(init.pid) == b"%s%d" % (HOLD_FOLLOWS, number)


def _says(init: int) -> bytes:
    try:
        with open(f"/proc/{init}/cmdline", "rb") as file:
            return file.read().rstrip(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _tell(init: proc.Identity, number: int) -> None:
    if not proc.alive(init):
        return
    raw = _SIGINFO.pack(signal.SIGUSR2, 0, _SI_QUEUE, 0, 0, number)
    info = ctypes.create_string_buffer(raw, _SIGINFO_BYTES)
    call = _SIGQUEUEINFO.get(os.uname().machine)
    if call is None:
        raise errors.EnvironmentUnfit(f"not known on {os.uname().machine}: rt_sigqueueinfo")
    if _libc.syscall(call, init.pid, int(signal.SIGUSR2), info) != 0:
        code = ctypes.get_errno()
        raise errors.RestoreFailed(
            f"cannot tell the placeholder of the restored process: {os.strerror(code)}",
            hint="the container may have ended; start it anew",
            pid=init.pid,
        )
