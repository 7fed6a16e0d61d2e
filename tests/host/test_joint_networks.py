"""Members of a group that speak IPv6 or UDP, that joined a group of multicast, or that have not yet
accepted who calls them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from agent.model.protocol import LEAVE_RUNNING
from agent.rpc import epochclient
from tests.host.boxes import Boxes
from tests.host.groups import PROGRAM, Group, Member, group_in
from tests.host.nodes import wait_for
from tests.host.test_container_network import echoing

# A connected socket sends numbers to the other pod, another one gets what the other pod sends.
DATAGRAMS = """
import json, socket, sys, threading, time
own, peer = sys.argv[1:]
taking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
taking.bind(('', 7001))
giving = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
giving.bind((own, 7002))
giving.connect((peer, 7001))
def send():
    n = 0
    while True:
        n += 1
        try:
            giving.send(b'%d' % n)
        except ConnectionRefusedError:  # nobody there yet
            pass
        time.sleep(0.01)
threading.Thread(target=send, daemon=True).start()
while True:
    data, sender = taking.recvfrom(100)
    ends = [giving.getsockname()[0], giving.getpeername()[0], sender[0]]
    print(json.dumps({'got': int(data), 'at': time.time(), 'ends': ends}), flush=True)
"""

# Asks a server that accepts when it is told to, and waits for its greeting.
UNHEARD = """
import json, os, socket, sys, time
role, address = sys.argv[1:]
def say(**more):
    print(json.dumps({'got': 0, 'at': time.time(), **more}), flush=True)
if role == 'serve':
    server = socket.create_server((address, 7000))
else:
    while True:
        try:
            sock = socket.create_connection((address, 7000))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
say(up=True)
if role == 'serve':
    while not os.path.exists('/accept'):
        time.sleep(0.05)
        say()
    heard = server.accept()[0]
    say(accepted=True)
    while not os.path.exists('/greet'):
        time.sleep(0.05)
        say()
    heard.sendall(b'x')
    time.sleep(1000)
try:
    say(heard=sock.recv(1).decode())
except OSError as exc:
    say(heard=type(exc).__name__)
while True:
    time.sleep(0.05)
    say()
"""


@pytest.fixture
def group(boxes: Boxes, tmp_path: Path) -> Iterator[Group]:
    with echoing(), group_in(boxes, tmp_path) as made:
        yield made


@contextlib.contextmanager
def moved(
    group: Group,
    members: list[Member],
    *addresses: str,
    lost: Mapping[str, object] | None = None,
    named: Callable[[epochclient.Epoch], None] = lambda epoch: None,
) -> Iterator[list[Member]]:
    """The group at other addresses, each pod at the agent that had the other one."""
    epoch = group.dump(members, named=named).image.epoch
    for each in members:
        group.remove(each)
    pairs = list(zip(members, reversed(members), addresses, strict=True))
    new = [group.add(before.name, other.agent, address) for before, other, address in pairs]
    there = {before.address: after.address for before, after in zip(members, new, strict=True)}
    done = group.restore(epoch, new, there)
    assert done.lost == (lost or {})
    yield new
    for each in new:
        group.remove(each)


def test_a_stream_over_ipv6_goes_on_at_other_addresses(group: Group) -> None:
    run = ("python3", "-c", PROGRAM)
    members = [
        group.add("w-0-0", "a", "fd77::2", *run, "serve", "fd77::2"),
        group.add("w-0-1", "b", "fd77::3", *run, "send", "fd77::2"),
    ]
    for each in members:
        each.flows()
    # Held and let go where it is, then at other addresses.
    done = group.dump(members, LEAVE_RUNNING)
    assert (done.connections, done.leaving) == (1, ())
    for each in members:
        each.flows()
    with moved(group, members, "fd77::4", "fd77::5") as new:
        for before, after in zip(members, new, strict=True):
            after.flows(10)
            assert after.lines[0]["got"] > before.lines[-1]["got"]


def test_datagrams_arrive_at_other_addresses_and_come_from_them(group: Group) -> None:
    run = ("python3", "-c", DATAGRAMS)
    members = [
        group.add("w-0-0", "a", "10.77.0.2", *run, "10.77.0.2", "10.77.0.3"),
        group.add("w-0-1", "b", "10.77.0.3", *run, "10.77.0.3", "10.77.0.2"),
    ]
    for each in members:
        each.flows()
    with moved(group, members, "10.77.0.4", "10.77.0.5") as new:
        for before, after, other in zip(members, new, reversed(new), strict=True):
            after.flows(10)
            # What was sent before the other's address was found may come after what was sent then.
            assert after.lines[-1]["got"] > max(line["got"] for line in before.lines)
            assert min(line["got"] for line in after.lines) > min(
                line["got"] for line in before.lines
            )
            # The first line may have been made before the dump.
            last: dict[str, object] = {**after.lines[-1]}
            assert last["ends"] == [after.address, other.address, other.address]


def test_who_was_not_accepted_yet_hears_that_nobody_is_there(group: Group) -> None:
    """And does not wait for ever for an answer to what its server never saw."""
    run = ("python3", "-c", UNHEARD)
    members = [
        group.add("w-0-0", "a", "10.77.0.2", *run, "serve", "10.77.0.2"),
        group.add("w-0-1", "b", "10.77.0.3", *run, "call", "10.77.0.2"),
    ]
    members[0].flows()
    wait_for(lambda: len(members[1].lines) == 1)
    tried: list[str] = []
    with moved(
        group,
        members,
        *("10.77.0.4", "10.77.0.5"),
        lost={"w-0-1": ("10.77.0.2:7000",)},
        named=lambda epoch: tried.append(epoch.name),
    ) as new:
        new[0].flows()
        wait_for(lambda: len(new[1].lines) > 3)
        first: dict[str, object] = {**new[1].lines[0]}
        assert first["heard"] in ("ConnectionResetError", "ConnectionAbortedError")
    # The cut was tried again before that was put up with.
    assert len(tried) == 3
    assert group.epochs() == tried[-1:]


def test_a_cut_is_tried_again_if_it_would_lose_who_was_not_accepted_yet(group: Group) -> None:
    run = ("python3", "-c", UNHEARD)
    server, client = members = [
        group.add("w-0-0", "a", "10.77.0.2", *run, "serve", "10.77.0.2"),
        group.add("w-0-1", "b", "10.77.0.3", *run, "call", "10.77.0.2"),
    ]
    wait_for(lambda: len(client.lines) == 1)
    tried: list[str] = []

    def named(epoch: epochclient.Epoch) -> None:
        tried.append(epoch.name)
        if len(tried) == 2:  # both go on meanwhile
            (server.box.rootfs / "accept").touch()
            wait_for(lambda: any("accepted" in line for line in server.lines))

    with moved(group, members, "10.77.0.4", "10.77.0.5", named=named) as new:
        (new[0].box.rootfs / "greet").touch()
        wait_for(lambda: bool(new[1].lines))
        heard: dict[str, object] = {**new[1].lines[0]}
        assert heard["heard"] == "x"
    assert group.epochs() == tried[1:]
    assert len(tried) == 2
