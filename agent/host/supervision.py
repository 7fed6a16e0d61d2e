"""Answering some of another program's system calls: seccomp user notification.

The program is started through ``filtered.py``, which installs the filter; each call that the filter
picks waits until it is answered here, or is told to go its ordinary way.

Promises: a call whose answer fails goes its ordinary way; when this ends, the calls that come after
fail with ENOSYS in the program, so that it cannot go on unsupervised. A descriptor that is given
away is closed here.
Does not: decide which calls, or what the answers are.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import logging
import mmap
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping

from agent import errors
from agent.host import filtered, threads

# linux/seccomp.h
_RECV, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
# Put a descriptor into the caller: with this very number; and let the call return it (Linux 5.14).
_ADDFD, _ADDFD_SETFD, _ADDFD_SEND = 0x40182103, 1, 2
# Whoever asks and whoever answers take turns.
_SET_FLAGS, _SYNC_WAKE_UP = 0x40082104, 1
_RET_ALLOW, _RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
# linux/bpf_common.h: load a word of struct seccomp_data, jump if equal, above or not below, return.
_LOAD, _IF_EQUAL, _IF_ABOVE, _IF_NOT_BELOW, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
IOCTL = {"x86_64": 16, "aarch64": 29}[os.uname().machine]
LSEEK = {"x86_64": 8, "aarch64": 62}[os.uname().machine]
OPENAT = {"x86_64": 257, "aarch64": 56}[os.uname().machine]
_AT_NR, _AT_ARGUMENTS, _WORD = 0, 16, 0xFFFFFFFF
_STARTED_S = 10.0
# linux/prctl.h: by how much the calling thread's waits may be late, in ns; 50 us by default, and so
# much longer it would wait for the interpreter's lock, several times for each answer.
_PR_SET_TIMERSLACK, _SLACK_NS = 29, 1

_libc = ctypes.CDLL(None)

log = logging.getLogger(__name__)


class _Memory:
    """Of the program that asks, which is one: its memory is opened once."""

    def __init__(self) -> None:
        self._pid = 0
        self._fd = -1

    def read(self, pid: int, address: int, size_bytes: int) -> bytes:
        data = os.pread(self._of(pid), size_bytes, address)
        if len(data) != size_bytes:
            # It has executed another program.
            self.close()
            data = os.pread(self._of(pid), size_bytes, address)
        return data

    def write(self, pid: int, address: int, data: bytes) -> None:
        os.pwrite(self._of(pid), data, address)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _of(self, pid: int) -> int:
        if self._fd < 0 or pid != self._pid:
            self.close()
            self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            self._pid = pid
        return self._fd


@dataclasses.dataclass(frozen=True)
class Call:
    """A system call that waits: whose, by its number on this host, which and its arguments."""

    pid: int
    call: int
    arguments: tuple[int, ...]
    memory: _Memory

    def read(self, address: int, size_bytes: int) -> bytes:
        """The caller's memory."""
        return self.memory.read(self.pid, address, size_bytes)

    def write(self, address: int, data: bytes) -> None:
        """Change the caller's memory."""
        self.memory.write(self.pid, address, data)

    def text(self, address: int, most_bytes: int) -> bytes:
        """A string of the caller's, up to its end."""
        # It may lie at the end of a mapping.
        page_left = mmap.PAGESIZE - address % mmap.PAGESIZE
        raw = self.read(address, min(most_bytes, page_left))
        if b"\0" not in raw and page_left < most_bytes:
            raw += self.read(address + page_left, most_bytes - page_left)
        return raw.partition(b"\0")[0]

    def path(self, number: int) -> str:
        """By which name here a descriptor of the caller can be used."""
        return f"/proc/{self.pid}/fd/{number}"

    def link(self, number: int) -> str:
        """What a descriptor of the caller is."""
        return os.readlink(self.path(number))


@dataclasses.dataclass(frozen=True)
class Given:
    """An open file for the caller, whose call returns it as its descriptor ``number`` (by default
    the lowest that is free). This program's descriptor is closed with the context.
    """

    descriptor: int
    number: int | None = None

    def __enter__(self) -> Given:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.descriptor)


# What the call returns (an error as its negative number), or None to let it go its way.
Answer = Callable[[Call], int | Given | None]


@dataclasses.dataclass(frozen=True)
class Pick:
    """Calls to be answered: of this number, the low halves of whose arguments have these values, or
    lie in these ranges.
    """

    call: int
    arguments: Mapping[int, int | range]


def picking(*picks: Pick) -> bytes:
    """A filter that picks these calls."""
    steps = []
    for pick in picks:
        tests = [(_LOAD, _AT_NR, 0), (_IF_EQUAL, pick.call, 1)]
        for at, wanted in pick.arguments.items():
            tests.append((_LOAD, _AT_ARGUMENTS + 8 * at, 0))
            if isinstance(wanted, range):
                tests.append((_IF_NOT_BELOW, wanted.start, 1))
                tests.append((_IF_ABOVE, wanted.stop - 1, -1))
            else:
                tests.append((_IF_EQUAL, wanted & _WORD, 1))
        for number, (code, value, goes_on_if) in enumerate(tests):
            # Past what is left of these, and the return.
            past = len(tests) - number
            steps.append((code, past * (goes_on_if < 0), past * (goes_on_if > 0), value))
        steps.append((_RETURN, 0, 0, _RET_USER_NOTIF))
    steps.append((_RETURN, 0, 0, _RET_ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


class Supervisor:
    """Supervises one program by ``picks``, a filter; ``answer`` is called in a thread."""

    def __init__(self, picks: bytes, answer: Answer) -> None:
        self._picks = picks
        self._answer = answer
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(_STARTED_S)
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="supervise", daemon=True)
        self.answered = 0
        self.passed = 0

    @property
    def descriptor(self) -> int:
        """What the program to be started must inherit."""
        return self._theirs.fileno()

    def under(self, machine_python: str = sys.executable) -> list[str]:
        """What to put before the program and its arguments; the program by its path."""
        return [machine_python, "-I", "-S", filtered.__file__, str(self.descriptor)]

    def start(self) -> None:
        """Be ready for the program; to be called before it is started."""
        self._ours.send(self._picks)
        threads.start(self._thread)

    def release(self) -> None:
        """The program is started: close this process's copy of its end."""
        self._theirs.close()

    def close(self) -> None:
        """End; safe to repeat."""
        self._theirs.close()
        if self._woken >= 0:
            os.close(self._woken)
            self._woken = -1
            if self._thread.is_alive():
                self._thread.join()
            os.close(self._wake)
        self._ours.close()

    def _serve(self) -> None:
        _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)
        try:
            _, descriptors, _, _ = socket.recv_fds(self._ours, 1, 1)
        except OSError:
            return  # it did not start: whoever talks to it notices
        for listener in descriptors:
            with contextlib.suppress(OSError):  # before Linux 6.6: it only is quicker
                fcntl.ioctl(listener, _SET_FLAGS, _SYNC_WAKE_UP)
            memory = _Memory()
            try:
                self._listen(listener, memory)
            finally:
                memory.close()
                os.close(listener)

    def _listen(self, listener: int, memory: _Memory) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(self._wake, 0)  # hang-up: close was called
        while True:
            ready = dict(poll.poll())
            if self._wake in ready or ready.get(listener, 0) & select.POLLHUP:
                return
            # struct seccomp_notif: id, pid, flags, and struct seccomp_data: nr, arch,
            # instruction_pointer, args[6].
            notification = bytearray(80)
            try:
                fcntl.ioctl(listener, _RECV, notification)
            except OSError:
                continue  # the caller was interrupted or has died
            number, pid, _, call, _, _, *arguments = struct.unpack("=QIIiIQ6Q", notification)
            self._reply(listener, number, self._decide(Call(pid, call, tuple(arguments), memory)))

    def _reply(self, listener: int, number: int, value: int | Given | None) -> None:
        if isinstance(value, Given):
            with value:
                if _given(listener, number, value):
                    return
            value = None
        flags = _CONTINUE if value is None else 0
        # struct seccomp_notif_resp: id, val, error, flags.
        with contextlib.suppress(OSError):
            fcntl.ioctl(
                listener, _SEND, bytearray(struct.pack("=QqiI", number, value or 0, 0, flags))
            )

    def _decide(self, call: Call) -> int | Given | None:
        value = None
        try:
            value = self._answer(call)
        except (OSError, errors.CkptError, struct.error) as exc:
            log.debug("a supervised call goes its ordinary way", extra={"reason": str(exc)})
        if value is None:
            self.passed += 1
        else:
            self.answered += 1
        return value


def _given(listener: int, number: int, file: Given) -> bool:
    """Let the call ``number`` return this file; False if that cannot be."""
    flags = _ADDFD_SEND | (0 if file.number is None else _ADDFD_SETFD)
    # struct seccomp_notif_addfd: id, flags, srcfd, newfd, newfd_flags.
    request = struct.pack("=QIIII", number, flags, file.descriptor, file.number or 0, os.O_CLOEXEC)
    try:
        fcntl.ioctl(listener, _ADDFD, request)
    except OSError as exc:
        log.debug("a descriptor cannot be given away", extra={"reason": str(exc)})
        return False
    return True
