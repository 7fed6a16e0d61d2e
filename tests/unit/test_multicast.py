"""Which of a process's sockets have joined a group of multicast."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys

import pytest

from agent.host import multicast

_LOOPBACK = 1


def join(sock: socket.socket, group: str) -> None:
    if ":" in group:
        request = socket.inet_pton(socket.AF_INET6, group) + struct.pack("=I", _LOOPBACK)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    else:
        # struct ip_mreqn: the group, an address, an interface.
        request = struct.pack("=4s4si", socket.inet_aton(group), bytes(4), _LOOPBACK)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)


@pytest.mark.parametrize(
    ("family", "group"),
    [
        (socket.AF_INET, "239.77.1.2"),
        (socket.AF_INET6, "ff05::77:1"),
        (socket.AF_INET6, "239.77.1.3"),
    ],
)
def test_a_group_is_named_while_a_socket_of_the_process_is_in_it(
    family: socket.AddressFamily, group: str
) -> None:
    before = multicast.joined(os.getpid())
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        join(sock, group)
        assert multicast.joined(os.getpid()) == sorted({*before, group})
    assert multicast.joined(os.getpid()) == before


def test_a_group_that_somebody_else_is_in_is_not() -> None:
    script = (
        "import socket, sys\n"
        "held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "print('there', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other,
    ):
        join(sock, "239.77.1.4")
        assert other.stdout
        assert other.stdout.readline() == b"there\n"
        assert "239.77.1.4" in multicast.joined(os.getpid())
        assert multicast.joined(other.pid) == []
