"""A restored tree in the hands of its caller: wait for it, signal it, end it.

Promises: ``wait`` gives the root's own exit status; a tree lives on when the program that restored
it ends; ``kill`` leaves no process of the tree.
Does not: restore anything.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable

from agent import errors
from agent.engines.criu import rpc, supervisor
from agent.host import clock, proc, subprocesses, system

# Killed processes are gone when the kernel has taken their memory apart.
_DEATH_S = 30.0
_NO_LIMIT_S = 10 * 365 * 86400.0


class InPlace:
    """A tree whose root is our own child, with its old number."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    @property
    def pid(self) -> int:
        """The root's number."""
        return self._pid

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the root's end; see ``agent.engines.base.RestoredTree``."""
        if self._status is not None:
            return self._status
        deadline = clock.Deadline.after(_NO_LIMIT_S if timeout_s is None else timeout_s)
        if not _readable(self._pidfd, deadline):
            raise errors.DeadlineExceeded(f"process {self._pid} still runs", pid=self._pid)
        _, status = os.waitpid(self._pid, 0)
        self._status = _shell_status(status)
        return self._status

    def signal(self, number: int) -> None:
        """Send the root a signal; a no-op if it has ended."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """End every process of the tree."""
        if self._status is not None:
            return
        # Parents first would let children run on under init; freeze each before looking below it.
        everyone = stopped_tree(self._pid)
        for who in everyone:
            if proc.alive(who):
                subprocesses.signal_quietly(who.pid)
        self.signal(signal.SIGKILL)
        self.wait(_DEATH_S)
        clock.wait_until(
            lambda: not any(proc.alive(who) for who in everyone), clock.Deadline.after(_DEATH_S)
        )

    def close(self) -> None:
        """Let go of the tree; it runs on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __del__(self) -> None:
        self.close()


class Isolated:
    """A tree in pid and mount namespaces of its own, below a supervisor that is its pid 1."""

    def __init__(
        self, child: subprocesses.Child, worker: rpc.Worker, status: socket.socket, inner_root: int
    ) -> None:
        self._child = child
        self.worker = worker
        self._status_socket = status
        self._inner_root = inner_root
        self._pid = 0
        self._status: int | None = None

    @property
    def pid(self) -> int:
        """The root's number as this host sees it."""
        return self._pid

    @property
    def supervisor_pid(self) -> int:
        """The supervisor's outer process; the whole tree ends with it."""
        return self._child.pid

    def stands(self) -> None:
        """The tree is complete and has not run: find its root's number on this host, which may end
        as soon as it runs.

        Raises:
            errors.NotFound: it is gone already.
        """
        self._pid = self.host_pid(self._inner_root)

    def settle(self) -> None:
        """After a restore: let go of CRIU."""
        self.worker.connection.close()

    def host_pid(self, number: int) -> int:
        """The number on this host of the process that has ``number`` inside.

        Raises:
            errors.NotFound: there is none.
        """
        for pid in proc.tree(self._child.pid)[1:]:
            with contextlib.suppress(errors.NotFound):
                if proc.status(pid).ns_pids[-1] == number:
                    return pid
        raise errors.NotFound(f"no process {number} in the restored tree", pid=number)

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the root's end; see ``agent.engines.base.RestoredTree``."""
        if self._status is not None:
            return self._status
        deadline = clock.Deadline.after(_NO_LIMIT_S if timeout_s is None else timeout_s)
        if not _readable(self._status_socket.fileno(), deadline):
            raise errors.DeadlineExceeded(f"process {self._pid} still runs", pid=self._pid)
        said = self._status_socket.recv(16)
        # Without a word the supervisor was killed, and the tree with it.
        self._status = int(said) if said else self._child.wait(clock.Deadline.after(_DEATH_S))
        return self._status

    def signal(self, number: int) -> None:
        """Send the root a signal; a no-op if it has ended."""
        if self._status is None and self._pid:
            subprocesses.signal_quietly(self._pid, number)

    def kill(self) -> None:
        """End every process of the tree: the kernel kills a pid namespace with its first one."""
        self.worker.connection.close()
        inside: list[proc.Identity] = []
        if self._child.poll() is None:
            inside = _identities(self._child.pid)
            self._child.kill()
        clock.wait_until(
            lambda: not any(proc.alive(who) for who in inside), clock.Deadline.after(_DEATH_S)
        )
        if self._status is None:
            self._status = 128 + signal.SIGKILL
        self.close()

    def close(self) -> None:
        """Let go of the tree; it runs on."""
        self.worker.connection.close()
        self._status_socket.close()
        if self._child.poll() is None:
            self._child.let_go()

    def __del__(self) -> None:
        self.close()


def supervise(criu: str, root_pid: int, numbers: set[int], pass_fds: Iterable[int]) -> Isolated:
    """Start a supervisor in new namespaces with a CRIU below it that waits for a request."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    status, status_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, status_theirs:
        fds = [theirs.fileno(), status_theirs.fileno()]
        argv = [
            *(sys.executable, "-I", "-S", supervisor.__file__, criu),
            *map(str, (*fds, root_pid, supervisor.last_pid(numbers, system.last_pid_max()))),
        ]
        child = subprocesses.start(argv, pass_fds=[*fds, *pass_fds])
    return Isolated(child, rpc.Worker(child, rpc.Connection(ours, child)), status, root_pid)


def reap(numbers: Iterable[int]) -> None:
    """Collect those of ``numbers`` that were restored as our children and have been killed."""
    deadline = clock.Deadline.after(_DEATH_S)
    for number in numbers:
        clock.wait_until(functools.partial(_reaped, number), deadline)


def _reaped(number: int) -> bool:
    try:
        return os.waitpid(number, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True  # not ours


def _identities(root: int) -> list[proc.Identity]:
    """Every process below ``root``; those that end meanwhile are left out."""
    found: list[proc.Identity] = []
    with contextlib.suppress(errors.NotFound):
        for pid in proc.tree(root)[1:]:
            with contextlib.suppress(errors.NotFound):
                found.append(proc.identity(pid))
    return found


def stopped_tree(root: int) -> list[proc.Identity]:
    """The tree, every process stopped so that none can start another meanwhile."""
    found: list[proc.Identity] = []
    queue = [root]
    while queue:
        pid = queue.pop(0)
        with contextlib.suppress(errors.NotFound):
            who = proc.identity(pid)
            subprocesses.signal_quietly(pid, signal.SIGSTOP)
            found.append(who)
            queue.extend(proc.children(pid))
    return found


def _readable(descriptor: int, deadline: clock.Deadline) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    # poll takes at most 2^31 ms.
    while not poll.poll(min(deadline.remaining_s * 1000, 1e9)):
        if deadline.expired:
            return False
    return True


def _shell_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
