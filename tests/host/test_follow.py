"""``dump --follow``: who is connected with a process is cut with it, and nobody else."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agent.host import endpoints, proc
from tests.host.test_cli_job import Cli, until

# A sends numbers to B over TCP, B passes them on to C over a unix socket, C writes the last one
# down. Whoever misses one ends. B and C have a common parent and process groups of their own.
_NUMBERS = """
import os, socket, struct, sys, time
folder, port = sys.argv[1], os.path.join(sys.argv[1], "port")
def put(name, text):
    with open(os.path.join(folder, name + ".new"), "w") as file:
        file.write(text)
    os.replace(os.path.join(folder, name + ".new"), os.path.join(folder, name))
def numbers(sock):
    for number in range(1 << 40):
        data = sock.recv(8, socket.MSG_WAITALL)
        assert data == struct.pack("<Q", number), (data, number)
        yield number
"""
_A = """
with socket.create_server((sys.argv[2], 0), family=int(sys.argv[3])) as server:
    put("port", str(server.getsockname()[1]))
    sock = server.accept()[0]
for number in range(1 << 40):
    sock.sendall(struct.pack("<Q", number))
    time.sleep(0.001)
"""
_B_AND_C = """
left, right = socket.socketpair(socket.AF_UNIX, getattr(socket, sys.argv[3]))
for role in "BC":
    if os.fork() == 0:
        os.setpgid(0, 0)
        (right if role == "B" else left).close()
        if role == "B":
            while not os.path.exists(port):
                time.sleep(0.01)
            sock = socket.create_connection((sys.argv[2], int(open(port).read())))
            for number in numbers(sock):
                left.sendall(struct.pack("<Q", number))
        for number in numbers(right):
            if number % 20 == 0:
                put("last", str(number))
left.close()
right.close()
os.wait()
"""
_D = "ends = socket.socketpair(); time.sleep(1000)"


class Started:
    """Programs in sessions of their own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.roots: list[int] = []
        self.popens: list[subprocess.Popen[bytes]] = []

    def start(self, body: str, *arguments: str) -> int:
        popen = subprocess.Popen(
            [sys.executable, "-c", _NUMBERS + body, str(self.folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.popens.append(popen)
        self.roots.append(popen.pid)
        return popen.pid

    def last(self) -> int:
        try:
            return int((self.folder / "last").read_text())
        except FileNotFoundError:
            return -1

    def flows(self) -> bool:
        before = self.last()
        return until(lambda: self.last() > before)

    def close(self) -> None:
        for root in self.roots:
            if self._is_ours(root):
                for pid in reversed(proc.tree(root)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        for popen in self.popens:
            popen.wait()

    def _is_ours(self, root: int) -> bool:
        """Once it has ended, its number may be anybody's."""
        with contextlib.suppress(OSError):
            return bytes(self.folder) in pathlib.Path(f"/proc/{root}/cmdline").read_bytes()
        return False


@pytest.fixture
def started(tmp_path: pathlib.Path) -> Iterator[Started]:
    found = Started(tmp_path)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize(
    ("address", "family", "kind"),
    [
        ("127.0.0.1", socket.AF_INET, "SOCK_STREAM"),
        ("::1", socket.AF_INET6, "SOCK_SEQPACKET"),
    ],
)
def test_all_who_are_connected_are_cut_restored_and_lose_nothing(
    tmp_path: pathlib.Path, started: Started, address: str, family: int, kind: str
) -> None:
    cli = Cli(tmp_path)
    a = started.start(_A, address, str(int(family)))
    launcher = started.start(_B_AND_C, address, kind)
    d = started.start(_D)
    assert until(started.flows)

    plan = cli.document("plan", "--pid", str(a), "--follow")
    assert [each["root"] for each in plan["members"]] == [a, launcher]
    assert plan["members"][1]["because"].startswith("unix")
    assert plan["leaving"] == []
    text = cli.run("plan", "--pid", str(a), "--follow").stdout
    assert "Members" in text

    dumped = cli.run("dump", "--pid", str(a), "--follow", "--stop", "--name", "chain")
    assert f"also cuts the tree of {launcher}" in dumped.stderr
    for popen in started.popens[:2]:
        popen.wait(10)
    assert proc.stat(d).state == "S"
    stood = started.last()
    cli.run("restore", "chain", "--files", "keep")
    assert proc.exists(a)
    assert until(lambda: started.last() > stood)
    assert started.flows()
    assert len(proc.tree(launcher)) == 3


def test_halves_that_nothing_may_hold_together_are_refused_and_run_on(
    tmp_path: pathlib.Path, started: Started
) -> None:
    cli = Cli(tmp_path)
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        pid = started.start(f"s = socket.socket(socket.AF_UNIX); s.connect({path!r}); {_D}")
        theirs = server.accept()[0]
    with theirs:
        ran = cli.run("dump", "--pid", str(pid), "--follow", status=3)
        assert f"process {os.getpid()} " in ran.stderr
        assert "this program or one of its ancestors" in ran.stderr
        plan = cli.document("plan", "--pid", str(pid), "--follow", status=3)
        assert [each["code"] for each in plan["blockers"]] == ["external-unix-socket"]
        assert [each["blocks"] for each in plan["leaving"]] == [True]
    assert proc.stat(pid).state == "S"
    assert not (tmp_path / "store").exists()


def test_a_connection_to_this_test_is_named_and_left_as_a_plain_dump_leaves_it(
    tmp_path: pathlib.Path, started: Started
) -> None:
    cli = Cli(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        pid = started.start(f"s = socket.create_connection(('127.0.0.1', {port})); {_D}")
        theirs = server.accept()[0]
    with theirs:
        ran = cli.run("dump", "--pid", str(pid), "--follow")
    assert "leaves the cut: tcp 127.0.0.1:" in ran.stderr


@pytest.fixture
def service() -> Iterator[pathlib.Path]:
    """A control group that is named as a service manager names one of the system's services."""
    places = [pathlib.Path("/sys/fs/cgroup") / name for name in ("systemd", "")]
    top = next(each for each in places if (each / "cgroup.procs").exists())
    made = top / f"ckpt-test-{secrets.token_hex(4)}" / "system.slice" / "shared.service"
    made.mkdir(parents=True)
    try:
        yield made
    finally:
        for each in (made, made.parent, made.parent.parent):
            each.rmdir()


def test_a_service_of_the_system_is_not_cut_for_the_sake_of_who_uses_it(
    tmp_path: pathlib.Path, service: pathlib.Path, started: Started
) -> None:
    cli = Cli(tmp_path)
    shared = started.start(_A, "127.0.0.1", str(int(socket.AF_INET)))
    (service / "cgroup.procs").write_text(str(shared))
    assert until((tmp_path / "port").exists)
    port = int((tmp_path / "port").read_text())
    user = started.start(f"s = socket.create_connection(('127.0.0.1', {port})); {_D}")

    def states() -> list[str]:
        return [each.state for each in endpoints.tcp(shared, proc.open_files(shared)).values()]

    assert proc.exists(user)
    assert until(lambda: states() == ["established"])
    plan = cli.document("plan", "--pid", str(user), "--follow")
    assert [each["root"] for each in plan["members"]] == [user]
    (leaving,) = plan["leaving"]
    assert leaving["reason"].startswith(f"process {shared} ")
    assert leaving["reason"].endswith("belongs to the system's service shared.service")
    plan = cli.document("plan", "--pid", str(shared), "--follow")
    assert [each["root"] for each in plan["members"]] == [shared, user]


def test_follow_is_for_processes_that_run(tmp_path: pathlib.Path) -> None:
    cli = Cli(tmp_path)
    refused = cli.run("plan", "pod/x", "--follow", status=2).stderr
    assert "--follow" in refused
    assert "add --coordinator" in refused
    for verb in ("dump", "plan"):
        ran = cli.run(verb, "--pid", str((1 << 22) + 1), "--follow", status=3)
        assert "there is no process" in ran.stderr
