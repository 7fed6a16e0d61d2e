"""hold as the first process of a pid namespace of its own, and processes put into it from outside
the way CRIU puts them there: born inside, with a parent that is outside until it lets go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from agent import errors
from agent.host import proc

_CLONE_NEWPID = 0x20000000
_CLONE_NEWNS = 0x00020000
_libc = ctypes.CDLL(None, use_errno=True)
_IN_NEW_NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
# As runtimes do it: a changed root alone would leave the host's as the mount namespace's.
_PIVOT = """
import ctypes, os, sys
libc, (root, *command) = ctypes.CDLL(None), sys.argv[1:]
def check(result): assert result == 0
check(libc.mount(root.encode(), root.encode(), None, 0x5000, None))  # MS_BIND | MS_REC
check(libc.mount(b"proc", (root + "/proc").encode(), b"proc", 0, None))
os.chdir(root)
check(libc.syscall({"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b"."))
check(libc.umount2(b".", 2))  # MNT_DETACH
os.execv(command[0], command)
"""
WAIT_S = 20.0


def build(folder: Path) -> Path:
    binary = folder / "hold"
    script = Path(__file__).parents[2] / "hold/build"
    subprocess.run([str(script), str(binary)], check=True)
    return binary


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"did not come: {what}"
        time.sleep(0.002)


def sigqueue(pid: int, number: int, value: int) -> None:
    assert _libc.sigqueue(pid, number, ctypes.c_size_t(value)) == 0, os.strerror(ctypes.get_errno())


class Container:
    """hold with these arguments as pid 1. ``before`` are shell commands that pid 1 runs in its new
    mount namespace before it becomes hold; ``root`` is the directory that becomes its root. It is
    hold already unless ``wait`` is unset.
    """

    def __init__(
        self,
        binary: Path | str,
        *args: str,
        before: str = "",
        root: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
        wait: bool = True,
    ) -> None:
        command = shlex.join([str(binary), *args])
        change = (
            f"exec {shlex.join([sys.executable, '-SEc', _PIVOT, str(root)])}" if root else "exec"
        )
        self.popen = subprocess.Popen(
            [*_IN_NEW_NAMESPACES, "sh", "-ec", f"{before}\n{change} {command}"],
            stdin=stdin,
            stdout=stdout if stdout is not None else subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=pass_fds,
            env={**os.environ, **(environment or {})},
        )
        if wait:
            until(
                lambda: self.popen.poll() is not None or self.title.startswith("hold:"),
                "pid 1 is hold",
            )

    @property
    def pid(self) -> int:
        """pid 1 as the host counts; 0 if there is none (yet)."""
        with contextlib.suppress(errors.NotFound):
            return next(iter(proc.children(self.popen.pid)), 0)
        return 0

    @property
    def title(self) -> str:
        return title(self.pid)

    def waits(self) -> bool:
        return self.title == "hold: waiting"

    def inner(self, pid: int) -> int:
        """A process's number in here."""
        return proc.status(pid).ns_pids[-1]

    def outer(self, pid: int) -> int:
        """The process that has this number in here, as the host counts."""
        for outer in self.pids():
            with contextlib.suppress(errors.NotFound):  # others come and go
                if self.inner(outer) == pid:
                    return outer
        raise AssertionError(f"there is no process {pid} inside")

    def pids(self) -> list[int]:
        """All processes in here, as the host counts."""
        inside = []
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        for pid in proc.pids():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    inside.append(pid)
        return inside

    def stem(self) -> int:
        """The stem as the host counts."""
        until(lambda: self.title.startswith("hold: following "), "hold follows a stem")
        return self.outer(int(self.title.split()[-1]))

    def ended(self) -> int:
        """The exit status, once it has ended."""
        return self.popen.wait(WAIT_S)

    def stderr(self) -> str:
        assert self.popen.stderr is not None
        return self.popen.stderr.read().decode()

    def line(self) -> str:
        """The next line that the workload printed."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().decode().strip()

    def run(self, body: Callable[[], None]) -> None:
        """Run ``body`` in a process inside whose parent is outside, as an exec or a probe is."""
        status = Guest(self, body=body).reaped_outside()
        assert status == 0, f"the process inside ended with {status}"

    def set_last_pid(self, last: int) -> None:
        """The next process inside gets the number after ``last``."""

        def write() -> None:
            with open("/proc/sys/kernel/ns_last_pid", "w") as stream:
                stream.write(str(last))

        self.run(write)

    def close(self) -> None:
        self.popen.kill()  # --kill-child takes pid 1 with it, and the kernel all others
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()


class Guest:
    """A process born inside the container as CRIU makes one: its parent is inside as well, stays
    until ``let_go``, and has a parent outside.

    It waits for ``end``. Told to ``signals``, it ends with 100 and the signal's number instead of
    dying of them. With a ``body`` it is the parent that runs it, and there is no child.
    """

    def __init__(
        self,
        container: Container,
        body: Callable[[], None] | None = None,
        signals: Sequence[int] = (),
    ) -> None:
        told_r, told_w = os.pipe()
        stay_r, self._stay = os.pipe()
        end_r, self._end = os.pipe()
        self._outside = os.fork()
        if self._outside == 0:
            with _no_return():
                for fd in (told_r, self._stay, self._end):
                    os.close(fd)
                _enter(container.pid)
                parent = os.fork()
                if parent:
                    for fd in (told_w, end_r, stay_r):
                        os.close(fd)
                    os._exit(os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) & 0xFF)
                if body:
                    body()
                elif os.fork() == 0:
                    _wait_for_orders(told_w, end_r, stay_r, signals)
                else:
                    os.close(told_w)
                    os.read(stay_r, 1)
        for fd in (told_w, stay_r, end_r):
            os.close(fd)
        self.inner = int(os.read(told_r, 16) or 0)
        os.close(told_r)

    def end(self, status: int) -> None:
        """Exit with ``status``, or die of signal N for -N. Does not wait."""
        os.write(self._end, bytes([status if status >= 0 else 128 - status]))

    def let_go(self) -> None:
        """Its parent ends, as CRIU does when it has restored. Does not wait."""
        os.close(self._stay)

    def reaped_outside(self) -> int:
        """Wait for the parent's end."""
        return os.waitstatus_to_exitcode(os.waitpid(self._outside, 0)[1])

    def given(self) -> None:
        """Let go, and wait until it is pid 1's child."""
        self.let_go()
        assert self.reaped_outside() == 0


def _wait_for_orders(told: int, orders: int, stay: int, signals: Sequence[int]) -> None:
    os.close(stay)
    os.setsid()
    for number in signals:
        signal.signal(number, lambda n, _: os._exit(100 + n))
    os.write(told, str(os.getpid()).encode())
    os.close(told)
    order = os.read(orders, 1)
    if order and order[0] > 128:
        os.kill(os.getpid(), order[0] - 128)
    os._exit(order[0] if order else 0)


def _enter(pid: int) -> None:
    with open(f"/proc/{pid}/ns/pid") as pids, open(f"/proc/{pid}/ns/mnt") as mounts:
        assert _libc.setns(pids.fileno(), _CLONE_NEWPID) == 0
        assert _libc.setns(mounts.fileno(), _CLONE_NEWNS) == 0


@contextlib.contextmanager
def _no_return() -> Iterator[None]:
    """A forked child never gets back into pytest, whatever happens to it."""
    status = 99
    try:
        yield
        status = 0
    finally:
        os._exit(status)


def title(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            return stream.read().rstrip(b"\0").decode()
    except OSError:
        return ""
