"""Programs that this one starts: always in a session of their own, always ended and reaped.

Promises: a child shares no terminal, no standard stream and no descriptor but those it was given;
a terminal's Ctrl-C never reaches it; leaving a ``Child``'s context ends it and reaps it.
Does not: pass the caller's environment on (only what is named), or use a shell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from agent import errors
from agent.host import clock, proc

# What a child finds its own programs by; nothing else of the caller's environment matters to it.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A child that was asked politely gets this long before it is killed.
_GRACE_S = 2.0
# A killed process ends as soon as the kernel lets go of it; longer means uninterruptible I/O.
_REAP_S = 30.0


@dataclasses.dataclass(frozen=True)
class Completed:
    """A program's exit status (128 + N if signal N ended it) and what it printed."""

    status: int
    stdout: bytes
    stderr: bytes


class Child:
    """A program that runs. Safe to ask from several threads."""

    def __init__(self, popen: subprocess.Popen[bytes], name: str) -> None:
        self._popen = popen
        self._name = name
        self._pidfd = os.pidfd_open(popen.pid)

    @property
    def pid(self) -> int:
        """Its number; stays ours until it is reaped."""
        return self._popen.pid

    def fileno(self) -> int:
        """A descriptor that becomes readable when it has ended; valid until it is reaped."""
        return self._pidfd

    @property
    def reaped(self) -> bool:
        """Whether its number may belong to somebody else by now."""
        return self._popen.returncode is not None

    def ended(self, deadline: clock.Deadline) -> bool:
        """Wait for its end without reaping it; False if it still runs."""
        if self.reaped:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(deadline.remaining_s * 1000))

    def kill_session(self) -> list[int]:
        """Kill what it started and left behind: every other process of its session. To be called
        when it has ended and before it is reaped, since only until then its number names it.
        """
        killed = []
        for pid in [] if self.reaped else proc.pids():
            with contextlib.suppress(errors.NotFound):
                if pid != self.pid and proc.stat(pid).session == self.pid:
                    signal_quietly(pid)
                    killed.append(pid)
        return killed

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        status = self._popen.poll()
        return None if status is None else _shell_status(status)

    def wait(self, deadline: clock.Deadline) -> int:
        """Wait for its end.

        Raises:
            errors.DeadlineExceeded: it still runs.
        """
        try:
            status = self._popen.wait(deadline.remaining_s)
        except subprocess.TimeoutExpired as exc:
            raise errors.DeadlineExceeded(
                f"{self._name} did not end in time", program=self._name, pid=self.pid
            ) from exc
        self._close()
        return _shell_status(status)

    def let_go(self) -> None:
        """Leave it running and unreaped when this program ends; nothing more may be asked."""
        # Otherwise the last reference would complain that it still runs.
        self._popen.returncode = 0
        self._close()

    def _close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def send(self, number: int) -> None:
        """Send it a signal; a no-op if it has ended."""
        self._popen.send_signal(number)

    def kill(self) -> int:
        """End it at once, reap it, return its exit status."""
        self._popen.kill()
        return self.wait(clock.Deadline.after(_REAP_S))

    def stop(self, grace_s: float = _GRACE_S) -> int:
        """Ask it to end, kill it if it does not, reap it, return its exit status."""
        self._popen.terminate()
        try:
            return self.wait(clock.Deadline.after(grace_s))
        except errors.DeadlineExceeded:
            return self.kill()


def _shell_status(status: int) -> int:
    return 128 - status if status < 0 else status


def start(
    argv: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Child:
    """Start a program; it keeps the numbers of ``pass_fds``. The caller ends and reaps it.

    Raises:
        errors.NotFound: there is no such program, or it may not be run.
    """
    try:
        popen = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if stdout is None else stdout,
            stderr=subprocess.DEVNULL if stderr is None else stderr,
            pass_fds=pass_fds,
            cwd=cwd,
            env={"PATH": _PATH, **(env or {})},
            start_new_session=True,
        )
    except OSError as exc:
        raise errors.NotFound(
            f"cannot run {argv[0]}: {exc.strerror}",
            hint="check that the program is installed and may be run",
            path=argv[0],
        ) from exc
    return Child(popen, os.path.basename(argv[0]))


@contextlib.contextmanager
def running(
    argv: Sequence[str], *, pass_fds: Sequence[int] = (), cwd: str | None = None
) -> Iterator[Child]:
    """As ``start``; leaving the context kills and reaps it if it still runs."""
    child = start(argv, pass_fds=pass_fds, cwd=cwd)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a program to its end and return what it printed (for programs that print little).

    Raises:
        errors.NotFound: there is no such program.
        errors.DeadlineExceeded: it was killed.
    """
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            env={"PATH": _PATH, **(env or {})},
            pass_fds=pass_fds,
            start_new_session=True,
            check=False,
        )
    except OSError as exc:
        raise errors.NotFound(
            f"cannot run {argv[0]}: {exc.strerror}",
            hint="check that the program is installed and may be run",
            path=argv[0],
        ) from exc
    except subprocess.TimeoutExpired as exc:
        raise errors.DeadlineExceeded(
            f"{os.path.basename(argv[0])} did not end in {timeout_s:g} s", program=argv[0]
        ) from exc
    return Completed(_shell_status(done.returncode), done.stdout, done.stderr)


def signal_quietly(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False if there is no such process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
