"""Addresses that are kept apart hear nothing of each other over TCP, lose nothing, and the sender
goes on trying at its usual pace.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator

import pytest

from agent.host import clock, hold, namespaces, netfilter, proc
from tests.host.test_hold import silent

NAME = "ckpt-agent-test-apart"
_RETRANSMITS_AT, _BACKOFF_AT = 2, 4  # in struct tcp_info, linux/tcp.h
PEERS = {4: ("10.77.0.1", "10.77.0.2"), 6: ("fd77::1", "fd77::2")}


@pytest.fixture
def network() -> Iterator[int]:
    """A network namespace with both addresses of each version."""
    add = [
        f"ip addr add {each}/{32 if version == 4 else 128} dev lo"
        for version, both in PEERS.items()
        for each in both
    ]
    script = " && ".join(["ip link set lo up", *add, "echo up", "exec sleep 120"])
    popen = subprocess.Popen(["unshare", "-n", "sh", "-c", script], stdout=subprocess.PIPE)
    assert popen.stdout
    try:
        assert popen.stdout.readline() == b"up\n"
        with namespaces.opened(proc.identity(popen.pid), "net") as opened:
            yield opened
    finally:
        popen.kill()
        popen.communicate()


class Pair:
    """A server and a client that are connected, from one address to another."""

    def __init__(self, stack: contextlib.ExitStack, network: int, version: int) -> None:
        self._network = network
        self._family = socket.AF_INET6 if version == 6 else socket.AF_INET
        here, there = PEERS[version]
        self.server = stack.enter_context(self._made())
        self.server.bind((there, 0))
        self.server.listen()
        self.client = stack.enter_context(self._made())
        self.client.bind((here, 0))
        self.client.connect(self.server.getsockname()[:2])
        self.accepted = stack.enter_context(self.server.accept()[0])

    def _made(self) -> socket.socket:
        return namespaces.within([self._network], lambda: socket.socket(self._family))

    def another(self, stack: contextlib.ExitStack) -> socket.socket:
        """A client that is connecting."""
        made = stack.enter_context(self._made())
        made.bind((self.client.getsockname()[0], 0))
        made.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            made.connect(self.server.getsockname()[:2])
        return made


def of_tcp(sock: socket.socket, at: int) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[at]


@pytest.mark.parametrize("version", [4, 6])
def test_who_is_kept_apart_loses_nothing_and_tries_at_its_usual_pace(
    network: int, version: int
) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(stack, network, version)
        with hold.apart(NAME, PEERS[version][:1], network=network) as held:
            pair.client.send(b"x")
            connecting = pair.another(stack)
            assert silent(pair.accepted)
            deadline = clock.Deadline.after(60)
            # Whoever hears nothing at all waits twice as long each time.
            assert clock.wait_until(lambda: of_tcp(pair.client, _RETRANSMITS_AT) >= 4, deadline)
            assert of_tcp(pair.client, _BACKOFF_AT) <= 1
            pair.accepted.send(b"y")  # from an address that is not held
            pair.client.settimeout(60)
            assert pair.client.recv(1) == b"y"
            pair.server.settimeout(0.1)
            with pytest.raises(TimeoutError):
                pair.server.accept()
            held.check()
            held.let_through()
            pair.accepted.settimeout(60)
            assert pair.accepted.recv(1) == b"x"
        pair.server.settimeout(60)
        stack.enter_context(pair.server.accept()[0])
        connecting.setblocking(True)
        assert connecting.getpeername() == pair.server.getsockname()
        assert namespaces.within([network], lambda: netfilter.tables(NAME)) == set()


def test_a_reset_is_heard_for_it_comes_only_once(network: int) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(stack, network, 4)
        with hold.apart(NAME, PEERS[4], network=network):
            linger_for_no_time = b"\1\0\0\0\0\0\0\0"
            pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_no_time)
            pair.client.close()
            pair.accepted.settimeout(60)
            with pytest.raises(ConnectionResetError):
                pair.accepted.recv(1)


def test_what_stays_within_the_namespace_is_held_if_asked(network: int) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(stack, network, 4)
        with hold.apart(NAME, [], loopback=True, network=network):
            pair.client.send(b"x")
            assert silent(pair.accepted)
        pair.accepted.settimeout(60)
        assert pair.accepted.recv(1) == b"x"


def test_nobody_to_keep_apart_makes_no_table(network: int) -> None:
    with hold.apart(NAME, [], network=network) as held:
        held.check()
        assert namespaces.within([network], lambda: netfilter.tables(NAME)) == set()
