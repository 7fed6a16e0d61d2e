"""Programs of other people's, under load, through standing epochs, a kill and a restore.

Who is served checks every answer, and afterwards whether everything is as it was at one instant.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent import errors
from agent.host import proc
from tests.host import packages
from tests.host.test_cli_job import Cli, until

pytestmark = pytest.mark.slow

EPOCHS = 20
CLIENTS, KEYS, MOST_BYTES = 2, 1000, 16 << 10
# Between two of its writes, when all keys are there: the server has no core for itself alone.
THINKS_S = 0.001
# After so many writes the server forks, and saves what it has beside its work.
SAVED_EVERY = 500
# Debian's server is this program under another name; the package with that name starts a service.
PROGRAM, PACKAGE = "redis-check-rdb", "redis-tools"
WORKLOADS = Path(__file__).parents[2] / "bench" / "workloads"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    for name in [name for name in os.environ if name.startswith("CKPT_AGENT_")]:
        monkeypatch.delenv(name)
    return Cli(tmp_path)


class Refused(Exception):
    """What the server says instead of an answer."""


class Connection:
    """To a server; a command's answer is ``bytes``, a number, a list of answers, or None."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._answers = self._socket.makefile("rb")

    def ask(self, *words: bytes | str | int) -> object:
        parts = [each if isinstance(each, bytes) else str(each).encode() for each in words]
        said = [b"$%d\r\n%s\r\n" % (len(each), each) for each in parts]
        self._socket.sendall(b"*%d\r\n" % len(parts) + b"".join(said))
        return self._answer()

    def _answer(self) -> object:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server is gone")
        kind, value = line[:1], line[1:-2]
        if kind == b"-":
            raise Refused(value.decode())
        if kind == b"+":
            return value
        if kind == b":":
            return int(value)
        size = int(value)
        if size < 0:
            return None
        if kind == b"*":
            return [self._answer() for _ in range(size)]
        content = self._answers.read(size + 2)
        if len(content) != size + 2:
            raise ConnectionError("the server is gone")
        return content[:-2]

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


class Client:
    """Writes to keys of its own and reads them back, one command after the other."""

    def __init__(self, number: int, port: int, seed: int) -> None:
        self.number, self._port = number, port
        self._draw = random.Random(seed + number)
        # The key of each write, in order; a write's number is its place here, from 1 on.
        self.written: list[int] = []
        self._last: dict[int, int] = {}
        self.acknowledged = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.failure = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._stop.clear()

    def _run(self) -> None:
        try:
            with contextlib.closing(Connection(self._port)) as server:
                while not self._stop.wait(0 if len(self.written) < KEYS else THINKS_S):
                    self._write(server)
                    for _ in range(2):
                        self._read(server)
        except BaseException as exc:  # noqa: BLE001 - looked at by who waits
            self.failure = exc

    def _write(self, server: Connection) -> None:
        number = len(self.written) + 1
        # Each of them once, first of all.
        key = number - 1 if number <= KEYS else self._draw.randrange(KEYS)
        self.written.append(key)
        self._last[key] = number
        server.ask("MULTI")
        server.ask("SET", self._name(key), self._value(key, number))
        server.ask("SET", f"last:{self.number}", number)
        server.ask("INCR", "total")
        answers = server.ask("EXEC")
        assert isinstance(answers, list), answers
        assert answers[:2] == [b"OK", b"OK"], answers
        if number % SAVED_EVERY == 0:
            with contextlib.suppress(Refused):  # it still saves
                server.ask("BGSAVE")
        self.acknowledged = number

    def _read(self, server: Connection) -> None:
        key = self._draw.randrange(KEYS)
        number = self._last.get(key)
        expected = None if number is None else self._value(key, number)
        assert server.ask("GET", self._name(key)) == expected, f"key {key}, write {number}"

    def _name(self, key: int) -> str:
        return f"client:{self.number}:{key}"

    def _value(self, key: int, number: int) -> bytes:
        mark = b"%d.%d.%d;" % (self.number, key, number)
        return mark * (1 + number * 7919 % (MOST_BYTES // len(mark)))

    def go_back(self, server: Connection) -> int:
        """Everything is as it was after one of the writes, which is the last from now on: say
        which, and how many keys there are.
        """
        answer = server.ask("GET", f"last:{self.number}")
        assert isinstance(answer, bytes)
        number = int(answer)
        assert number <= len(self.written)
        del self.written[number:]
        self._last = {key: at for at, key in enumerate(self.written, start=1)}
        for key, at in self._last.items():
            assert server.ask("GET", self._name(key)) == self._value(key, at), f"key {key}"
        return number

    @property
    def keys(self) -> int:
        """How many it has written to, and the one that tells the last write."""
        return len(self._last) + 1


class Clients:
    """Several of them. ``check`` fails with what one of them has met."""

    def __init__(self, port: int, seed: int) -> None:
        self.all = [Client(number, port, seed) for number in range(CLIENTS)]
        self._port = port

    def start(self) -> None:
        for each in self.all:
            each.start()

    def end(self) -> None:
        for each in self.all:
            each.end()
        self.check()

    def acknowledged(self) -> list[int]:
        return [each.acknowledged for each in self.all]

    def work(self, writes: int) -> None:
        """Return when each of them has written so often again."""
        before = self.acknowledged()

        def done() -> bool:
            self.check()
            return all(
                now >= was + writes for now, was in zip(self.acknowledged(), before, strict=True)
            )

        assert until(done)

    def check(self) -> None:
        for each in self.all:
            if each.failure is not None:
                raise each.failure

    def lose(self) -> None:
        """They meet the end of the server, and nothing else."""
        for each in self.all:
            each.end()
            if each.failure is not None and not isinstance(each.failure, ConnectionError):
                raise each.failure

    def go_back(self) -> list[int]:
        """All that is in the server is of one instant: say how often each had written then."""
        with contextlib.closing(Connection(self._port)) as server:
            found = [each.go_back(server) for each in self.all]
            assert server.ask("GET", "total") == str(sum(found)).encode()
            assert server.ask("DBSIZE") == sum(each.keys for each in self.all) + 1
        for each, number in zip(self.all, found, strict=True):
            each.acknowledged = number
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A running server: its number and its port."""
    packages.install({PROGRAM: PACKAGE})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "server"
    folder.mkdir()
    argv = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    argv += ["--save", "", "--logfile", str(folder / "log")]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        argv, executable=f"/usr/bin/{PROGRAM}", stdin=quiet, stdout=quiet, stderr=quiet,
        start_new_session=True,
    ) as process:  # fmt: skip

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                first = Connection(port)
            except ConnectionRefusedError:
                return False
            with contextlib.closing(first):
                return first.ask("PING") == b"PONG"

        assert until(answers)
        yield process.pid, port
        process.kill()
        process.wait()
        end(process.pid, str(folder))


def end(root: int, mark: str) -> None:
    """Kill the tree, and wait until its numbers are free, if it is still there: ``mark`` is where
    it works, or in its command line. Its number may be anybody's by now.
    """
    with contextlib.suppress(errors.NotFound):
        if not _is_marked(root, mark):
            return
        pids = proc.tree(root)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(root, 0)
        assert until(lambda: not any(map(proc.exists, pids)))


def _is_marked(pid: int, mark: str) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return os.fsencode(mark) in command or os.readlink(f"/proc/{pid}/cwd") == mark
    return False


def epochs(cli: Cli, pid: int, *options: str) -> Iterator[str]:
    """Watch the tree for so many; each image when it is made. Nothing can be as quick as this asks
    for: there is more time between two then, and the watch says so.
    """
    command = cli.command("watch", "--pid", str(pid), "--name", "job", "--every", "0.01s", *options)
    with subprocess.Popen(
        [*command, "--count", str(EPOCHS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watch:
        assert watch.stdout is not None
        images = []
        for line in watch.stdout:
            images.append(line.strip())
            yield images[-1]
        _, err = watch.communicate()
        assert (watch.returncode, len(images)) == (0, EPOCHS), err
        assert err.count("longer than was to be between two") == EPOCHS
    (member,) = cli.document("show", images[-1])["detail"]
    assert member["stop"]["path"] == "precopy", member["stop"]


def test_a_server_under_load_answers_through_epochs_and_comes_back_as_it_was_at_one_of_them(
    cli: Cli, server: tuple[int, int], tmp_path: Path
) -> None:
    pid, port = server
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    clients = Clients(port, seed)
    clients.start()
    try:
        clients.work(KEYS)
        images: list[str] = []
        before = after = clients.acknowledged()
        for image in epochs(cli, pid):
            images.append(image)
            after = clients.acknowledged()
            # Of a line that is read late this would be too much for the next epoch.
            before = after if len(images) <= EPOCHS // 2 else before
            clients.check()
        clients.work(100)
        end(pid, str(tmp_path / "server"))
        clients.lose()
        cli.run("restore", images[-1], "--files", "rollback")
        found = clients.go_back()
        assert all(
            low <= at <= high + 1 for low, at, high in zip(before, found, after, strict=True)
        )
        clients.start()
        clients.work(KEYS)
        clients.end()
        clients.go_back()
    finally:
        clients.lose()


class Training:
    """Of two ranks that exchange gradients over TCP, and never end."""

    def __init__(self, folder: Path, data: Path, pace_s: float) -> None:
        folder.mkdir()
        self._folder = str(folder)
        self._logs = [folder / f"rank-{rank}.log" for rank in range(2)]
        argv = [sys.executable, str(WORKLOADS / "launch.py"), str(WORKLOADS / "numpy_tcp.py")]
        # Sums must not depend on how the work was split.
        alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [*argv, "2", str(folder)],
            env={**os.environ, **alone, "DATA": str(data), "PACE": str(pace_s)},
            stdin=quiet,
            stdout=quiet,
            stderr=quiet,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def steps(self) -> int:
        """How many both ranks have noted."""
        return min(each.read_bytes().count(b"\n") if each.exists() else 0 for each in self._logs)

    def wait_for(self, steps: int) -> None:
        assert until(lambda: self.steps() >= steps)

    def first(self, steps: int) -> list[list[str]]:
        """Loss and weights of so many steps to the last bit, of each rank."""
        self.wait_for(steps)
        return [each.read_text().splitlines()[:steps] for each in self._logs]

    def end(self) -> None:
        end(self.pid, self._folder)
        self._process.wait()


def test_a_training_that_comes_back_from_the_last_of_many_epochs_is_the_same_to_the_last_bit(
    cli: Cli, tmp_path: Path
) -> None:
    data = tmp_path / "data.npz"
    draw = np.random.default_rng(1)
    np.savez(data, x=draw.random((4096, 64), np.float32), y=draw.integers(0, 10, 4096))
    job = Training(tmp_path / "job", data, pace_s=0.05)
    other = None
    try:
        job.wait_for(10)
        *_, image = epochs(cli, job.pid)
        job.wait_for(job.steps() + 50)
        job.end()
        lost = job.steps()
        cli.run("restore", image, "--files", "rollback")
        steps = lost + 50
        found = job.first(steps)
        job.end()
        other = Training(tmp_path / "other", data, pace_s=0)
        assert other.first(steps) == found
    finally:
        for each in (job, other):
            if each is not None:
                each.end()
