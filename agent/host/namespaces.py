"""Entering another process's namespaces: one function call in a thread that goes there.

Only the thread changes its namespaces, and it ends with the call: what the function opens (a
netlink socket) or starts (a program) stays where it was made.

Promises: the rest of this program stays where it is; what the function raises is raised.
Does not: call a function in another mount namespace, where this program's own files would be
others.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from agent import errors
from agent.host import proc

_T = TypeVar("_T")

# include/uapi/linux/sched.h, mount.h, nsfs.h
_CLONE_FS = 0x00000200
_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_NS_GET_PARENT = 0xB702

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


@contextlib.contextmanager
def copied_mounts(who: proc.Identity) -> Iterator[int]:
    """A descriptor of a new mount namespace, a copy of a process's: what is mounted in that one
    later arrives in the copy where it would in another container, and never the other way round.

    Raises:
        errors.NotFound: there is no such process any more.
        errors.PrivilegeMissing: not allowed.
    """
    with opened(who, "mnt") as original:
        copy = _Copy(original)
        copy.start()
        try:
            fd = copy.descriptor()
        finally:
            copy.end()
    try:
        yield fd
    finally:
        os.close(fd)


class _Copy(threading.Thread):
    """A thread that goes into a copy of a mount namespace and stays until it is told to end. It
    opens and imports nothing there.
    """

    def __init__(self, original: int) -> None:
        super().__init__(name="mounts")
        self._original = original
        self._there = threading.Event()
        self._seen = threading.Event()
        self._code = 0

    def run(self) -> None:
        moved = (
            _libc.unshare(_CLONE_FS) == 0
            and _libc.setns(self._original, _CLONE_NEWNS) == 0
            and _libc.unshare(_CLONE_NEWNS) == 0
            and _libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None) == 0
        )
        if not moved:
            self._code = ctypes.get_errno()
        self._there.set()
        self._seen.wait()

    def descriptor(self) -> int:
        """The namespace that it is in."""
        self._there.wait()
        if self._code:
            raise errors.PrivilegeMissing(
                f"cannot copy a mount namespace: {os.strerror(self._code)}",
                hint="run as root with CAP_SYS_ADMIN and CAP_SYS_CHROOT",
            )
        return os.open(f"/proc/self/task/{self.native_id}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def end(self) -> None:
        """Let it end."""
        self._seen.set()
        self.join()


def firsts_below(who: proc.Identity) -> list[int]:
    """The first processes of the pid namespaces that were made in the one of a process.

    Raises:
        errors.NotFound: there is no such process any more.
    """
    own = proc.namespaces(who.pid)["pid"]
    depth = len(proc.status(who.pid).ns_pids)
    found = []
    for pid in proc.pids():
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
            numbers = proc.status(pid).ns_pids
            if len(numbers) == depth + 1 and numbers[-1] == 1 and _parent(pid) == own:
                found.append(pid)
    return found


def _parent(pid: int) -> int:
    """The inode number of the pid namespace in which that of a process was made; 0 if it is none
    that can be seen.
    """
    fd = _open(pid, "pid")
    try:
        above = fcntl.ioctl(fd, _NS_GET_PARENT)
    except PermissionError:
        return 0  # this program's own is not below it
    finally:
        os.close(fd)
    try:
        return os.fstat(above).st_ino
    finally:
        os.close(above)


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
