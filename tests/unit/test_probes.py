"""What a kubelet asks is answered, whatever others do to the port."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator

import pytest

from agent import errors
from agent.host.probes import Probes


class State:
    ready = False


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def probes(state: State) -> Iterator[Probes]:
    found = Probes(0, lambda: state.ready)
    found.start()
    yield found
    found.close()


def ask(probes: Probes, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", probes.port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_it_lives_before_it_is_ready(probes: Probes, state: State) -> None:
    assert ask(probes, "/livez") == (200, b"")
    assert ask(probes, "/readyz") == (503, b"")
    state.ready = True
    assert ask(probes, "/readyz") == (200, b"")
    state.ready = False
    assert ask(probes, "/readyz") == (503, b"")


def test_nothing_else_is_answered(probes: Probes) -> None:
    assert ask(probes, "/") == (404, b"")
    assert ask(probes, "/livez/../readyz") == (404, b"")


def test_connections_that_say_nothing_hold_up_nobody(probes: Probes) -> None:
    silent = [socket.create_connection(("127.0.0.1", probes.port)) for _ in range(30)]
    try:
        assert ask(probes, "/livez") == (200, b"")
    finally:
        for each in silent:
            each.close()


def test_a_port_that_is_taken_is_told(probes: Probes) -> None:
    with pytest.raises(errors.EnvironmentUnfit, match=str(probes.port)):
        Probes(probes.port, lambda: True)
