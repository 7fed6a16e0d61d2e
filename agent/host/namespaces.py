"""Entering another process's namespaces: one function call in a thread that goes there.

Only the thread changes its namespaces, and it ends with the call: what the function opens (a
netlink socket) or starts (a program) stays where it was made.

Promises: the rest of this program stays where it is; what the function raises is raised.
Does not: enter mount namespaces, where this program's own files would be others.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from agent import errors
from agent.host import proc

_T = TypeVar("_T")

_libc = ctypes.CDLL(None, use_errno=True)


def inside(who: proc.Identity, kinds: Iterable[str], function: Callable[[], _T]) -> _T:
    """Call ``function`` in the namespaces ``kinds`` (all but mnt, user, time) of a process.

    With ``pid``, it is the programs that ``function`` starts that are in there; they are this
    program's children all the same.

    Raises:
        errors.NotFound: there is no such process any more.
        errors.PrivilegeMissing: not allowed.
    """
    with contextlib.ExitStack() as stack:
        return within([stack.enter_context(opened(who, kind)) for kind in kinds], function)


def within(descriptors: Iterable[int], function: Callable[[], _T]) -> _T:
    """Call ``function`` in the namespaces that these descriptors are of.

    Raises:
        errors.PrivilegeMissing: not allowed.
    """
    outcome = _Outcome(function)
    thread = threading.Thread(target=outcome.run, args=(list(descriptors),), name="inside")
    thread.start()
    thread.join()
    return outcome.get()


@contextlib.contextmanager
def opened(who: proc.Identity, kind: str) -> Iterator[int]:
    """A descriptor of a process's namespace, which lives on with it whoever ends.

    Raises:
        errors.NotFound: there is no such process any more.
        errors.PrivilegeMissing: not allowed.
    """
    fd = _open(who.pid, kind)
    try:
        if not proc.alive(who):
            # The number may have been given to another while its file was opened.
            raise errors.NotFound(f"there is no process {who.pid} any more", pid=who.pid)
        yield fd
    finally:
        os.close(fd)


def user_of(kind: str, inode: int) -> proc.Identity | None:
    """Some process in the namespace with this inode number; None if there is none to be seen."""
    for pid in proc.pids():
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
            who = proc.identity(pid)
            if proc.namespaces(pid)[kind] == inode and proc.alive(who):
                return who
    return None


class _Outcome(Generic[_T]):
    """What a call in another thread came to."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._value: list[_T] = []
        self._raised: BaseException | None = None

    def run(self, descriptors: list[int]) -> None:
        try:
            for descriptor in descriptors:
                if _libc.setns(descriptor, 0) != 0:
                    code = ctypes.get_errno()
                    raise errors.PrivilegeMissing(  # noqa: TRY301 - all of it is for the caller
                        f"cannot enter a namespace: {os.strerror(code)}",
                        hint="run as root with CAP_SYS_ADMIN",
                    )
            self._value.append(self._function())
        except BaseException as exc:  # noqa: BLE001 - carried to the thread that asked, by get
            self._raised = exc

    def get(self) -> _T:
        if self._raised is not None:
            raise self._raised
        return self._value[0]


def _open(pid: int, kind: str) -> int:
    try:
        return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise errors.NotFound(f"there is no process {pid}", pid=pid) from exc
    except PermissionError as exc:
        raise errors.PrivilegeMissing(
            f"not allowed to enter the namespaces of process {pid}",
            hint="run as root with CAP_SYS_PTRACE",
            pid=pid,
        ) from exc
