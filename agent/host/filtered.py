"""Run as a program: ``filtered.py SOCKET PROGRAM [ARGUMENT...]``. Becomes PROGRAM, of which certain
system calls are put to whoever holds the other end of the socket (seccomp user notification).

Which ones, a BPF program says that comes over the socket first; the listener's descriptor goes
back. It stands alone, because it is started in other namespaces: standard library only.

Promises: PROGRAM gets neither of the two descriptors; it has the same pid as this.
Does not: answer; ``agent.host.supervision`` does.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import sys

_NR_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER = 1
# linux/seccomp.h: a supervised call that was received can only be interrupted by death.
_NEW_LISTENER, _WAIT_KILLABLE_RECV = 1 << 3, 1 << 5
_PROGRAM_BYTES = 1 << 12


def main(arguments: list[str]) -> None:
    """Install the filter and become the program; does not return."""
    with socket.socket(fileno=int(arguments[0])) as peer:
        raw = peer.recv(_PROGRAM_BYTES)
        kept = ctypes.create_string_buffer(raw, len(raw))
        # struct sock_fprog: number of instructions of 8 bytes, their address.
        program = struct.pack("=HxxxxxxQ", len(raw) // 8, ctypes.addressof(kept))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        listener = libc.syscall(
            _NR_SECCOMP[platform.machine()],
            _SET_MODE_FILTER,
            _NEW_LISTENER | _WAIT_KILLABLE_RECV,
            program,
        )
        if listener < 0:
            sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")
        socket.send_fds(peer, [b"x"], [listener])
    os.close(listener)
    os.execv(arguments[1], arguments[1:])  # noqa: S606 - the program was named by its path


if __name__ == "__main__":
    main(sys.argv[1:])
