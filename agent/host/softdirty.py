"""The soft-dirty bits: since when which pages of a process were written, by every kernel with
CONFIG_MEM_SOFT_DIRTY.

There is one bit a page and no step that reads and resets it at once; a reset is of all pages of a
process, and for everybody. So who follows a process holds a lock on it (``Claim``), and finds out
by a page that it marked itself (``mark``) whether somebody else has reset the bits.

Promises: whatever was written, in any way that goes through the page table, after ``reset`` has
returned is told by the bits until the next one; what was written before is there to be read then.
Does not: tell of pages that came from elsewhere with their bits (mremap of whole page tables), nor
of the huge zero page that is put where content was let go of: their frame is another one, which the
entries tell as well (of the huge zero page as long as there is a ``Claim``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import platform
import re
import threading
from collections.abc import Callable, Iterable, Iterator

from agent import errors
from agent.host import pageentries
from agent.host.descriptors import NR_KCMP

# Documentation/filesystems/proc.rst, clear_refs.
_RESET = b"4"
_SAFE_SINCE, _UNSAFE = (6, 1), (6, 4)
_HUGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14
_KCMP_VM = 1  # linux/kcmp.h

# Each of two would reset what the other one tries.
_one_at_a_time = threading.Lock()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_writev.restype = ctypes.c_ssize_t
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class Claim:
    """The one who may reset the bits of a process, among all agents whose first process has the
    same /proc: of a host, and of its containers that see all of its processes.

    Raises:
        errors.EnvironmentUnfit: another one follows it.
        errors.NotFound: it has ended.
    """

    def __init__(self, pid: int) -> None:
        _hold_huge_zero_page()
        with contextlib.ExitStack() as stack:
            try:
                self._fd = _opened(stack, f"/proc/{pid}/clear_refs")
            except OSError as exc:
                raise errors.EnvironmentUnfit(
                    f"the soft-dirty bits of process {pid} may not be reset: {exc}", pid=pid
                ) from exc
            try:
                # Who has a /proc of its own mounted locks another file by that.
                common = _opened(stack, f"/proc/1/root/proc/{pid}/clear_refs")
            except (OSError, errors.NotFound):
                common = self._fd
            try:
                fcntl.flock(common, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise errors.EnvironmentUnfit(
                    f"another capture follows what process {pid} writes", pid=pid
                ) from exc
            self._stack = stack.pop_all()

    def reset(self) -> None:
        """No page counts as written any more. Takes some milliseconds a GiB.

        Raises:
            errors.NotFound: the process has ended.
        """
        try:
            os.write(self._fd, _RESET)
        except ProcessLookupError as exc:
            raise errors.NotFound("the process has ended") from exc

    def close(self) -> None:
        """Let go of it; safe to repeat."""
        self._stack.close()


def _opened(stack: contextlib.ExitStack, path: str) -> int:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise errors.NotFound(f"there is no {path}") from exc
    stack.callback(os.close, descriptor)
    return descriptor


def _hold_huge_zero_page() -> None:
    """The kernel gives it back when nobody has it any more, and could then make it of the very page
    whose content a process has let go of. Who has read it once has it until it ends.
    """
    with _untouched() as start:
        ctypes.string_at(start, 1)


@contextlib.contextmanager
def _untouched() -> Iterator[int]:
    """Where memory of our own for one huge page begins, which nobody has touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, 2 * _HUGE_BYTES, flags=flags) as memory:
        handle = (ctypes.c_char * len(memory)).from_buffer(memory)
        start = -(-ctypes.addressof(handle) // _HUGE_BYTES) * _HUGE_BYTES
        try:
            _libc.madvise(start, _HUGE_BYTES, _MADV_HUGEPAGE)
            yield start
        finally:
            del handle


def mark(pid: int, address: int) -> bool:
    """Have one page count as written, and change nothing in it; False if that cannot be.

    The kernel prepares the page for a write (``process_vm_writev``), then finds nothing to write.
    """
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as page:
        handle = (ctypes.c_char * mmap.PAGESIZE).from_buffer(page)
        start = ctypes.addressof(handle)
        try:
            if _libc.mprotect(start, mmap.PAGESIZE, 0):
                return False
            local, remote = _Iovec(start, 1), _Iovec(address, 1)
            ctypes.set_errno(0)
            done = _libc.process_vm_writev(
                pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, ctypes.c_ulong(0)
            )
            return done < 0 and ctypes.get_errno() == errno.EFAULT
        finally:
            _libc.mprotect(start, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
            del handle


def merging() -> bool:
    """Whether the kernel puts one page in the place of several that are equal (KSM), and back,
    which sets no bit.
    """
    try:
        with open("/sys/kernel/mm/ksm/run", encoding="ascii") as file:
            return file.read().strip() == "1"
    except FileNotFoundError:
        return False


def same_memory(pid: int, others: Iterable[int]) -> bool:
    """Whether one of the others has the very address space of ``pid``; also where that cannot be
    known.
    """
    number = NR_KCMP.get(platform.machine())
    if number is None:
        return True
    for other in others:
        ctypes.set_errno(0)
        result: int = _libc.syscall(number, pid, other, _KCMP_VM, 0, 0)
        if result == 0 or (result < 0 and ctypes.get_errno() != errno.ESRCH):
            return True
    return False


def unusable() -> str:
    """Why the bits are of no use here, found out on our own memory; "" if they are.

    Kernels have lost bits of pages that were protected and unprotected (mm/mprotect: fix soft-dirty
    check in can_change_pte_writable), which is tried here. What only happens now and then is known
    by version: before Linux 5.11 a reset left writable entries in other processors' caches, met
    faults of other threads half-way and protected pages that devices wrote to (mm: proc: Invalidate
    TLB after clearing soft-dirty page state; mm: fix clear_refs_write locking; mm: don't play games
    with pinned pages in clear_page_refs); before 5.19 a reset of a huge page that a device or a
    direct read writes to had the process get another one at its next write; before 6.1 a page
    that was being migrated at a reset was writable and clean afterwards (mm: remember young/dirty
    bit for page migrations); and 6.4 met faults once more (mm: enable page walking API to lock
    vmas during the walk).
    """
    with _one_at_a_time:
        return _unusable()


@functools.cache
def _unusable() -> str:
    release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    if release < _SAFE_SINCE or release == _UNSAFE:
        return f"resetting soft-dirty bits is not safe on Linux {platform.release()}"
    with _untouched() as start:
        try:
            ctypes.memset(start, 1, _HUGE_BYTES)
            return _tried(start)
        except OSError as exc:
            return f"writes cannot be noted: {exc}"
        except (errors.EnvironmentUnfit, errors.NotFound) as exc:
            return exc.message


def _tried(start: int) -> str:
    pid = os.getpid()
    page = start + 3 * pageentries.PAGE_BYTES

    def protected_and_written() -> None:
        _libc.mprotect(start, _HUGE_BYTES, mmap.PROT_READ)
        _libc.mprotect(start, _HUGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE)
        ctypes.memset(page, 2, 1)

    def split_and_written() -> None:
        _libc.mprotect(page + pageentries.PAGE_BYTES, pageentries.PAGE_BYTES, mmap.PROT_READ)
        ctypes.memset(page, 3, 1)

    ways: tuple[tuple[str, Callable[[], object]], ...] = (
        ("writes", lambda: ctypes.memset(page, 4, 1)),
        ("a write after a change of protection", protected_and_written),
        ("a write to a part of a huge page", split_and_written),
        ("a write after a change of protection of small pages", protected_and_written),
        ("a write from outside", lambda: mark(pid, page)),
    )
    claim = Claim(pid)
    descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for what, write in ways:
            claim.reset()
            before = pageentries.read(descriptor, page, page + pageentries.PAGE_BYTES)[0]
            write()
            after = pageentries.read(descriptor, page, page + pageentries.PAGE_BYTES)[0]
            if not after & pageentries.FRAME:
                return "this agent may not know where pages are"
            if before & pageentries.SOFT_DIRTY:
                return "this kernel does not reset soft-dirty bits"
            if not after & pageentries.SOFT_DIRTY:
                return f"this kernel does not note {what} by soft-dirty bits"
    finally:
        os.close(descriptor)
        claim.close()
    return ""
