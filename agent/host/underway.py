"""Whether the system calls that were under way in a process have ended.

A read past the page cache (O_DIRECT) writes into pages that it got hold of when it began, until it
returns, and no page table tells when. Once every thread has been seen outside such a call, none
that had begun before goes on.

A thread that sleeps says in which call. One that computes, or waits for a disk, is interrupted by
ptrace: it stands only when it is out of the kernel, and runs on within a fraction of a millisecond.
Nobody who is seen to sleep interruptibly is interrupted: some calls then fail with EINTR. That can
still happen to who falls asleep just then, as it does when CRIU stops a tree.

The same is asked of process_vm_writev(2), by which one process writes to another's memory likewise.

Promises: "over" is proven; what is not known is not. All threads run on, whatever happens.
Does not: know of calls that go on after they returned (asynchronous I/O), nor of other processes
that share the memory, but for a child in vfork(2); nor whether a process that may not be looked at
writes to another's what a userfaultfd is to bring. Only for x86-64.
"""

from __future__ import annotations

import contextlib
import enum
import os

from agent import errors
from agent.host import clock, proc, ptrace

# include/linux/sched.h, the 9th field of /proc/PID/stat: a thread of the kernel's that does what a
# process asked for by io_uring. It never leaves the kernel.
_PF_IO_WORKER = 0x10
# asm/unistd_64.h: who sleeps in one of these has no hold of pages to write to them: write, poll,
# pwrite64, writev, select, pause, nanosleep, connect, accept, wait4, fsync, fdatasync,
# rt_sigtimedwait, rt_sigsuspend, futex, semtimedop, restart_syscall, clock_nanosleep, epoll_wait,
# waitid, pselect6, ppoll, epoll_pwait, accept4, pwritev, pwritev2, epoll_pwait2, futex_waitv.
_HARMLESS = frozenset(
    (
        *(1, 7, 18, 20, 23, 34, 35, 42, 43, 61, 74, 75, 128, 130, 202, 219, 220, 230, 232, 247),
        *(270, 271, 281, 288, 296, 328, 441, 449),
    )
)
# read, pread64, readv, recvfrom, recvmsg, recvmmsg, preadv, preadv2: only of files are they not.
_READS = frozenset((0, 17, 19, 45, 47, 295, 299, 327))
# process_vm_writev of x86-64, of i386 and of x32.
_WRITES_TO_OTHERS = frozenset((311, 348, 0x40000000 | 540))
# Who is seen running so often in a row probably computes.
_LOOKS = 4
# More hardly ever run, or wait for a disk, at once, and each is asked about again and again.
_AT_ONCE = 128
_LOOK_S = 0.001
_POLL_S = 0.0002


class Calls(enum.Enum):
    """Which calls are asked about: those that may write to the caller's own memory behind its page
    table, or those that write to another's.
    """

    OWN = enum.auto()
    TO_OTHERS = enum.auto()


class _Seen(enum.Enum):
    """What a look at a thread told."""

    OVER = enum.auto()
    BUSY = enum.auto()
    ASLEEP = enum.auto()


def over(
    pid: int, deadline: clock.Deadline, calls: Calls = Calls.OWN, *, interrupt: bool = True
) -> bool:
    """Wait until every one of these calls that a thread of ``pid`` is in now has returned; whether
    that could be seen in time. Without ``interrupt`` it cannot of a thread that computes on.

    Raises:
        errors.NotFound: the process has ended.
    """
    if not interrupt:
        return _over(pid, deadline, calls, interrupt=False)
    try:
        return ptrace.by_thread("underway", lambda: _over(pid, deadline, calls, interrupt=True))
    except errors.EnvironmentUnfit:  # no thread is to be had: not known
        return False


def _over(pid: int, deadline: clock.Deadline, calls: Calls, *, interrupt: bool) -> bool:
    known: set[int] = set()
    while not (_are_all(pid, known)):
        threads = set(proc.threads(pid))
        new = threads - known
        if deadline.expired or not _all_over(pid, new, deadline, calls, interrupt=interrupt):
            return False
        known |= threads
    return True


def _are_all(pid: int, known: set[int]) -> bool:
    """Whether there is no other thread. A list can lack some, if one ends while it is made; but
    not if who is in it was there before and after as many were counted.
    """
    before = set(proc.threads(pid))
    count = proc.stat(pid).threads
    return before <= known and len(before) == count and set(proc.threads(pid)) == before


def _all_over(
    pid: int, tids: set[int], deadline: clock.Deadline, calls: Calls, *, interrupt: bool
) -> bool:
    left, asked, looks = set(tids), set[int](), 0
    most = _AT_ONCE if interrupt else 0
    while True:
        for tid in sorted(left - asked):
            if deadline.expired:
                return False
            seen = _look(pid, tid, calls)
            if seen is _Seen.OVER:
                left.discard(tid)
            elif seen is _Seen.BUSY and looks >= _LOOKS and len(asked) < most and _ask(tid):
                asked.add(tid)
            # Who stands is let go before the next one is looked at.
            left -= _stood_of(asked)
        left -= _stood_of(asked)
        if not left:
            return True
        if deadline.expired:
            return False
        looks += 1
        pause_s = _POLL_S if asked else _LOOK_S
        clock.wait_until(lambda: False, deadline.sooner(pause_s), every_s=pause_s)


def _stood_of(asked: set[int]) -> set[int]:
    """Those who have stopped or ended since they were asked to: they are not any more."""
    stood = {tid for tid in asked if _stood(tid)}
    asked -= stood
    return stood


def _look(pid: int, tid: int, calls: Calls) -> _Seen:
    try:
        thread = proc.thread_stat(pid, tid)
        if thread.state in "TtZX":
            return _Seen.OVER
        if thread.flags & _PF_IO_WORKER:
            return _Seen.ASLEEP
        with open(f"/proc/{pid}/task/{tid}/syscall", encoding="ascii") as file:
            told = file.read().split()
    except (errors.NotFound, FileNotFoundError, ProcessLookupError):
        return _Seen.OVER  # it has ended
    except PermissionError:
        # It has more rights than we. Who sleeps interruptibly does not wait for a file.
        through = calls is Calls.TO_OTHERS and thread.state == "S"
        return _Seen.OVER if through else _Seen.ASLEEP
    if told[0] == "running":
        return _Seen.BUSY
    number = int(told[0])
    if calls is Calls.TO_OTHERS:
        return _Seen.ASLEEP if number in _WRITES_TO_OTHERS else _Seen.OVER
    return _look_at_own(tid, thread.state, number, told)


def _look_at_own(tid: int, state: str, number: int, told: list[str]) -> _Seen:
    # -1: in none, but a fault.
    if number == -1 or number in _HARMLESS:
        return _Seen.OVER
    if state == "D":
        return _Seen.BUSY
    if number in _READS:
        with contextlib.suppress(OSError):
            if not proc.descriptor_link(tid, int(told[1], 16)).startswith("/"):
                return _Seen.OVER
    return _Seen.ASLEEP


def _ask(tid: int) -> bool:
    """Have it stop when it leaves the kernel; whether it will."""
    try:
        ptrace.call(ptrace.SEIZE, tid)
        ptrace.call(ptrace.INTERRUPT, tid)
    except OSError:
        return False  # it is traced by somebody, or has ended: the next look tells
    return True


def _stood(tid: int) -> bool:
    """Whether it has stopped, or ended; it runs on."""
    try:
        found, status = os.waitpid(tid, ptrace.WALL | os.WNOHANG)
    except ChildProcessError:
        return True
    if not found:
        return False
    if os.WIFSTOPPED(status):
        # A stop that is not ours is a signal's, which is delivered.
        owed = 0 if status >> 16 else os.WSTOPSIG(status)
        with contextlib.suppress(ProcessLookupError):
            ptrace.call(ptrace.DETACH, tid, 0, owed)
    return True
