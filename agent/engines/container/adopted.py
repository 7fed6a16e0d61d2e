"""A tree restored into a container, in the hands of the agent: hold is its parent, not we.

Promises: ``signal`` and ``kill`` reach the tree as long as it is the one that was restored.
Does not: know the root's exit status; it becomes the container's own, and the runtime reports it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal

from agent import errors
from agent.engines.container import holding
from agent.engines.criu import trees
from agent.host import clock, proc, subprocesses

_DEATH_S = 30.0
_NO_LIMIT_S = 10 * 365 * 86400.0


class Adopted:
    """The tree whose root has the number ``pid`` on this host, and ``number`` inside of the
    container with pid 1 ``init``.
    """

    def __init__(self, pid: int, init: proc.Identity, number: int) -> None:
        self._who = proc.identity(pid)
        self._init = init
        self._number = number
        self._pidfd = os.pidfd_open(pid)

    @property
    def pid(self) -> int:
        """The root's number on this host."""
        return self._who.pid

    @property
    def number(self) -> int:
        """The number by which hold knows the root."""
        return self._number

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the root's end.

        Raises:
            errors.DeadlineExceeded: it still runs.
            errors.NotFound: it has ended; its status is the container's, which the runtime knows.
        """
        deadline = clock.Deadline.after(_NO_LIMIT_S if timeout_s is None else timeout_s)
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        # poll takes at most 2^31 ms.
        while not poll.poll(min(deadline.remaining_s * 1000, 1e9)):
            if deadline.expired:
                raise errors.DeadlineExceeded(f"process {self.pid} still runs", pid=self.pid)
        raise errors.NotFound(
            f"process {self.pid} has ended",
            hint="its exit status is that of the container",
            pid=self.pid,
        )

    def signal(self, number: int) -> None:
        """Send the root a signal; a no-op if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """End every process of the tree; hold waits again, and another try may follow."""
        if not proc.alive(self._who):
            return
        holding.stop(self._init, self._number)
        everyone = trees.stopped_tree(self.pid)
        for who in everyone:
            if proc.alive(who):
                subprocesses.signal_quietly(who.pid)
        self.signal(signal.SIGKILL)
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
