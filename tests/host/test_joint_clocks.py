"""A group whose machines do not agree on the time of day: an agent, its coordinator and the other
agents are minutes apart. What is told by a clock orders nothing and keeps nobody out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.coordinator import checkpoint, restore
from agent.model.protocol import EVACUATE, LEAVE_RUNNING, Course
from tests.host.boxes import Boxes
from tests.host.groups import GROUP, PROGRAM, Group, Member, group_in, told
from tests.host.nodes import wait_for
from tests.host.test_container_network import echoing

APART_S = 600.0
# The agent that ships, on a machine whose clock is behind: all of it reads the time there.
BEHIND = f"""
import time
from agent.host import clock
clock.wall_s = lambda: time.time() - {APART_S}
from agent.cli.main import main
main()
"""


@pytest.fixture
def group(boxes: Boxes, tmp_path: Path) -> Iterator[Group]:
    with echoing(), group_in(boxes, tmp_path) as made:
        yield made


def test_epochs_are_taken_ordered_and_restored_whatever_the_clocks_say(group: Group) -> None:
    agent = group.agent_process("behind")
    agent.program = [sys.executable, "-c", BEHIND]
    run = ("python3", "-c", PROGRAM)
    members = [
        group.add("w-0-0", "a", "10.77.0.2", *run, "serve", "10.77.0.2"),
        group.add("w-0-1", "behind", "10.77.0.3", *run, "send", "10.77.0.2"),
    ]
    new = [
        group.add("w-0-0", "behind", "10.77.0.4"),
        group.add("w-0-1", "a", "10.77.0.5"),
    ]
    agent.start()
    wait_for(lambda: agent.status("/readyz") == 200, 60)
    for each in members:
        each.flows()
    # Named by the one whose clock is right, for a coordinator that is ahead; then the other way.
    first = dumped(group, members, LEAVE_RUNNING, "a", APART_S)
    for each in members:
        each.flows()
    second = dumped(group, members, EVACUATE, "behind", -2 * APART_S)
    assert group.epochs() == [first, second]
    moved = {old.address: there.address for old, there in zip(members, new, strict=True)}
    restore.run(group.session, GROUP, second, told(new), moved, now_s=time.time() + APART_S)
    for before, after in zip(members, new, strict=True):
        after.flows(10)
        assert after.lines[0]["got"] > before.lines[-1]["got"]


def dumped(
    group: Group, members: list[Member], course: Course, named_by: str, ahead_s: float
) -> str:
    """The epoch that a coordinator takes whose clock is ``ahead_s`` ahead."""
    names = sorted(group.clients, key=lambda name: name != named_by)
    group.clients = {name: group.clients[name] for name in names}
    done = checkpoint.run(
        group.session, GROUP, told(members), course, facts={}, now_s=time.time() + ahead_s
    )
    return done.image.epoch
