"""The hold keeps named connections silent, others open, and loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.host import hold, namespaces, netfilter, nftables, proc

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
            other_b.settimeout(60)
            assert other_b.recv(1) == b"z"
        for sock, expected in ((a, b"y"), (b, b"x")):
            sock.settimeout(60)
            assert sock.recv(1) == expected
    assert netfilter.tables(NAME) == set()


def test_a_packet_meets_no_more_rules_where_many_connections_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each that arrives at the machine, whoever's it is, passes all of them."""
    rules: list[str] = []
    add_rule = nftables.add_rule

    def noted(table: str, chain: str, expressions: Iterable[bytes]) -> nftables.Change:
        rules.append(table)
        return add_rule(table, chain, expressions)

    monkeypatch.setattr(nftables, "add_rule", noted)
    others = [
        hold.Connection(address, 80, address, 1024 + number)
        for address in ("127.0.0.2", "fd00::1")
        for number in range(3000)
    ]
    with pair("127.0.0.1") as (a, b), pair("127.0.0.1") as (other_a, other_b):
        with hold.held(NAME, [*others, ends(b)]):
            assert len(rules) == 2
            a.send(b"x")
            assert silent(b)
            # The same ports the other way round, and another connection.
            b.send(b"y")
            other_a.send(b"z")
            for sock, expected in ((a, b"y"), (other_b, b"z")):
                sock.settimeout(60)
                assert sock.recv(1) == expected
        b.settimeout(60)
        assert b.recv(1) == b"x"


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
        accepted.settimeout(60)
        assert accepted.recv(1) == b"x"


def test_what_is_let_through_flows_before_the_hold_has_ended() -> None:
    with pair("127.0.0.1") as (a, b):
        with hold.held(NAME, [ends(a), ends(b)]) as held:
            a.send(b"x")
            assert silent(b)
            held.let_through()
            b.settimeout(60)
            assert b.recv(1) == b"x"
            assert NAME in netfilter.tables(NAME)
        assert not netfilter.tables(NAME)


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


OWNER = """
import sys
from agent.host import hold
hold.LEASE_S = 5.0
local, port, remote, other = sys.argv[1:]
with hold.held({name!r}, [hold.Connection(local, int(port), remote, int(other))]) as held:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.check()
        except Exception as exc:
            print(type(exc).__name__, flush=True)
        else:
            print("silent", flush=True)
"""


@contextlib.contextmanager
def owner(connection: hold.Connection) -> Iterator[subprocess.Popen[str]]:
    """Another program that holds a connection, with leases of five seconds."""
    words = [str(each) for each in dataclasses.astuple(connection)]
    popen = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(name=NAME), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert popen.stdin
    assert popen.stdout
    try:
        assert popen.stdout.readline() == "held\n"
        yield popen
    finally:
        popen.kill()
        popen.communicate()
        hold.release(NAME)


def asked(popen: subprocess.Popen[str]) -> str:
    """What the owner says of its hold."""
    assert popen.stdin
    assert popen.stdout
    popen.stdin.write("?\n")
    popen.stdin.flush()
    return popen.stdout.readline().strip()


def test_a_hold_lasts_as_long_as_its_owner_and_then_seconds_only() -> None:
    with pair("127.0.0.1") as (a, b), owner(ends(b)) as popen:
        a.send(b"x")
        b.settimeout(8)
        with pytest.raises(TimeoutError):
            b.recv(1)
        assert asked(popen) == "silent"
        popen.kill()
        b.settimeout(60)
        assert b.recv(1) == b"x"
        assert netfilter.tables(NAME) == {NAME}


def test_an_owner_that_stood_still_learns_that_the_kernel_has_let_go() -> None:
    with pair("127.0.0.1") as (a, b), owner(ends(b)) as popen:
        os.kill(popen.pid, signal.SIGSTOP)
        a.send(b"x")
        b.settimeout(60)
        assert b.recv(1) == b"x"
        os.kill(popen.pid, signal.SIGCONT)
        assert asked(popen) == "DeadlineExceeded"


def test_a_hold_ends_at_its_limit_though_its_owner_lives() -> None:
    with pair("127.0.0.1") as (a, b), hold.held(NAME, [ends(b)], limit_s=5.0) as held:
        a.send(b"x")
        assert silent(b)
        held.check()
        b.settimeout(60)
        assert b.recv(1) == b"x"
        with pytest.raises(errors.DeadlineExceeded):
            held.check()


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
