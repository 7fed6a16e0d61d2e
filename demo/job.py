"""A training job as a person sees it: started, watched through its log, killed without warning.

Promises: nothing that was started here outlives ``Job.close``; every wait has a deadline.
Does not: tell the job that it is watched, dumped or killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

# From <linux/prctl.h>. Orphaned ranks become our children, so that their pids are free for a
# restore as soon as they are dead, whatever pid 1 of this machine does.
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.01


class JobFailed(Exception):
    """The training ended too early, failed, or does not move."""


@dataclass(frozen=True)
class Point:
    """One step as it showed up in the log; ``at_s`` from the start of the watch."""

    at_s: float
    step: int
    loss: float


def read_step(line: str) -> tuple[int, float] | None:
    """The step and the loss of a log line, or None if it tells of something else."""
    words = line.split()
    if len(words) < 4 or words[0] != "step":
        return None
    return int(words[1]), float.fromhex(words[3])


class Watch:
    """Follows the log of the process ``pid`` from another thread, also when a restore rolls the
    log back: what is written while there is no such process is the restore's, not the job's.
    """

    def __init__(self, path: str, pid: int, zero_s: float) -> None:
        self.points: list[Point] = []
        self.rolled_back_at: int | None = None
        """The index in ``points`` of the first step after the log was cut."""
        self._path = path
        self._pid = pid
        self._rolling_back = False
        self._zero_s = zero_s
        self._read_bytes = 0
        self._moved = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._thread.join()

    def step(self) -> int:
        """The last step seen, 0 before the first."""
        return self.points[-1].step if self.points else 0

    def wait_for(self, step: int, deadline_s: float, job: Job) -> None:
        """Return when ``step`` was seen.

        Raises:
            JobFailed: the job ended before, or ``deadline_s`` seconds have passed.
        """
        until_s = time.monotonic() + deadline_s
        with self._moved:
            while self.step() < step:
                if job.ended():
                    raise JobFailed(f"the training ended at step {self.step()}, before {step}")
                if time.monotonic() > until_s:
                    raise JobFailed(f"step {step} was not reached in {deadline_s:.0f} s")
                self._moved.wait(0.1)

    def _follow(self) -> None:
        while True:
            last = self._closed.is_set()
            with contextlib.suppress(FileNotFoundError):
                self._poll()
            if last:
                return
            self._closed.wait(_POLL_S)

    def _poll(self) -> None:
        # Opened anew each time: a rollback may put another file into the place of this one.
        with open(self._path, "rb") as log:
            size_bytes = os.fstat(log.fileno()).st_size
            if size_bytes < self._read_bytes:
                self.rolled_back_at = len(self.points)
                self._rolling_back = True
            if self._rolling_back:
                self._read_bytes = size_bytes
                self._rolling_back = not running(self._pid)
                return
            log.seek(self._read_bytes)
            text = log.read()
        whole = text.rfind(b"\n") + 1
        self._read_bytes += whole
        at_s = time.monotonic() - self._zero_s
        for line in text[:whole].decode().splitlines():
            if seen := read_step(line):
                with self._moved:
                    self.points.append(Point(at_s, *seen))
                    self._moved.notify_all()


class Job:
    """The launcher and its ranks."""

    def __init__(self, directory: str, arguments: Sequence[str]) -> None:
        become_reaper()
        self.directory = directory
        self.log = os.path.join(directory, "rank-0.log")
        os.makedirs(directory)
        with open(os.path.join(directory, "job.log"), "w") as log:
            # A session of its own and no terminal, as under a service manager.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "demo.train", directory, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._pids = [self.pid]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def ended(self) -> bool:
        """Whether the launcher has ended (a killed one, too)."""
        return self._process.poll() is not None

    def wait(self, deadline_s: float) -> None:
        """Wait for the end.

        Raises:
            JobFailed: it failed, or did not end in time.
        """
        try:
            status = self._process.wait(deadline_s)
        except subprocess.TimeoutExpired as exc:
            raise JobFailed(f"the training did not end in {deadline_s:.0f} s") from exc
        if status:
            raise JobFailed(f"the training ended with status {status}; see {self.directory}")

    def kill(self) -> int:
        """``kill -9`` all processes and wait until their pids are free; return how many."""
        self._pids = [self.pid, *descendants(self.pid)]
        _kill(self._pids)
        self._process.wait()
        return len(self._pids)

    def close(self) -> None:
        """Kill what is left, also of a tree that was restored with the pids of this one."""
        if not self.ended():
            self.kill()
        # Somebody else may have such a pid by now, but not below this process.
        _kill([pid for pid in descendants(os.getpid()) if pid in self._pids])


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    reap(pids)


def become_reaper() -> None:
    """Make orphans below this process its children."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, parents before children."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as children:
                for child in map(int, children.read().split()):
                    found += [child, *descendants(child)]
    return found


def state(pid: int) -> str:
    """The state letter of ``pid`` as the kernel gives it; "X" if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            # The name before the state is in parentheses and may hold anything.
            return stat.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def running(pid: int) -> bool:
    """Whether ``pid`` exists and has not ended."""
    return state(pid) not in ("Z", "X")


def reap(pids: Sequence[int], deadline_s: float = 10.0) -> None:
    """Wait until none of ``pids`` exists any more, reaping those that became our children.

    Raises:
        JobFailed: one of them is still there after ``deadline_s``.
    """
    until_s = time.monotonic() + deadline_s
    left = list(pids)
    while left:
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        left = [pid for pid in left if os.path.exists(f"/proc/{pid}")]
        if left and time.monotonic() > until_s:
            raise JobFailed(f"pid {left[0]} does not go away")
        if left:
            time.sleep(_POLL_S)
