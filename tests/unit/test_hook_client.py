"""A hook over gRPC: what it is told, and peers that do not behave."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable

import pytest
from google.protobuf import json_format

from agent import errors
from agent.host import clock
from agent.model.hooks import Outcome, Phase, Told
from agent.model.pods import Placement
from agent.rpc import hookclient

NOW = Placement("job", "u2", "n2", ("10.0.0.2", "fd00::2"))
WAS = Placement("job", "u1", "n1", ("10.0.0.1",))


def test_a_message_has_what_a_request_has_for_every_phase_and_outcome() -> None:
    for phase in Phase:
        for outcome in (None, *Outcome):
            for was in (None, WAS):
                told = Told("ask", phase, "team", NOW, outcome, "job@e", was)
                found = json_format.MessageToDict(hookclient.message(told))
                assert found.pop("phase") == f"HOOK_PHASE_{phase.name}"
                named = f"HOOK_OUTCOME_{outcome.name}" if outcome else None
                assert found.pop("outcome", None) == named
                document = told.document()
                del document["phase"], document["outcome"]
                assert found == {key: each for key, each in document.items() if each is not None}


# Frames of HTTP/2 (RFC 9113): empty SETTINGS, and a PING that has to be answered.
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
PING = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0, *bytes(8)])


def silent(peer: socket.socket) -> None:
    while peer.recv(1 << 16):
        pass


def floods(peer: socket.socket) -> None:
    peer.sendall(SETTINGS)
    while True:
        peer.sendall(PING * 1000)


def garbles(peer: socket.socket) -> None:
    while True:
        peer.sendall(os.urandom(1 << 16))


def hangs_up(peer: socket.socket) -> None:
    peer.recv(1)


@pytest.mark.parametrize(
    ("behaves", "ends", "within_s"),
    [
        (silent, errors.DeadlineExceeded, 0.5),
        (floods, errors.DeadlineExceeded, 0.5),
        (garbles, errors.Unreachable, 60.0),
        (hangs_up, errors.Unreachable, 60.0),
    ],
)
def test_a_peer_that_does_not_behave_costs_its_hook_and_is_let_go_of(
    behaves: Callable[[socket.socket], None], ends: type[errors.CkptError], within_s: float
) -> None:
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs, contextlib.suppress(OSError):
            behaves(theirs)

    peer = threading.Thread(target=run)
    peer.start()
    told = Told("ask", Phase.PRE, "team", NOW)
    with pytest.raises(ends):
        hookclient.call(ours, told, clock.Deadline.after(within_s))
    peer.join(30)
    assert not peer.is_alive()
    assert ours.fileno() == -1
