"""The hold keeps named connections silent, others open, and loses nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from agent.host import hold, namespaces, netfilter, proc

NAME = "ckpt-agent-test-hold"


@contextlib.contextmanager
def pair(address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        port = server.getsockname()[1]
        target = "127.0.0.1" if address == "::" else address
        with socket.create_connection((target, port)) as client:
            accepted = server.accept()[0]
            with accepted:
                yield client, accepted


def ends(sock: socket.socket) -> hold.Connection:
    local, remote = sock.getsockname(), sock.getpeername()
    return hold.Connection(local[0], local[1], remote[0], remote[1])


def silent(sock: socket.socket) -> bool:
    sock.settimeout(0.3)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_what_is_sent_while_held_arrives_after_the_release(address: str) -> None:
    with pair(address) as (a, b), pair(address) as (other_a, other_b):
        with hold.held(NAME, [ends(a), ends(b)]):
            a.send(b"x")
            b.send(b"y")
            other_a.send(b"z")
            assert silent(a)
            assert silent(b)
            other_b.settimeout(5)
            assert other_b.recv(1) == b"z"
        for sock, expected in ((a, b"y"), (b, b"x")):
            sock.settimeout(5)
            assert sock.recv(1) == expected
    assert netfilter.tables(NAME) == set()


def test_an_end_that_sees_its_peer_as_a_mapped_address_is_held_too() -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        )
        target = ("127.0.0.1", server.getsockname()[1])
        client = stack.enter_context(socket.create_connection(target))
        accepted = stack.enter_context(server.accept()[0])
        assert accepted.getpeername()[0].startswith("::ffff:")
        with hold.held(NAME, [ends(accepted)]):
            client.send(b"x")
            assert silent(accepted)
        accepted.settimeout(5)
        assert accepted.recv(1) == b"x"


def test_what_a_dead_owner_left_is_released_by_name() -> None:
    with contextlib.ExitStack() as left:
        left.enter_context(hold.held(NAME, [hold.Connection("127.0.0.1", 1, "127.0.0.1", 2)]))
        assert hold.release(NAME)
        assert not hold.release(NAME)


def test_an_error_inside_releases() -> None:
    seen: list[set[str]] = []
    with contextlib.suppress(KeyError), hold.held(NAME, [hold.Connection("::1", 1, "::1", 2)]):
        seen.append(netfilter.tables(NAME))
        raise KeyError
    assert seen == [{NAME}]
    assert netfilter.tables(NAME) == set()


def test_the_kernel_ends_a_hold_whose_owner_has_died() -> None:
    with pair("127.0.0.1") as (a, b), contextlib.ExitStack() as left:
        left.enter_context(hold.held(NAME, [ends(b)], limit_s=1.5))
        a.send(b"x")
        assert silent(b)
        b.settimeout(10)
        assert b.recv(1) == b"x"
        assert netfilter.tables(NAME) == {NAME}


def test_a_hold_in_another_network_outlives_its_last_process() -> None:
    popen = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
    try:
        here = proc.namespaces(os.getpid())["net"]
        deadline = time.monotonic() + 10
        while proc.namespaces(popen.pid)["net"] == here:
            assert time.monotonic() < deadline
        who = proc.identity(popen.pid)
        with namespaces.opened(who, "net") as network:
            with hold.held(NAME, [hold.Connection("::1", 1, "::1", 2)], network=network):
                assert namespaces.within([network], lambda: netfilter.tables(NAME)) == {NAME}
                assert netfilter.tables(NAME) == set()
                popen.kill()
                popen.wait()
            assert namespaces.within([network], lambda: netfilter.tables(NAME)) == set()
    finally:
        popen.kill()
        popen.wait()
