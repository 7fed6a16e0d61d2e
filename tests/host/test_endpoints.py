"""What sockets tell of themselves is what the kernel's tables say of them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from agent.host import endpoints, proc, sockets

# TEST-NET-1 (RFC 5737): nobody answers.
_NOBODY = "192.0.2.1", 9


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """A socket of every state that a descriptor can have for longer than an instant."""
    with contextlib.ExitStack() as stack:
        four = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        six = stack.enter_context(
            socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        )
        for host, server in (("127.0.0.1", four), ("127.0.0.1", six), ("::1", six)):
            port = server.getsockname()[1]
            stack.enter_context(socket.create_connection((host, port)))
            stack.enter_context(server.accept()[0])
        # One end of this is in close-wait.
        left = stack.enter_context(socket.create_connection(four.getsockname()))
        four.accept()[0].close()
        assert left.recv(1) == b""
        stack.enter_context(socket.socket())  # closed, and in no table
        stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).bind(("", 0))
        connecting = stack.enter_context(socket.socket())
        connecting.setblocking(False)
        with contextlib.suppress(BlockingIOError, OSError):
            connecting.connect(_NOBODY)
        yield


def test_sockets_tell_of_themselves_what_the_tables_say() -> None:
    with opened():
        files = proc.open_files(os.getpid())
        table = sockets.table(os.getpid())
        wanted = {
            file.inode: table[file.inode]
            for file in files
            if file.inode in table and table[file.inode].tcp
        }
        assert endpoints.tcp(os.getpid(), files) == wanted
        assert {"listen", "established", "close-wait"} <= {each.state for each in wanted.values()}
        others = sockets.without_tcp(os.getpid())
    own = {file.inode for file in files}
    assert {each.kind for inode, each in others.items() if inode in own} == {"udp"}
    assert not any(each.tcp for each in others.values())
    assert endpoints.tcp(os.getpid(), files) == {}


def test_of_a_process_that_has_ended_nothing_is_told() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert list(endpoints.of_tree([child])) == []
