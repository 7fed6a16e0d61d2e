"""Sockets of a process are found with their addresses, states and peers."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from agent.host import sockets
from agent.host.clock import Deadline, wait_until


def inode(of: socket.socket) -> int:
    return os.fstat(of.fileno()).st_ino


def looked_up(*held: socket.socket) -> list[sockets.Socket]:
    found = {one.inode: one for one in sockets.of(os.getpid(), map(inode, held))}
    return [found[inode(one)] for one in held]


def test_the_two_ends_of_a_pair_name_each_other() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        first, second = looked_up(one, other)
    assert (first.kind, first.state) == ("unix-seqpacket", "established")
    assert first.peer_inode == second.inode
    assert second.peer_inode == first.inode


def test_a_listener_and_both_ends_of_a_connection_show_their_addresses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        with socket.create_connection((host, port)) as client, server.accept()[0] as accepted:
            listening, near, far = looked_up(server, client, accepted)
            local = client.getsockname()
    assert (listening.state, listening.local) == ("listen", f"127.0.0.1:{port}")
    assert (near.state, near.peer) == ("established", f"127.0.0.1:{port}")
    assert far.peer == f"{local[0]}:{local[1]}"


@pytest.mark.parametrize("door", ["0.0.0.0", "127.0.0.1", "::"])
def test_what_came_in_and_was_not_accepted_is_found_at_its_door(door: str) -> None:
    family = socket.AF_INET6 if ":" in door else socket.AF_INET
    with (
        socket.create_server((door, 0), family=family, dualstack_ipv6=":" in door) as server,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        port = server.getsockname()[1]

        def waiting() -> list[tuple[str, str]]:
            return sockets.unaccepted(os.getpid(), [inode(server)])

        assert waiting() == []
        with (
            socket.create_connection(("127.0.0.1", port)) as client,
            socket.create_connection(("127.0.0.1", port)) as left,
            socket.create_connection(other.getsockname()),
        ):
            left.close()
            # Who connected goes on before the listener has heard that.
            assert wait_until(lambda: len(waiting()) == 2, Deadline.after(30))
            near = {f"127.0.0.1:{end.getsockname()[1]}" for end in (client,)}
            assert near < {peer for _, peer in waiting()}
            assert [local for local, _ in waiting()] == [f"127.0.0.1:{port}"] * 2
            with server.accept()[0], server.accept()[0]:
                assert waiting() == []


def test_what_was_closed_before_all_of_it_was_heard_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        client = socket.create_connection(address)
        with server.accept()[0]:
            both = f"127.0.0.1:{client.getsockname()[1]}", f"127.0.0.1:{address[1]}"
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(bytes(1 << 16))
            assert both not in sockets.closing(os.getpid())
            client.close()
            assert both in sockets.closing(os.getpid())


def test_addresses_of_both_families_are_written_as_people_write_them() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        (found,) = looked_up(server)
        assert found.kind == "tcp6"
        assert found.local == f"[::1]:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("[::ffff:10.1.0.5]:80", "10.1.0.5:80"),
        ("[::ffff:a01:5]:80", "10.1.0.5:80"),
        ("[::ffff:0:1]:80", "0.0.0.1:80"),
        ("[fd00::5]:80", "[fd00::5]:80"),
        ("[::ffff:1:a01:5]:80", "[::ffff:1:a01:5]:80"),
        ("[::]:80", "[::]:80"),
        ("10.1.0.5:80", "10.1.0.5:80"),
    ],
)
def test_ipv4_is_shown_as_ipv4_also_where_an_ipv6_socket_uses_it(address: str, shown: str) -> None:
    assert sockets.unmapped(address) == shown


def test_both_ends_of_a_connection_over_both_families_are_told_alike() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        with socket.create_connection(address) as client, server.accept()[0] as accepted:
            near, far = looked_up(client, accepted)
    assert near.kind == "tcp"
    assert far.kind == "tcp6"
    assert near.connection is not None
    assert far.connection == near.connection[::-1]


def test_an_abstract_name_is_shown_with_an_at_sign() -> None:
    name = f"ckpt-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as named:
        named.bind(f"\0{name}")
        named.listen()
        (found,) = looked_up(named)
    assert (found.kind, found.state, found.local) == ("unix-stream", "listen", f"@{name}")
    assert found.peer_inode == 0


def test_other_sockets_of_the_host_are_not_listed() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert [found.inode for found in sockets.of(os.getpid(), [inode(one)])] == [inode(one)]
    assert sockets.of(os.getpid(), []) == []


def test_the_protocol_of_a_descriptor_is_the_kernels_name_for_it() -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
        assert sockets.protocol(os.getpid(), tcp.fileno()) == "TCP"
        assert sockets.protocol(os.getpid(), udp.fileno()) == "UDPv6"
    assert sockets.protocol(os.getpid(), 10**6) == ""
