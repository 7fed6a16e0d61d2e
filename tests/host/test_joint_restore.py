"""A group of pods comes back at one instant in other pods with other addresses, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator

import pytest

from agent import errors
from agent.coordinator.machine import State
from agent.engines.container import holding, inside
from agent.host import proc
from agent.model.protocol import RESTORE, Answer, Decision, Said, Step, Told
from agent.rpc import epochclient
from tests.host.boxes import Boxes, boxes_in
from tests.host.groups import GROUP, PROGRAM, Group, Member, group_in
from tests.host.nodes import wait_for
from tests.host.test_container_network import OUTSIDE, echoing


class _DiedError(Exception):
    """The coordinator is gone."""


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    with boxes_in(tmp_path_factory.mktemp("group")) as made:
        yield made


@dataclasses.dataclass
class Dumped:
    """Two pods with a stream of numbers between them, of which the first also talked to somebody
    outside, dumped at one instant and ended.
    """

    group: Group
    epoch: str
    members: list[Member]
    lost: str
    next_address: int = 4


@pytest.fixture(scope="module")
def dumped(boxes: Boxes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dumped]:
    run = ("python3", "-c", PROGRAM)
    with echoing() as port, group_in(boxes, tmp_path_factory.mktemp("agents")) as group:
        serve = ("serve", "10.77.0.2", OUTSIDE, str(port))
        members = [
            group.add("w-0-0", "a", "10.77.0.2", *run, *serve),
            group.add("w-0-1", "b", "10.77.0.3", *run, "send", "10.77.0.2"),
        ]
        for each in members:
            each.flows()
        epoch = group.dump(members).image.epoch
        for each in members:
            group.remove(each)
        yield Dumped(group, epoch, members, f"{OUTSIDE}:{port}")


@dataclasses.dataclass
class Moving:
    """The dumped group, and placeholders for it with addresses that nobody had before."""

    dumped: Dumped
    new: list[Member]

    @property
    def group(self) -> Group:
        return self.dumped.group

    @property
    def moved(self) -> dict[str, str]:
        pairs = zip(self.dumped.members, self.new, strict=True)
        return {old.address: new.address for old, new in pairs}

    def restore(self, *, die_at: State | None = None, again: bool = True) -> None:
        def watch(state: State) -> None:
            if state is die_at:
                raise _DiedError

        done = self.group.restore(self.dumped.epoch, self.new, self.moved, watch=watch, again=again)
        assert done.lost == {"w-0-0": (self.dumped.lost,)}

    def goes_on(self) -> None:
        """The stream flows between the new pods, and nothing of it was lost or came twice."""
        for before, after in zip(self.dumped.members, self.new, strict=True):
            after.flows(10)
            assert after.lines[0]["got"] > before.lines[-1]["got"]

    def waits(self) -> None:
        """Nothing of the image is in the placeholders, or of an operation on their nodes."""
        for each in self.new:
            wait_for(lambda each=each: holding.waits(each.box.pid))  # type: ignore[misc]
            wait_for(lambda each=each: each.box.pids() == [each.box.pid])  # type: ignore[misc]
            assert each.box.log.read_text() == ""
        for node in self.group.nodes.values():
            wait_for(lambda node=node: not node.operations.running())  # type: ignore[misc]
            left = [*(node.folder / "run").glob("*/*"), *(node.folder / "work").glob("*")]
            assert [path for path in left if path.parent.name in ("ops", "locks", "work")] == []
        self.group.boxes.assert_clean()


@pytest.fixture
def moving(dumped: Dumped) -> Iterator[Moving]:
    first = dumped.next_address
    dumped.next_address += 2
    with placeholders(dumped, f"10.77.0.{first}", f"10.77.0.{first + 1}") as made:
        yield made


@contextlib.contextmanager
def placeholders(dumped: Dumped, *addresses: str) -> Iterator[Moving]:
    # Each at the agent that had the other one.
    pairs = zip(dumped.members, reversed(dumped.members), addresses, strict=True)
    new = [dumped.group.add(before.name, other.agent, address) for before, other, address in pairs]
    try:
        yield Moving(dumped, new)
    finally:
        for each in new:
            dumped.group.remove(each)


def test_a_stream_between_pods_goes_on_at_other_addresses(moving: Moving) -> None:
    moving.restore()
    moving.goes_on()
    # Two groups with one memory are made only if somebody wants that.
    with pytest.raises(errors.RestoreConflict, match="already restored"):
        moving.restore(again=False)
    moving.goes_on()


def test_pods_may_exchange_their_addresses(dumped: Dumped) -> None:
    addresses = [each.address for each in reversed(dumped.members)]
    with placeholders(dumped, *addresses) as moving:
        assert moving.moved == dict(zip(reversed(addresses), addresses, strict=True))
        moving.restore()
        moving.goes_on()


def test_a_damaged_image_of_one_pod_lets_none_run_and_a_whole_one_follows(moving: Moving) -> None:
    store = moving.group.folder / "stores" / "default"
    *_, pack = sorted((store / "packs").rglob("0"))
    whole = pack.read_bytes()
    pack.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(errors.DataError, match="at w-0-"):
        moving.restore()
    moving.waits()
    pack.write_bytes(whole)
    moving.restore()
    moving.goes_on()


def test_every_reason_against_one_pod_is_told_before_anything_is_made(moving: Moving) -> None:
    box = moving.new[1].box
    crowd = "echo > /came; while [ ! -e /go ]; do :; done; "
    crowd += "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1000 & done; wait"
    popen = moving.group.boxes.popen_exec(box, "sh", "-c", crowd)
    wait_for(box.root("/came").exists)
    # From the first number on, whatever was started in there before.
    inside.raise_counter(proc.identity(box.pid), 1)
    box.root("/go").touch()
    wait_for(lambda: len(box.pids()) > 12)
    with pytest.raises(errors.RestoreConflict, match="at w-0-1") as refused:
        moving.restore()
    assert isinstance(refused.value.facts["reasons"], list)
    assert refused.value.facts["member"] == "w-0-1"
    popen.kill()
    box.exec("sh", "-c", "kill -9 -1", check=False)
    moving.waits()


@pytest.mark.parametrize("state", [State.FILLING, State.STANDING])
def test_who_hears_nothing_of_the_coordinator_undoes_what_stands(
    moving: Moving, state: State
) -> None:
    with pytest.raises(_DiedError):
        moving.restore(die_at=state)
    moving.waits()
    moving.restore()
    moving.goes_on()


def test_who_hears_nothing_once_it_is_committed_runs(moving: Moving) -> None:
    with pytest.raises(_DiedError):
        moving.restore(die_at=State.COMMITTING)
    moving.goes_on()


def cut_off_at(moving: Moving, agent: str, address: str, at: State) -> errors.CkptError:
    """Restore, and end the way to the agent of the first pod when a state begins; the error."""
    group = moving.group
    group.start_agent(agent)
    group.remove(moving.new[0])
    moving.new[0] = group.add("w-0-0", agent, address)

    def watch(state: State) -> None:
        if state is at:
            group.nodes[agent].server.stop(0.0)

    with pytest.raises(errors.CkptError) as caught:
        group.restore(moving.dumped.epoch, moving.new, moving.moved, watch=watch, again=True)
    del group.clients[agent]
    return caught.value


def test_an_agent_that_is_cut_off_keeps_all_from_running(moving: Moving) -> None:
    error = cut_off_at(moving, "c", "10.77.0.100", State.STANDING)
    assert isinstance(error, errors.Unreachable)
    assert error.facts["member"] == "w-0-0"
    moving.waits()


def test_one_that_is_cut_off_once_it_is_committed_is_told_and_runs_all_the_same(
    moving: Moving,
) -> None:
    error = cut_off_at(moving, "d", "10.77.0.101", State.COMMITTING)
    assert isinstance(error, errors.RestoreFailed)
    assert error.facts["committed"] is True
    reasons = error.facts["reasons"]
    assert isinstance(reasons, list)
    assert ["w-0-0" in reason for reason in reasons] == [True]
    moving.goes_on()


@dataclasses.dataclass
class Hand:
    """Says the words of a coordinator one by one."""

    moving: Moving
    attempt: epochclient.Attempt
    image: epochclient.Epoch

    def tell(self, step: Step) -> list[Answer]:
        """What all members say to it. Who has said it hears on, like the others: whoever hears
        nothing for seconds gives up.
        """
        while True:
            said = [self._told(each, step) for each in self.moving.new]
            answers = [each.answer for each in said if each is not None]
            if len(answers) == len(said):
                return answers

    def _told(self, member: Member, step: Step) -> Said | None:
        pod = epochclient.Pod(member.name, member.box.name, member.uid)
        return self.moving.group.clients[member.agent].epochs.take_part(
            self.image, RESTORE, pod, Told(step, 1), 0.5, 60.0, self.attempt
        )

    def commit(self, agent: str) -> Decision:
        uids = [each.uid for each in self.moving.new]
        epochs = self.moving.group.clients[agent].epochs
        return epochs.decide_restore(self.image, self.attempt, Decision.COMMITTED, uids)


def by_hand(moving: Moving) -> Hand:
    attempt = epochclient.Attempt(secrets.token_hex(8), moving.moved, again=True)
    return Hand(moving, attempt, epochclient.Epoch("default", GROUP, moving.dumped.epoch, ""))


def test_a_word_said_twice_does_no_harm(moving: Moving) -> None:
    hand = by_hand(moving)
    for step in RESTORE.before:
        for _ in range(2):
            assert hand.tell(step) == [Answer(step)] * 2
    assert [hand.commit(name) for name in ("a", "b")] == [Decision.COMMITTED] * 2
    for step in RESTORE.after:
        for _ in range(2):
            assert hand.tell(step) == [Answer(step)] * 2
    moving.goes_on()
    detail = moving.group.clients["a"].image("default", f"{GROUP}@{moving.dumped.epoch}")
    assert detail.restored_into == ", ".join(sorted(each.uid for each in moving.new))


def test_the_word_to_go_on_is_refused_unless_the_store_says_that_it_is_committed(
    moving: Moving,
) -> None:
    hand = by_hand(moving)
    for step in RESTORE.before:
        assert hand.tell(step) == [Answer(step)] * 2
    for answer in hand.tell(Step.RELEASE):
        assert "is not committed" in answer.problem
    moving.waits()
    assert hand.commit("a") is Decision.ABANDONED


def test_an_agent_that_is_killed_while_its_pod_stands_keeps_all_from_running(
    moving: Moving,
) -> None:
    group = moving.group
    group.remove(moving.new[0])
    agent = group.agent_process("e")
    moving.new[0] = group.add("w-0-0", "e", "10.77.0.102")
    agent.start()
    wait_for(lambda: agent.status("/readyz") == 200, 60)
    hand = by_hand(moving)
    for step in RESTORE.before:
        assert hand.tell(step) == [Answer(step)] * 2
    agent.kill()
    for each in moving.new:
        wait_for(lambda each=each: each.box.pids() == [each.box.pid])  # type: ignore[misc]
        assert holding.waits(each.box.pid)
    assert hand.commit("a") is Decision.ABANDONED
    agent.start()
    wait_for(lambda: agent.status("/readyz") == 200, 60)
    moving.waits()
    moving.restore()
    moving.goes_on()
    del group.clients["e"]
