"""Doing something with the rights of another process: one function call in a thread that has them.

Promises: what the function does is allowed or refused as it would be to that process: by its user,
groups and capabilities, also by who asks a socket's other end (SO_PEERCRED); the rest of this
program keeps its own. The thread never gets a right that this program does not have.
Does not: enter namespaces, or take on seccomp filters and security labels, so that the function
must not be the other process's own code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from agent import errors
from agent.host import proc

_T = TypeVar("_T")

# The library's functions change all threads of a program, the calls themselves only one.
_NUMBERS = {
    # setgroups, setresgid, setresuid, capset
    "x86_64": (116, 119, 117, 126),
    "aarch64": (159, 149, 147, 91),
}
# include/uapi/linux/capability.h: version 3 has two words of each set.
_CAPABILITIES_3 = 0x20080522
_HEADER = struct.Struct("=Ii")
_SETS = struct.Struct("=6I")
# include/uapi/linux/prctl.h
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4

_libc = ctypes.CDLL(None, use_errno=True)


class _Dumpable:
    """Whether this program may be traced and dumped, which the kernel takes from all of it as soon
    as one thread changes its user. It stays so while any thread has another's rights, since
    who has those could trace that thread; what was before the first comes back after the last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._acting = 0
        self._before = 0

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        with self._lock:
            if self._acting == 0:
                self._before = _libc.prctl(_GET_DUMPABLE, 0, 0, 0, 0)
            self._acting += 1
        try:
            yield
        finally:
            with self._lock:
                self._acting -= 1
                if self._acting == 0:
                    _libc.prctl(_SET_DUMPABLE, self._before, 0, 0, 0)


_dumpable = _Dumpable()


def acting_as(pid: int, function: Callable[[], _T]) -> _T:
    """Call ``function`` with the rights that process ``pid`` has now; what it raises is raised.

    Raises:
        errors.NotFound: there is no such process.
        errors.PrivilegeMissing: not allowed to take on its rights.
        errors.EnvironmentUnfit: not known how to on this machine.
    """
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise errors.EnvironmentUnfit(
            f"it is not known how one thread changes its user on {platform.machine()}",
            hint="use another kind of hook",
        )
    call = _Call(proc.rights(pid), numbers, function)
    with _dumpable.put_back():
        thread = threading.Thread(target=call.run, name="acting", daemon=True)
        thread.start()
        thread.join()
    return call.outcome()


class _Call(Generic[_T]):
    def __init__(
        self, wanted: proc.Rights, numbers: Sequence[int], function: Callable[[], _T]
    ) -> None:
        self._wanted = wanted
        self._numbers = numbers
        self._function = function
        self._value: list[_T] = []
        self._raised: BaseException | None = None

    def run(self) -> None:
        try:
            self._become()
            self._value.append(self._function())
        except BaseException as exc:  # noqa: BLE001 - carried to the thread that asked, by outcome
            self._raised = exc

    def outcome(self) -> _T:
        if self._raised is not None:
            raise self._raised
        return self._value[0]

    def _become(self) -> None:
        wanted = self._wanted
        own = proc.rights(threading.get_native_id()).capabilities
        setgroups, setresgid, setresuid, capset = self._numbers
        groups = (ctypes.c_uint32 * len(wanted.groups))(*wanted.groups)
        _checked(_libc.syscall(setgroups, len(wanted.groups), groups))
        _checked(_libc.syscall(setresgid, *[ctypes.c_uint32(wanted.gid)] * 3))
        # Any user but root has no capabilities from here on.
        _checked(_libc.syscall(setresuid, *[ctypes.c_uint32(wanted.uid)] * 3))
        kept = wanted.capabilities & own if wanted.uid == 0 else 0
        low, high = kept & 0xFFFFFFFF, kept >> 32
        header = ctypes.create_string_buffer(_HEADER.pack(_CAPABILITIES_3, 0), _HEADER.size)
        sets = ctypes.create_string_buffer(_SETS.pack(low, low, 0, high, high, 0), _SETS.size)
        _checked(_libc.syscall(capset, header, sets))


def _checked(status: int) -> None:
    if status != 0:
        raise errors.PrivilegeMissing(
            f"cannot take on another process's rights: {os.strerror(ctypes.get_errno())}",
            hint="run as root with CAP_SETUID, CAP_SETGID and CAP_SETPCAP",
        )
