"""Serves a tree's missing pages, and sees to it that none is ever taken for zero: a program of its
own, run with the standard library alone (``START``).

``SOCKET_FD URGENT_FD MEMORY_FD MEMORY_BYTES JOURNAL_PATH``. The agent gives it the userfaultfds of
restored processes, with the mappings that are to be filled, and then, piece by piece, what belongs
there; what a process waits for is asked of the agent first. It follows what
the processes do to their mappings meanwhile: what they move is filled where it went, what they let
go of is never filled, what they fork is filled as well.

When the last descriptor of a userfaultfd is closed, the kernel lets the processes go on, and what
has not been filled reads as zero. So two processes hold one table of descriptors (``CLONE_FILES``;
one that the kernel makes for a forked child is in both at once): whichever is killed, the tree at
most waits. The *second* does nothing but wait for the first one's end; then it ends the tree, and
closes nothing before the last of its address spaces is gone. So does the first when the agent ends
or says that there will be no more pages. Should the second be killed, the first makes another. Only
if both are killed in one instant can a page that is missing be taken for zero, until the next
command on this host ends the tree by the journal's entry, which the first removes when all is in.

Nothing here waits for a bounded time only where more patience harms nobody and less would: for the
agent, which may be stopped by a terminal (it watches over the time that filling takes, and its end
is heard), for the other of the two processes, and for the last address space of a tree that was
ended, before which nothing may be closed.

Promises: a page is filled once, with what the agent said, or found to be there; the agent hears
when all of it is complete, and only then are the userfaultfds closed. Ignores the signals by which
terminals and service managers end programs: it ends by the agent's word or end alone.
Does not: import more of the rest of the program than ``uffd`` and ``treeend``, read images, or know
what the pages mean. A process that makes guard pages (``MADV_GUARD_INSTALL``) or a mapping that
children shall find empty (``MADV_WIPEONFORK``) out of memory that is still missing finds it filled.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence

from agent.engines.criu import treeend, uffd

# How Python runs it, without site packages: its own path, for who looks at the list of processes,
# the folder of this program's packages, and its arguments follow.
START = (
    "import sys; sys.path.append(sys.argv[2]); from agent.engines.criu import keeper;"
    " sys.exit(keeper.main(sys.argv[2:]))"
)
# The first byte of each message, and what follows. From the agent, what somebody waits for by a
# socket of its own: the mappings of an address space (with a userfaultfd) as pairs of addresses; a
# process (with a pidfd); that this was all; pages: address space, address, length and where in the
# shared memory, and zero pages likewise; that a question has been answered, by pages or because
# they are zero; that what was asked for was sent before, so that nothing may be made zero for it;
# that all of the image was sent. That no more comes is said by the end of the channel.
VIEW, PROCESS, BEGIN, DATA, ZERO = b"V", b"P", b"B", b"D", b"Z"
ANSWERED, SENT, WHOLE = b"A", b"S", b"W"
SPACE, RANGE, PIECE = struct.Struct("=I"), struct.Struct("=QQ"), struct.Struct("=IQQQ")
# To the agent: ready; a question: address space and address; a piece was taken in, by its place;
# everything is complete; the tree was ended, and why.
READY, QUESTION, TAKEN, COMPLETE, ENDED = b"R", b"Q", b"T", b"C", b"E"
ADDRESS, PLACE = struct.Struct("=IQ"), struct.Struct("=Q")
MESSAGE_BYTES = 1 << 17

# So many address spaces are held before those that have ended are looked for.
_VIEWS = 64
# Where so many segments change at once, sorting all anew is quicker than one after the other.
_MANY = 64
# linux/sched.h, asm/unistd.h
_CLONE_FILES = 0x400
_NR_CLONE = {"x86_64": 56, "aarch64": 220}
# Where memory is short, the kernel gets this many chances, a moment apart, before the tree ends.
_MEMORY_TRIES, _MOMENT_MS = 500, 20
_CHANGING_MS = 1
# Why the tree was ended is told to an agent that listens within this.
_TOLD_S = 10.0


class View:
    """One address space: which of its addresses are to hold what of which image's. ``segments`` are
    (start, end, address in the image), ascending; there may be hundreds of thousands.
    """

    def __init__(self, fd: int, space: int, segments: list[tuple[int, int, int]]) -> None:
        self.fd = fd
        self.space = space
        self.segments = segments
        # The same, by what belongs there: each address of the image belongs to one place at most.
        self._origins = sorted(map(_by_origin, segments))
        self._left: list[tuple[int, int]] = []

    def origin(self, address: int) -> int | None:
        """What the page here is in the image; None if nothing of it."""
        at = bisect.bisect_right(self.segments, (address, sys.maxsize, 0)) - 1
        if at < 0 or address >= self.segments[at][1]:
            return None
        start, _, origin = self.segments[at]
        return origin + address - start

    def first(self, origin: int, end: int) -> tuple[int, int, int] | None:
        """Where the first of these bytes of the image belong that still do anywhere: (address,
        address in the image, how many).
        """
        at = bisect.bisect_right(self._origins, (origin, sys.maxsize, 0)) - 1
        for begins, start, stop in self._origins[max(0, at) : at + 2]:
            low, high = max(origin, begins), min(end, begins + stop - start)
            if low < high:
                return (start + low - begins, low, high - low)
        return None

    def cut(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Nothing belongs here any more; what did."""
        first = max(0, bisect.bisect_right(self.segments, (start, sys.maxsize, 0)) - 1)
        last = bisect.bisect_left(self.segments, (end, 0, 0))
        kept: list[tuple[int, int, int]] = []
        removed: list[tuple[int, int, int]] = []
        for low, high, origin in self.segments[first:last]:
            for into, a, b in ((kept, low, start), (removed, start, end), (kept, end, high)):
                a, b = max(a, low), min(b, high)
                if a < b:
                    into.append((a, b, origin + a - low))
        self._exchange(first, last, kept)
        return removed

    def move(self, start: int, to: int, length: int) -> None:
        """What belonged here belongs there."""
        self._left.append((start, start + length))
        moved = self.cut(start, start + length)
        self.cut(to, to + length)
        at = bisect.bisect_left(self.segments, (to, 0, 0))
        self._exchange(at, at, [(a - start + to, b - start + to, origin) for a, b, origin in moved])

    def unmap(self, start: int, end: int) -> None:
        """Nothing is mapped here any more. Where something moved away that is told as well, but
        only when the move has been heard of, and by then another thread may have moved what is
        missing to the same place.
        """
        if (start, end) in self._left:
            self._left.remove((start, end))
        else:
            self.cut(start, end)

    def _exchange(self, first: int, last: int, others: list[tuple[int, int, int]]) -> None:
        """Put ``others`` in the place of some segments."""
        gone = self.segments[first:last]
        self.segments[first:last] = others
        if len(gone) + len(others) > _MANY:
            self._origins = sorted(map(_by_origin, self.segments))
            return
        for each in gone:
            del self._origins[bisect.bisect_left(self._origins, _by_origin(each))]
        for each in others:
            bisect.insort(self._origins, _by_origin(each))


def _by_origin(segment: tuple[int, int, int]) -> tuple[int, int, int]:
    return segment[2], segment[0], segment[1]


class Keeper:
    """The first of the two processes."""

    def __init__(self, channels: Sequence[socket.socket], memory: mmap.mmap, entry: str) -> None:
        self._channel, self._urgent = channels
        # The tree has not run yet: what it forks is younger.
        self._began = treeend.began(os.getpid())
        self._begun = False
        self._memory = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._entry = entry
        self._views: dict[int, View] = {}
        self._processes: set[int] = set()
        self._questions: dict[tuple[int, int], list[tuple[View, int]]] = {}
        self._again: list[tuple[View, int]] = []
        self._poll = select.epoll()
        for each in channels:
            self._poll.register(each, select.EPOLLIN)
        self._own = os.pidfd_open(os.getpid())
        self._second = -1
        self._second_pid = 0
        self._most = _VIEWS
        self._short = 0

    def run(self) -> int:
        """Serve until all is complete (0), or the tree has been ended (1)."""
        try:
            self._make_second()
            while not self._served():
                pass
        except EOFError:
            return self._end("")
        except Exception as exc:  # noqa: BLE001 - told, and the tree is ended
            return self._end(f"its memory cannot be filled: {exc}")
        # All that was missing is in: from here on, whatever is killed, nothing is missing.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._entry)
        self._end_second()
        for view in list(self._views.values()):
            self._drop(view)
        self._channel.send(COMPLETE)
        return 0

    def _served(self) -> bool:
        """Wait for what comes next and do it; whether that was all."""
        ready = {fd for fd, _ in self._poll.poll(_CHANGING_MS / 1e3 if self._again else -1)}
        if self._second in ready:
            self._poll.unregister(self._second)
            os.close(self._second)
            os.waitpid(self._second_pid, 0)
            self._make_second()
        for ended in ready & self._processes:
            # Its descriptor stays, by which ``end_tree`` knows whom it was to end.
            self._processes.remove(ended)
            self._poll.unregister(ended)
            self._drop_gone()
        for view in [self._views[fd] for fd in ready & self._views.keys()]:
            self._listen(view)
        waiting, self._again = self._again, []
        for view, address in waiting:
            self._fault(view, address)
        if self._urgent.fileno() in ready:
            self._hear(self._urgent)  # and look for more of it before anything else
        elif self._channel.fileno() in ready and self._hear(self._channel):
            return True
        return self._begun and not self._views  # all have ended

    def _hear(self, channel: socket.socket) -> bool:
        """Take one message in; whether it was the last one."""
        try:
            said, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
        except ConnectionError as exc:
            raise EOFError from exc
        if not said:
            raise EOFError
        kind, content = said[:1], memoryview(said)[1:]
        if kind == DATA:
            self._take(*PIECE.unpack(content))
        elif kind == ZERO:
            self._forget(*PIECE.unpack(content))
        elif kind == ANSWERED:
            self._answered(*ADDRESS.unpack(content))
        elif kind == SENT:
            self._sent(*ADDRESS.unpack(content))
        elif kind == VIEW:
            (space,) = SPACE.unpack(content[: SPACE.size])
            ranges = RANGE.iter_unpack(content[SPACE.size :])
            self._add(descriptors[0], space, [(low, high, low) for low, high in ranges])
        elif kind == PROCESS:
            self._processes.add(descriptors[0])
            self._poll.register(descriptors[0], select.EPOLLIN)
        elif kind == BEGIN:
            self._begun = True
            self._channel.send(READY)
        return kind == WHOLE

    def _take(self, space: int, origin: int, length: int, place: int) -> None:
        done: set[View] = set()
        # A child that is forked in the middle of this gets all of it, too.
        while todo := [v for v in self._views.values() if v.space == space and v not in done]:
            done.add(todo[0])
            self._fill(todo[0], origin, length, self._memory + place)
        self._channel.send(TAKEN + PLACE.pack(place))

    def _forget(self, space: int, origin: int, length: int, _: int) -> None:
        """Nothing belongs there that would have to be asked for."""
        for view in [each for each in self._views.values() if each.space == space]:
            while (found := view.first(origin, origin + length)) is not None:
                view.cut(found[0], found[0] + found[2])

    def _answered(self, space: int, origin: int) -> None:
        for view, address in self._questions.pop((space, origin), ()):
            if view.origin(address) in (origin, None):
                self._zero(view, address)  # or it is there by now
            elif self._lives(view):
                uffd.wake(view.fd, address)

    def _sent(self, space: int, origin: int) -> None:
        for view, address in self._questions.pop((space, origin), ()):
            if self._lives(view):
                uffd.wake(view.fd, address)  # if it is not there, it will be asked for again

    def _add(self, fd: int, space: int, segments: list[tuple[int, int, int]]) -> None:
        if len(self._views) >= self._most:
            # A tree may fork again and again, while nothing is filled that would tell who ended.
            self._drop_gone()
            self._most = max(_VIEWS, 2 * len(self._views))
        os.set_blocking(fd, False)
        self._views[fd] = View(fd, space, segments)
        self._poll.register(fd, select.EPOLLIN)

    def _lives(self, view: View) -> bool:
        return self._views.get(view.fd) is view  # and not another one of the same number

    def _drop_gone(self) -> None:
        for view in [each for each in self._views.values() if uffd.gone(each.fd)]:
            self._drop(view)

    def _drop(self, view: View) -> None:
        del self._views[view.fd]
        os.close(view.fd)

    def _listen(self, view: View) -> bool:
        """Learn what a view has to tell; whether there was anything."""
        heard = False
        while self._lives(view) and (said := uffd.messages(view.fd)):
            heard = True
            for event, first, second, third in said:
                if event == uffd.PAGEFAULT:
                    self._again.append((view, second & -uffd.PAGE_BYTES))
                elif event == uffd.FORK:
                    self._add(first & 0xFFFFFFFF, view.space, list(view.segments))
                elif event == uffd.REMAP:
                    view.move(first, second, third)
                    uffd.wake(view.fd, first, third)
                elif event in (uffd.REMOVE, uffd.UNMAP):
                    (view.unmap if event == uffd.UNMAP else view.cut)(first, second)
                    uffd.wake(view.fd, first, second - first)
        return heard

    def _fault(self, view: View, address: int) -> None:
        origin = view.origin(address)
        if origin is None:
            self._zero(view, address)
            return
        waiting = self._questions.setdefault((view.space, origin), [])
        waiting.append((view, address))
        if len(waiting) == 1:
            self._channel.send(QUESTION + ADDRESS.pack(view.space, origin))

    def _zero(self, view: View, address: int) -> None:
        if not self._lives(view):
            return
        problem = uffd.zero(view.fd, address)
        self._short = self._short + 1 if problem == errno.ENOMEM else 0
        if problem in (errno.EAGAIN, errno.ENOMEM):
            if problem == errno.ENOMEM:
                self._put_off(view, problem, self._short)
            self._again.append((view, address))
        elif problem == errno.ESRCH:
            self._drop(view)
        elif problem:
            uffd.wake(view.fd, address)  # it is there, or the mapping is not

    def _fill(self, view: View, origin: int, length: int, source: int) -> None:
        """Copy a piece of the image to wherever it belongs."""
        at, end = origin, origin + length
        size, tries, absent = length, 0, 0
        while self._lives(view) and (found := view.first(at, end)) is not None:
            address, at, whole = found
            size = min(size, whole)
            problem, copied = uffd.call(
                view.fd, uffd.COPY, address, source + at - origin, size, 0, 0
            )
            # Only if it is missing twice in a row, while nothing is told, is there no such mapping.
            absent = absent + 1 if problem == errno.ENOENT else 0
            if problem in (0, errno.EAGAIN) and copied > 0:
                # What is missing there from now on, the process has let go of.
                view.cut(address, address + copied)
                at += copied
                size, tries = length, 0
            elif problem == errno.EEXIST:
                view.cut(address, address + uffd.PAGE_BYTES)
                uffd.wake(view.fd, address)
                at += uffd.PAGE_BYTES
            elif problem == errno.ENOENT and size > uffd.PAGE_BYTES:
                # A piece must lie in one mapping: they may have been split since.
                size, absent = size // uffd.PAGE_BYTES // 2 * uffd.PAGE_BYTES, 0
            elif problem == errno.ENOENT:
                # What moves this moment was looked up where it is no more: the next try says so.
                if self._listen(view):
                    absent = 0
                elif absent > 1:
                    at += uffd.PAGE_BYTES
                    size, absent = length, 0
            else:
                tries += problem == errno.ENOMEM
                self._put_off(view, problem, tries)

    def _put_off(self, view: View, problem: int, tries: int) -> None:
        """Do what lets the next try succeed."""
        if problem == errno.EAGAIN:
            # Mappings change. Until that has been read nothing is let in; so what is let in
            # belongs where what has been read says. It lasts as long as the process needs to get on
            # in the kernel, which it does.
            if not self._listen(view):
                treeend.wait(_CHANGING_MS)
        elif problem == errno.ESRCH:
            self._drop(view)
        elif problem == errno.ENOMEM and tries < _MEMORY_TRIES:
            treeend.wait(_MOMENT_MS)
        else:
            raise OSError(problem, os.strerror(problem))

    def _make_second(self) -> None:
        # With the interpreter's lock held all the time: this is the only thread, and both go on.
        # os.fork cannot share descriptors.
        number = _NR_CLONE[os.uname().machine]
        self._second_pid = ctypes.PyDLL(None).syscall(
            number, _CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0
        )
        if self._second_pid == 0:
            select.select([self._own], [], [])
            treeend.end_tree(self._began, {os.getpid(), os.getppid()})
            os._exit(1)
        if self._second_pid < 0:
            raise OSError("no second process could be made to keep it")
        self._second = os.pidfd_open(self._second_pid)
        self._poll.register(self._second, select.EPOLLIN)

    def _end_second(self) -> None:
        if self._second_pid > 0:
            os.kill(self._second_pid, signal.SIGKILL)
            # While it lives, the end of this process would have it end the tree.
            os.waitpid(self._second_pid, 0)

    def _end(self, reason: str) -> int:
        treeend.end_tree(self._began, {os.getpid(), self._second_pid})
        self._end_second()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._entry)
        self._channel.settimeout(_TOLD_S)
        with contextlib.suppress(OSError):
            self._channel.send(ENDED + reason.encode())
        return 1


def main(argv: list[str]) -> int:
    """Run with the arguments behind the first; 0 if all became complete."""
    channels = [socket.socket(fileno=int(each)) for each in argv[1:3]]
    memory = mmap.mmap(int(argv[3]), int(argv[4]))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    return Keeper(channels, memory, argv[5]).run()
