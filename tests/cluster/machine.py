"""A machine of the test cluster: its own network, mount, process, UTS and IPC namespaces.

Promises: nothing of it is left outside its namespaces and its state directory, so ending its first
process ends all of it, even after the program that started it has died; a wait that fails says
which service and shows the end of its log.
Does not: emulate hardware or a kernel of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOG_LINES = 25
NODE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# A service's log and pid file, then its command line: runs it until another supervisor, or nobody,
# is named beside the pid file.
SUPERVISE = """log=$1 pidfile=$2; shift 2
echo $$ > "$pidfile.supervisor"
while [ "$(cat "$pidfile.supervisor" 2>/dev/null)" = $$ ]; do
  "$@" < /dev/null >> "$log" 2>&1 &
  echo $! > "$pidfile"
  wait $!
  sleep 0.3
done"""
START = """supervise=$1 log=$2 pidfile=$3; shift
rm -f "$pidfile"
setsid sh -c "$supervise" sh "$@" < /dev/null > /dev/null 2>&1 &
until [ -s "$pidfile" ]; do sleep 0.02; done"""
ALIVE = 'read -r stat < "/proc/$(cat "$0")/stat" && case ${stat##*) } in Z*) exit 1 ;; esac'


class ClusterError(Exception):
    """The test cluster did not do what it was asked; the message holds the evidence."""


def poll(
    condition: Callable[[], object], what: str, timeout_s: float, pause_s: float = 0.1
) -> None:
    """Returns when ``condition`` holds. ClusterError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {timeout_s:g} s")
        time.sleep(pause_s)


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    stdin: str | bytes | None = None,
    timeout_s: float = 120,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs ``argv`` to its end. ClusterError with its output when it fails and ``check`` is set."""
    text = stdin.decode() if isinstance(stdin, bytes) else stdin
    try:
        done = subprocess.run(
            argv,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise ClusterError(f"{_shown(argv)}: not done within {timeout_s:g} s") from expired
    if check and done.returncode:
        raise ClusterError(f"{_shown(argv)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def _shown(argv: Sequence[str | os.PathLike[str]]) -> str:
    return " ".join(str(word) for word in argv)


def _started(pid: int) -> str | None:
    """When ``pid`` was started, as the kernel counts: tells a process from a later one's pid."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


class Machine:
    """One machine. It exists from ``boot`` until ``halt``, whoever called them."""

    def __init__(self, name: str, state: Path) -> None:
        self.name = name
        self.state = state / name
        # Clusters with states of their own do not meet in the control groups either.
        self.control_group = f"{state.name}-{name}"
        self.log = self.state / "log"
        self._services = self.state / "services"

    @property
    def pid(self) -> int:
        """Its first process as seen from outside. ClusterError when it is not running."""
        pid = self._pid()
        if pid is None:
            raise ClusterError(f"machine {self.name} is not running")
        return pid

    def running(self) -> bool:
        """Whether its first process lives."""
        return self._pid() is not None

    def _pid(self) -> int | None:
        try:
            pid, started = (self.state / "pid").read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid) if _started(int(pid)) == started else None

    def boot(self, kind: str, *arguments: str | Path) -> None:
        """Makes the namespaces and mounts; ``arguments`` are machine_init.sh's."""
        self.state.mkdir(parents=True)
        output = self.state / "boot.log"
        argv: list[str | Path] = [
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
        ]
        argv += ["--propagation", "private", HERE / "machine_init.sh", kind, self.name]
        with open(output, "wb") as log:
            process = subprocess.Popen(
                [str(word) for word in [*argv, self.control_group, self.state, *arguments]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        part = self.state / "pid.part"
        try:
            poll(
                lambda: (part.exists() and part.read_text().strip()) or process.poll() is not None,
                f"{self.name}'s namespaces",
                20,
                0.01,
            )
            pid = int(part.read_text())
        except (ClusterError, OSError, ValueError) as error:
            raise ClusterError(f"{self.name} did not boot: {output.read_text()}") from error
        (self.state / "pid").write_text(f"{pid} {_started(pid)}\n")
        process.returncode = 0  # it outlives us on purpose

    def halt(self) -> None:
        """Ends every process of the machine and removes its control groups; its files stay."""
        pid = self._pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            # The first process waits for all others of its namespace to be reaped.
            poll(lambda: self._pid() is None, f"the end of {self.name}", 30, 0.02)
        for stray in self._strays():
            with contextlib.suppress(ProcessLookupError):
                os.kill(stray, signal.SIGKILL)
        for group in _control_groups(self.control_group):
            poll(partial(_removed, group), f"removing {group}", 10)

    def _strays(self) -> Iterator[int]:
        """First processes of this machine that nobody came to write down."""
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (directory / "cmdline").read_bytes().split(b"\0")
                if {b"machine_init.sh", os.fsencode(self.state)} <= {
                    os.path.basename(word) if word.endswith(b".sh") else word for word in words
                }:
                    yield int(directory.name)

    def remove(self) -> None:
        """Halts the machine and deletes its files."""
        self.halt()
        shutil.rmtree(self.state, ignore_errors=True)
        if self.state.exists():
            raise ClusterError(f"{self.state} could not be removed: is something mounted there?")

    def inside(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """``argv`` as a command line that runs it in the machine."""
        return ["nsenter", "--target", str(self.pid), "--all", "--", *map(str, argv)]

    def exec(
        self,
        *argv: str | os.PathLike[str],
        stdin: str | bytes | None = None,
        timeout_s: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program in the machine. ClusterError when it fails and ``check`` is set."""
        return run(self.inside(argv), stdin=stdin, timeout_s=timeout_s, check=check)

    def start(self, service: str, *argv: str | os.PathLike[str]) -> None:
        """Starts a service in the background, and again whenever it ends, as a node's service
        manager does; its output goes to ``log/SERVICE.log``.
        """
        log, pidfile = self._inner_paths(service)
        self.exec("sh", "-c", START, "sh", SUPERVISE, log, pidfile, *argv)
        (self.state / f"{service}.argv").write_text("\0".join(map(str, argv)))

    def alive(self, service: str) -> bool:
        """Whether the service's process lives."""
        _, pidfile = self._inner_paths(service)
        return self.exec("sh", "-c", ALIVE, pidfile, check=False).returncode == 0

    def kill(self, service: str, signal_name: str = "KILL") -> None:
        """Sends the service a signal; if it ends by it, it is started again within a second."""
        _, pidfile = self._inner_paths(service)
        self.exec("sh", "-c", f'kill -{signal_name} "$(cat "$0")"', pidfile)

    def stop(self, service: str, signal_name: str = "TERM", timeout_s: float = 30) -> None:
        """Ends the service and waits until it is gone. It stays so until ``resume``."""
        _, pidfile = self._inner_paths(service)
        self.exec("rm", "-f", f"{pidfile}.supervisor")
        if self.alive(service):
            self.kill(service, signal_name)
        poll(lambda: not self.alive(service), f"the end of {service} on {self.name}", timeout_s)

    def resume(self, service: str) -> None:
        """Starts a service that was stopped, as it was started before."""
        self.start(service, *(self.state / f"{service}.argv").read_text().split("\0"))

    def tail(self, service: str, lines: int = LOG_LINES) -> str:
        """The end of a service's log."""
        try:
            text = (self.log / f"{service}.log").read_text(errors="replace")
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:])

    def wait_for(self, service: str, ready: Callable[[], object], timeout_s: float) -> None:
        """Returns when ``ready`` holds; ClusterError with the end of the log after the time."""
        try:
            poll(ready, f"{service} on {self.name}", timeout_s)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.tail(service)}") from error

    def _inner_paths(self, service: str) -> tuple[str, str]:
        return str(self.log / f"{service}.log"), str(self._services / f"{service}.pid")


class NodeMachine(Machine):
    """A machine with a root of its own."""

    def inside(self, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """``argv`` as a command line that runs it on the node, with the node's search path."""
        return super().inside(["env", f"PATH={NODE_PATH}", *argv])

    def _inner_paths(self, service: str) -> tuple[str, str]:
        return f"/var/log/{service}.log", f"/run/services/{service}.pid"


def _control_groups(name: str) -> Iterator[Path]:
    """The machine's control groups, of every hierarchy, the innermost first."""
    for top in (Path("/sys/fs/cgroup"), *sorted(Path("/sys/fs/cgroup").iterdir())):
        if (top / name).is_dir():
            for directory, _, _ in os.walk(top / name, topdown=False):
                yield Path(directory)


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
