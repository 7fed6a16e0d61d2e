"""Connections of a container that comes up in a pod with another address."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.host.boxes import Box, Boxes, tables
from tests.host.conftest import Cut
from tests.host.test_container_engine import wait_for

OUTSIDE = "10.77.0.1"

# Talks to itself by loopback and by its own address, and to somebody outside.
PROGRAM = """
import json, socket, sys, time
own, outside, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
def pair(address):
    server = socket.create_server((address, 0))
    near = socket.create_connection(server.getsockname())
    far = server.accept()[0]
    for each in (near, far):
        each.settimeout(60)
    near.sendall(b'queued')
    return server, near, far
pairs = [pair('127.0.0.1'), pair(own)]
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((own, 0))
peer = socket.create_connection((outside, port))
peer.settimeout(60)
n = 0
while True:
    n += 1
    said = {'n': n}
    for server, near, far in pairs:
        want = b'queued' if n == 1 else b'%d' % (n - 1)
        got = far.recv(len(want))
        assert got == want, (got, want)
        near.sendall(b'%d' % n)
        far.sendall(b'back')
        assert near.recv(4) == b'back'
        new = socket.create_connection(server.getsockname())
        server.accept()[0].close()
        new.close()
    said['listen'] = pairs[1][0].getsockname()[0]
    said['udp'] = udp.getsockname()[0]
    if peer is not None:
        try:
            peer.sendall(b'%d\\n' % n)
            said['peer'] = peer.recv(100).decode()
        except OSError as exc:
            said['peer'] = type(exc).__name__
            peer = None
    print(json.dumps(said), flush=True)
    time.sleep(0.05)
"""


@pytest.fixture
def echo() -> Iterator[int]:
    """``echoing`` for a test."""
    with echoing() as port:
        yield port


@contextlib.contextmanager
def echoing() -> Iterator[int]:
    """A peer outside of the pods, on the tests' own network; yields its port."""
    script = (
        "import socket,threading\n"
        f"s=socket.create_server(('{OUTSIDE}',0));print(s.getsockname()[1],flush=True)\n"
        "def serve(c):\n"
        " while d:=c.recv(100): c.sendall(d)\n"
        "while True: threading.Thread(target=serve,args=(s.accept()[0],),daemon=True).start()\n"
    )
    run("ip", "link", "add", "bridge", "type", "bridge")
    run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "bridge")
    run("ip", "link", "set", "bridge", "up")
    popen = subprocess.Popen(["python3", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert popen.stdout
        yield int(popen.stdout.readline())
    finally:
        popen.kill()
        popen.communicate()
        run("ip", "link", "delete", "bridge")


@contextlib.contextmanager
def pod_network(address: str) -> Iterator[str]:
    """A network namespace with this address, of either family, on the tests' bridge; yields its
    path.
    """
    popen = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
    name = "v" + re.split(r"[.:]", address)[-1]
    # Who else might have the address is not waited for.
    width = ("/64", "nodad") if ":" in address else ("/24",)
    try:
        own = f"/proc/{popen.pid}/ns/net"
        here = subprocess.run(["readlink", "/proc/self/ns/net"], capture_output=True).stdout
        wait_for(
            lambda: subprocess.run(["readlink", own], capture_output=True).stdout != here, "no net"
        )
        run(
            "ip",
            "link",
            "add",
            name,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(popen.pid),
        )
        run("ip", "link", "set", name, "master", "bridge", "up")
        inside = ("nsenter", "--target", str(popen.pid), "--net", "ip")
        run(*inside, "addr", "add", f"{address}{width[0]}", "dev", "eth0", *width[1:])
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        yield own
    finally:
        subprocess.run(["ip", "link", "delete", name], stderr=subprocess.DEVNULL)
        popen.send_signal(signal.SIGKILL)
        popen.wait()


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


def said(box: Box) -> list[dict[str, Any]]:
    text = box.log.read_text()
    return [json.loads(line) for line in text.splitlines()]


def in_network(path: str) -> dict[str, object]:
    return {"namespaces": {"network": {"path": path}}}


def test_own_connections_go_on_at_the_new_address_and_others_are_reset(
    boxes: Boxes, echo: int
) -> None:
    with pod_network("10.77.0.2") as first, pod_network("10.77.0.3") as second:
        argv = ("python3", "-c", PROGRAM, "10.77.0.2", OUTSIDE, str(echo))
        source = boxes.start("source", *argv, **in_network(first))
        wait_for(lambda: len(source.log.read_text().splitlines()) > 5, "no output")
        image = boxes.stop(source)
        target = boxes.placeholder("target", **in_network(second))
        boxes.restore(image, target)
        wait_for(lambda: len(target.log.read_text().splitlines()) > 5, target.log.read_text())
        after = said(target)
        # runc may still be on the way to the log with what was said last.
        wait_for(lambda: said(source)[-1]["n"] == after[0]["n"] - 1, "lines are lost")
        before = said(source)
        assert [line["n"] for line in before + after] == list(range(1, len(before + after) + 1))
        # The first line may have been half written when it was dumped.
        assert {line["listen"] for line in after[1:]} == {"10.77.0.3"}
        assert {line["udp"] for line in after[1:]} == {"10.77.0.3"}
        assert all(line["peer"] == f"{line['n']}\n" for line in before)
        seen = [line["peer"] for line in after if "peer" in line]
        assert seen[-1] in ("ConnectionAbortedError", "ConnectionResetError")
        assert len(seen) <= 2
        boxes.assert_clean()


def test_a_connection_to_outside_goes_on_while_its_pod_is_dumped(boxes: Boxes, echo: int) -> None:
    with pod_network("10.77.0.2") as network:
        argv = ("python3", "-c", PROGRAM, "10.77.0.2", OUTSIDE, str(echo))
        source = boxes.start("source", *argv, **in_network(network))
        wait_for(lambda: len(source.log.read_text().splitlines()) > 5, "no output")
        seen: list[str] = []
        for _ in range(3):
            boxes.dump(source, cut=Cut(captured=lambda: seen.append(tables(source))))
            count = len(said(source))
            wait_for(lambda count=count: len(said(source)) > count + 3, "stands still")  # type: ignore[misc]
        assert all(line["peer"] == f"{line['n']}\n" for line in said(source))
        # While it stood still, its connections were held, and nobody else's.
        assert all("ckpt-agent-dump" in table for table in seen)
        boxes.assert_clean()


def test_at_the_same_address_a_peer_that_is_still_there_goes_on(boxes: Boxes, echo: int) -> None:
    """The pod's network outlives its container, as when a container is restarted."""
    with pod_network("10.77.0.2") as network:
        argv = ("python3", "-c", PROGRAM, "10.77.0.2", OUTSIDE, str(echo))
        source = boxes.start("source", *argv, **in_network(network))
        wait_for(lambda: len(source.log.read_text().splitlines()) > 5, "no output")
        image = boxes.stop(source)
        time.sleep(0.2)
        target = boxes.placeholder("target", **in_network(network))
        boxes.restore(image, target)
        wait_for(lambda: len(target.log.read_text().splitlines()) > 5, target.log.read_text())
        assert all(line["peer"] == f"{line['n']}\n" for line in said(source) + said(target))
        boxes.assert_clean()


def test_new_connections_during_a_dump_wait_and_are_served(boxes: Boxes, echo: int) -> None:
    script = (
        "import socket\n"
        "s=socket.create_server(('10.77.0.2',8080));print('up',flush=True)\n"
        "while True: c=s.accept()[0]; c.sendall(b'hello'); c.close()\n"
    )
    with pod_network("10.77.0.2") as network:
        source = boxes.start("source", "python3", "-c", script, **in_network(network))
        wait_for(lambda: "up" in source.log.read_text(), "no server")
        clients: list[socket.socket] = []

        def knock() -> None:
            clients.append(socket.create_connection(("10.77.0.2", 8080), timeout=10))

        boxes.dump(source, cut=Cut(frozen=knock))
        assert clients[0].recv(5) == b"hello"
        clients[0].close()
        boxes.assert_clean()
