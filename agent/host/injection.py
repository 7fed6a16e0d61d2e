"""Making a userfaultfd of another process: one system call is run inside it, by ptrace.

A userfaultfd belongs to the address space of whoever made it, so the target itself has to make it.
Its main thread is stopped, made to call ``userfaultfd(2)`` by an instruction of its own vDSO, the
descriptor is copied out, closed in there, and the thread goes on exactly where it was: registers
and signal mask are put back, and the kernel restarts an interrupted system call by itself. That
takes a quarter of a millisecond.

Promises: whatever goes wrong, the target runs on as before, and holds no descriptor of ours. Who
cannot be stopped safely is left alone: traced or stopped processes, 32-bit programs, a thread in a
restartable sequence, one that does not stop in time. A child that another thread forks meanwhile
has the descriptor as well: ``inherited`` finds it, ``take_back`` closes it there; until then the
descriptor outlives us.
Does not: work on other machines than x86-64. If this program is killed by SIGKILL between two steps
in that quarter of a millisecond, the target loses its registers: nothing can put them back then.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import signal
import struct
from collections.abc import Callable, Iterator

from agent import errors
from agent.host import clock, proc, ptrace

# asm/unistd_64.h
_NR_CLOSE, _NR_KCMP, _NR_USERFAULTFD, _NR_PIDFD_GETFD = 3, 312, 323, 438
_KCMP_FILE = 0  # linux/kcmp.h
# linux/userfaultfd.h: no privilege is needed for faults of user mode only, and write protection
# without anybody who is asked about faults (WP_ASYNC) covers the kernel's writes all the same.
_USER_MODE_ONLY = 1
_SYSCALL = b"\x0f\x05"
_USER_CS = 0x33  # asm/segment.h: 64-bit code
_NOT_INTERRUPTED = 2**64 - 1  # orig_rax: no system call is being interrupted

_STOP_S = 1.0
_POLL_S = 0.0002
# A step takes some microseconds, and whoever sleeps meanwhile is late for the next.
_SOON_S = 0.002
_TRIES = 5
# A step may be put off by the signals that nobody can block.
_STEPS = 5
# While all signals are blocked, only a step itself can bring these, and they are not the process's.
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Registers(ctypes.Structure):
    """``struct user_regs_struct`` of x86-64."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
            *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
            *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]


class _RseqConfiguration(ctypes.Structure):
    """``struct ptrace_rseq_configuration``."""

    _fields_ = [
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    ]


class InjectionRefused(errors.Refused):
    """The process cannot be made to run a system call of ours; it runs on."""

    code = "injection-refused"


@dataclasses.dataclass(frozen=True)
class Made:
    """A userfaultfd: our descriptor, and the number that it had in there for a moment."""

    descriptor: int
    number: int


def userfaultfd(who: proc.Identity) -> Made:
    """A userfaultfd of the address space of ``who``; the caller closes it.

    Raises:
        InjectionRefused: it cannot be had; the process is as before.
        errors.NotFound: the process has ended.
    """

    def make(thread: _Thread, instruction: int, pidfd: int) -> Made:
        return thread.userfaultfd(instruction, pidfd)

    return _injected(who, make)


def inherited(made: Made, pid: int) -> bool:
    """Whether this process, forked at the wrong moment, holds ``made`` by its number."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, errors.NotFound):
        if proc.descriptor_link(pid, made.number) == "anon_inode:[userfaultfd]":
            pair = (made.descriptor, made.number)
            order: int = _libc.syscall(_NR_KCMP, os.getpid(), pid, _KCMP_FILE, *pair)
            return order == 0
    return False


def take_back(who: proc.Identity, made: Made) -> None:
    """Close in ``who`` what it inherited.

    Raises: as ``userfaultfd``.
    """

    def close(thread: _Thread, instruction: int, pidfd: int) -> Made:
        del pidfd
        thread.close(instruction, made.number)
        return made

    _injected(who, close)


_Action = Callable[["_Thread", int, int], Made]


def _injected(who: proc.Identity, action: _Action) -> Made:
    if platform.machine() != "x86_64":
        raise InjectionRefused(f"not known how on {platform.machine()}")
    try:
        return ptrace.by_thread("inject", lambda: _with_stopped(who, action))
    except OSError as exc:
        raise InjectionRefused(f"process {who.pid}: {exc.strerror}", pid=who.pid) from exc
    except errors.EnvironmentUnfit as exc:  # it takes a thread
        raise InjectionRefused(f"process {who.pid}: {exc.message}", pid=who.pid) from exc


def _with_stopped(who: proc.Identity, action: _Action) -> Made:
    pidfd = os.pidfd_open(who.pid)
    try:
        if not proc.alive(who):
            raise errors.NotFound(f"there is no process {who.pid} any more", pid=who.pid)
        for _ in range(_TRIES):
            start, code = _vdso(who.pid)
            with _stopped(who.pid) as thread:
                # A sequence takes some nanoseconds: let it pass. And what was looked at before it
                # stood still may have executed another program since, and have its vDSO elsewhere:
                # at that address the call would end it.
                if thread.in_restartable_sequence() or _memory(who.pid, start, len(code)) != code:
                    continue
                return action(thread, start + code.index(_SYSCALL), pidfd)
        raise InjectionRefused(
            f"process {who.pid} is in restartable sequences, or executes programs", pid=who.pid
        )
    finally:
        os.close(pidfd)


def _vdso(pid: int) -> tuple[int, bytes]:
    """Where the vDSO is, and what it holds: a system call among other things."""
    for mapping in proc.maps(pid):
        if mapping.path == "[vdso]":
            code = _memory(pid, mapping.start, mapping.end - mapping.start)
            if _SYSCALL in code:
                return mapping.start, code
    raise InjectionRefused(f"process {pid} has no vDSO with a system call in it", pid=pid)


def _memory(pid: int, start: int, size: int) -> bytes:
    """What is there; nothing if it cannot be read."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), size, start)
    return b""


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[_Thread]:
    """Stop the main thread of ``pid``; it goes on when the context ends."""
    if proc.stat(pid).state in "TtZX":
        raise InjectionRefused(f"process {pid} does not run", pid=pid)
    # Without its filter, which might kill it for a system call that it does not expect. Not allowed
    # to a program that is filtered itself: then only who has no filter can be helped.
    try:
        ptrace.call(ptrace.SEIZE, pid, 0, ptrace.O_SUSPEND_SECCOMP)
    except OSError:
        if proc.status(pid).seccomp:
            raise
        ptrace.call(ptrace.SEIZE, pid)
    ptrace.call(ptrace.INTERRUPT, pid)
    deadline = clock.Deadline.after(_STOP_S)
    while not _stands(pid, deadline):
        pass
    thread = _Thread(pid)
    try:
        yield thread
    finally:
        ptrace.call(ptrace.DETACH, pid, 0, thread.owed)


def _stands(pid: int, deadline: clock.Deadline) -> bool:
    """Wait for the next stop; whether it is the one that was asked for."""
    seen: list[int] = []

    def waited() -> bool:
        found, status = os.waitpid(pid, ptrace.WALL | os.WNOHANG)
        seen[:] = [status]
        return bool(found)

    if not clock.wait_until(waited, deadline, every_s=_POLL_S):
        raise InjectionRefused(f"process {pid} did not stop in time", pid=pid)
    (status,) = seen
    if not os.WIFSTOPPED(status):
        raise errors.NotFound(f"process {pid} has ended", pid=pid)
    number = os.WSTOPSIG(status)
    if status >> 16 != ptrace.EVENT_STOP:
        # A signal is about to be delivered: it is, and our stop comes after it.
        ptrace.call(ptrace.CONT, pid, 0, number)
        return False
    if number != signal.SIGTRAP:
        # A stop by job control began meanwhile; it stays stopped when we have let go.
        ptrace.call(ptrace.DETACH, pid)
        raise InjectionRefused(f"process {pid} was stopped", pid=pid)
    return True


class _Thread:
    """A stopped thread. ``owed`` is a signal that came meanwhile, 0 if none did."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.owed = 0
        self._saved = _Registers()
        ptrace.call(ptrace.GETREGS, pid, 0, ctypes.addressof(self._saved))
        if self._saved.cs != _USER_CS:
            raise InjectionRefused(f"process {pid} runs 32-bit code", pid=pid)

    def in_restartable_sequence(self) -> bool:
        """Whether it stands inside an rseq critical section: it would not notice that it was
        interrupted if it ran other code first.
        """
        found = _RseqConfiguration()
        try:
            ptrace.call(ptrace.RSEQ, self._pid, ctypes.sizeof(found), ctypes.addressof(found))
        except OSError:
            return True
        if not found.pointer:
            return False
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            # linux/rseq.h: struct rseq has rseq_cs at 8; struct rseq_cs is version, flags,
            # start_ip, post_commit_offset, abort_ip.
            (section,) = struct.unpack("=Q", os.pread(memory.fileno(), 8, found.pointer + 8))
            if not section:
                return False
            start, length = struct.unpack("=8xQQ", os.pread(memory.fileno(), 24, section))
        return bool(0 <= self._saved.rip - start < length)

    def userfaultfd(self, instruction: int, pidfd: int) -> Made:
        """Let it make one; our copy of it."""
        with self._undisturbed():
            flags = os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY
            number = self._call(instruction, _NR_USERFAULTFD, flags)
            ours = -1
            try:
                try:
                    ours = _checked(_libc.syscall(_NR_PIDFD_GETFD, pidfd, number, 0))
                finally:
                    self._call(instruction, _NR_CLOSE, number)
            except BaseException:
                if ours >= 0:
                    os.close(ours)
                raise
        return Made(ours, number)

    def close(self, instruction: int, number: int) -> None:
        """Let it close a descriptor."""
        with self._undisturbed():
            self._call(instruction, _NR_CLOSE, number)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No handler of a signal runs between our steps; then everything is as before."""
        mask = ctypes.c_uint64()
        ptrace.call(ptrace.GETSIGMASK, self._pid, 8, ctypes.addressof(mask))
        blocked = ctypes.c_uint64(2**64 - 1)
        ptrace.call(ptrace.SETSIGMASK, self._pid, 8, ctypes.addressof(blocked))
        try:
            yield
        finally:
            # rax and orig_rax say that a call was interrupted: the kernel restarts it.
            ptrace.call(ptrace.SETREGS, self._pid, 0, ctypes.addressof(self._saved))
            ptrace.call(ptrace.SETSIGMASK, self._pid, 8, ctypes.addressof(mask))

    def _call(self, instruction: int, number: int, argument: int) -> int:
        registers = _Registers.from_buffer_copy(self._saved)
        registers.rip, registers.rax, registers.rdi = instruction, number, argument
        registers.orig_rax = _NOT_INTERRUPTED
        ptrace.call(ptrace.SETREGS, self._pid, 0, ctypes.addressof(registers))
        for _ in range(_STEPS):
            ptrace.call(ptrace.SINGLESTEP, self._pid)
            status, in_time = self._stopped_again()
            if not os.WIFSTOPPED(status):
                raise errors.NotFound(f"process {self._pid} has ended", pid=self._pid)
            if status >> 16 == 0 and os.WSTOPSIG(status) in _FAULTS:
                raise InjectionRefused(f"process {self._pid} cannot make a call", pid=self._pid)
            if status >> 16 == 0 and os.WSTOPSIG(status) != signal.SIGTRAP:
                self.owed = os.WSTOPSIG(status)
            ptrace.call(ptrace.GETREGS, self._pid, 0, ctypes.addressof(registers))
            if registers.rip == instruction + len(_SYSCALL):
                break
            if not in_time:
                raise InjectionRefused(f"process {self._pid} does not run", pid=self._pid)
        else:
            raise InjectionRefused(
                f"process {self._pid} was kept from a system call", pid=self._pid
            )
        result: int = ctypes.c_int64(registers.rax).value
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def _stopped_again(self) -> tuple[int, bool]:
        """How it stopped after a step, and whether by itself: who is kept from it (by a control
        group that was frozen just now) is stopped where it is, to be put back as it was.
        """
        soon = clock.Deadline.after(_SOON_S)
        while not soon.expired:
            found, status = os.waitpid(self._pid, ptrace.WALL | os.WNOHANG)
            if found:
                return status, True
            os.sched_yield()
        seen: list[int] = []

        def stopped() -> bool:
            found, status = os.waitpid(self._pid, ptrace.WALL | os.WNOHANG)
            seen[:] = [status]
            return bool(found)

        in_time = clock.wait_until(stopped, clock.Deadline.after(_STOP_S), every_s=_POLL_S)
        if not in_time:
            ptrace.call(ptrace.INTERRUPT, self._pid)
            # No deadline: who lets go of it with our registers in it loses it.
            seen[:] = [os.waitpid(self._pid, ptrace.WALL)[1]]
        return seen[0], in_time


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
