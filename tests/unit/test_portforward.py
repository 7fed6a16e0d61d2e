"""Port-forward through an API server that speaks the real protocol."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from agent.kube import connection, portforward
from tests.fakes import apiserver
from tests.fakes.authority import Authority


@pytest.fixture
def authority() -> Authority:
    return Authority("cluster")


@pytest.fixture
def api(authority: Authority, tmp_path: pathlib.Path) -> Iterator[apiserver.ApiServer]:
    with apiserver.running(authority, tmp_path) as made:
        made.add_pod("agent-1", "n1", namespace="ckpt-agent")
        yield made


@pytest.fixture
def caller(
    api: apiserver.ApiServer, authority: Authority, tmp_path: pathlib.Path
) -> Iterator[connection.Connection]:
    made = connection.connect(api.kubeconfig(tmp_path / "config", authority))
    with contextlib.closing(made):
        yield made


@contextlib.contextmanager
def backend(
    api: apiserver.ApiServer, serve: Callable[[socket.socket], None]
) -> Iterator[list[BaseException]]:
    """A server behind port 7443 of the pod."""
    problems: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    inner, _ = listener.accept()
                    with inner:
                        try:
                            serve(inner)
                        except OSError as exc:
                            problems.append(exc)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        api.backends["agent-1", 7443] = f"127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield problems
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(30)


@contextlib.contextmanager
def dialled(caller: connection.Connection, pod: str = "agent-1") -> Iterator[socket.socket]:
    with (
        portforward.forward(caller, "ckpt-agent", pod, 7443) as made,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.settimeout(30)
        local.connect(made.path)
        yield local


def read_all(local: socket.socket) -> bytes:
    return b"".join(iter(lambda: local.recv(1 << 16), b""))


def test_bytes_flow_both_ways_at_once_beyond_every_buffer(
    api: apiserver.ApiServer, caller: connection.Connection
) -> None:
    def echo(inner: socket.socket) -> None:
        while part := inner.recv(1 << 16):
            inner.sendall(part)

    sent = bytes(range(256)) * (32 << 10)  # 8 MiB
    with backend(api, echo), dialled(caller) as local:
        writer = threading.Thread(target=local.sendall, args=(sent,))
        writer.start()
        got = bytearray()
        while len(got) < len(sent):
            part = local.recv(1 << 16)
            assert part
            got += part
        writer.join()
    assert got == sent


def test_what_was_sent_before_the_pods_end_closes_is_delivered(
    api: apiserver.ApiServer, caller: connection.Connection
) -> None:
    content = b"x" * (4 << 20)

    def send(inner: socket.socket) -> None:
        inner.sendall(content)

    with backend(api, send), dialled(caller) as local:
        assert read_all(local) == content


def test_a_local_end_that_stopped_writing_still_reads(
    api: apiserver.ApiServer, caller: connection.Connection
) -> None:
    may_answer = threading.Event()

    def answer(inner: socket.socket) -> None:
        assert inner.recv(100) == b"question"
        may_answer.wait(30)
        inner.sendall(b"a" * (1 << 20))

    with backend(api, answer), dialled(caller) as local:
        local.sendall(b"question")
        local.shutdown(socket.SHUT_WR)
        may_answer.set()
        assert len(read_all(local)) == 1 << 20


def test_a_slow_reader_is_not_read_ahead_without_bound(
    api: apiserver.ApiServer, caller: connection.Connection
) -> None:
    stuck = threading.Event()

    def send(inner: socket.socket) -> None:
        inner.settimeout(1)
        try:
            for _ in range(4096):  # 256 MiB: more than any kernel buffers on the way
                inner.sendall(bytes(64 << 10))
        except TimeoutError:
            stuck.set()

    with backend(api, send), dialled(caller):
        assert stuck.wait(30)


def test_the_socket_is_for_the_caller_only_and_gone_afterwards(
    api: apiserver.ApiServer, caller: connection.Connection
) -> None:
    with portforward.forward(caller, "ckpt-agent", "agent-1", 7443) as made:
        folder = pathlib.Path(made.path).parent
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
    assert not [each for each in threading.enumerate() if "_serve" in each.name]


def test_leaving_ends_a_connection_that_still_flows(
    api: apiserver.ApiServer, caller: connection.Connection
) -> None:
    began, ended = threading.Event(), threading.Event()

    def hold(inner: socket.socket) -> None:
        inner.recv(1)
        began.set()
        inner.recv(1)
        ended.set()

    with backend(api, hold):
        with dialled(caller) as local:
            local.sendall(b"1")
            assert began.wait(30)
        assert ended.wait(30)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("port", "connection refused"),
        ("pod", "no pod ckpt-agent/agent-2"),
        ("right", "user u cannot create pods/portforward"),
        ("token", "does not know the caller"),
    ],
)
def test_why_a_connection_could_not_be_made_is_told(
    api: apiserver.ApiServer, caller: connection.Connection, change: str, reason: str
) -> None:
    if change == "right":
        api.denied.add(("GET", "portforward"))
    if change == "token":
        api.token = "another"
    pod = "agent-2" if change == "pod" else "agent-1"
    with (
        portforward.forward(caller, "ckpt-agent", pod, 7443) as made,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.settimeout(30)
        local.connect(made.path)
        with contextlib.suppress(ConnectionResetError):
            assert read_all(local) == b""
        assert reason in made.reason
