"""Members that are no longer there when their group is to be cut: the others go on, and it is said
who was missing.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.coordinator import checkpoint
from agent.coordinator.machine import State
from agent.engines.container.engine import ContainerEngine
from agent.host import proc
from agent.model.protocol import LEAVE_RUNNING
from tests.host import nodes
from tests.host.boxes import Box, Boxes
from tests.host.groups import GROUP, Group, Member, group_in, told
from tests.host.nodes import wait_for
from tests.host.test_container_network import echoing

# Counts until it is told that there is nothing more to do.
COUNTING = """
import json, os, time
number = 0
while not os.path.exists('/done'):
    number += 1
    print(json.dumps({'got': number, 'at': time.time()}), flush=True)
    time.sleep(0.01)
"""


@pytest.fixture
def group(boxes: Boxes, tmp_path: Path) -> Iterator[Group]:
    with echoing(), group_in(boxes, tmp_path) as made:
        yield made


@pytest.fixture
def members(group: Group) -> list[Member]:
    run = ("python3", "-c", COUNTING)
    found = [group.add("w-0-0", "a", "10.77.0.2", *run), group.add("w-0-1", "b", "10.77.0.3", *run)]
    for each in found:
        each.flows()
    return found


def finished(box: Box) -> None:
    """Its program ends as one whose work is done."""
    (*_, program) = (pid for pid in box.pids() if proc.stat(pid).comm == "python3")
    who = proc.identity(program)
    box.root("/done").touch()
    wait_for(lambda: not proc.alive(who))


@pytest.mark.parametrize("state", [State.PREPARING, State.QUIESCING])
def test_a_rank_that_finishes_first_fails_the_epoch_and_the_other_goes_on(
    group: Group, members: list[Member], state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, ending = members
    captured = ContainerEngine.capture

    def capture(self: ContainerEngine, pid: int, *rest: Any) -> Any:
        if state is State.PREPARING and pid == ending.box.pid:
            finished(ending.box)
        return captured(self, pid, *rest)

    monkeypatch.setattr(ContainerEngine, "capture", capture)

    def watch(now: State) -> None:
        if now is state is State.QUIESCING:
            finished(ending.box)

    with pytest.raises(errors.CkptError, match="w-0-1") as caught:
        dump(group, members, watch)
    assert caught.value.facts["member"] == "w-0-1"
    assert_goes_on(group, going)
    # Both pods' people hear of it; who it was that failed knows why.
    wait_for(lambda: [len(events_of(group, each)) for each in members] == [2, 1])
    events = {each.name: events_of(group, each) for each in members}
    assert [reason for reason, _ in events["w-0-0"]] == ["CheckpointFailed", "CheckpointCompleted"]
    assert "stopped for" in events["w-0-0"][1][1]
    ((reason, note),) = events["w-0-1"]
    assert reason == "CheckpointFailed"
    assert "the pod goes on: " in note
    assert "not by this pod" not in note


def test_a_pod_that_was_replaced_is_not_taken_for_the_one_that_was_meant(
    group: Group, members: list[Member]
) -> None:
    going, gone = members
    api, _ = group.around["b"]
    api.put(gone.box.name, nodes.NODE, containers=("main",))
    with pytest.raises(errors.Conflict, match=r"is another one now.* at w-0-1"):
        dump(group, members, lambda now: None)
    assert_goes_on(group, going)


def test_when_an_agent_is_silent_the_others_run_again_and_then_its_own(group: Group) -> None:
    run = ("python3", "-c", COUNTING)
    agent = group.agent_process("e")
    members = [
        group.add("w-0-0", "a", "10.77.0.2", *run),
        group.add("w-0-1", "e", "10.77.0.3", *run),
    ]
    agent.start()
    wait_for(lambda: agent.status("/readyz") == 200, 60)
    for each in members:
        each.flows()
    struck_s: list[float] = []

    def watch(now: State) -> None:
        if now is State.CAPTURING:
            assert agent.popen is not None
            agent.popen.send_signal(signal.SIGSTOP)
            struck_s.append(time.time())

    with pytest.raises(errors.CkptError, match="w-0-1") as caught:
        dump(group, members, watch)
    assert isinstance(caught.value, errors.Unreachable)
    for each in members:
        each.flows()
        # Not asserted: how long it takes is the machine's affair, too.
        after_s = next(line["at"] for line in each.lines if line["at"] > struck_s[0]) - struck_s[0]
        print(f"{each.name} ran {after_s:.2f} s after the agent of w-0-1 was stopped")
    # Which the kernel has ended.
    agent.kill()
    agent.start()
    wait_for(lambda: agent.status("/readyz") == 200, 60)
    dump(group, members, lambda now: None)
    assert len(group.epochs()) == 1
    del group.clients["e"]


def events_of(group: Group, member: Member) -> list[tuple[str, str]]:
    """What was told of a pod: reasons with notes."""
    api, _ = group.around[member.agent]
    found = [each for each in api.events if each["regarding"]["uid"] == member.uid]
    return [(each["reason"], each["note"]) for each in found]


def dump(group: Group, members: list[Member], watch: Any) -> None:
    checkpoint.run(
        group.session,
        GROUP,
        told(members),
        LEAVE_RUNNING,
        facts={},
        now_s=time.time(),
        watch=watch,
    )


def assert_goes_on(group: Group, member: Member) -> None:
    """Nothing of the epoch is left, and the next one of who is left succeeds."""
    member.flows()
    for node in group.nodes.values():
        wait_for(lambda node=node: not node.operations.running())  # type: ignore[misc]
    assert group.epochs() == []
    done = checkpoint.run(
        group.session, GROUP, told([member]), LEAVE_RUNNING, facts={}, now_s=time.time()
    )
    assert [each.name for each in done.members] == [member.name]
    member.flows()
    group.boxes.assert_clean()
