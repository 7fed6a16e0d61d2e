"""Trees that are cut by a coordinator, each by a session of its own, into one epoch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from agent import errors
from agent.coordinator.driver import Cancelled, Driver, Limits, Report
from agent.coordinator.links import Links, Mailbox
from agent.coordinator.machine import Coordination, State
from agent.engines.base import CaptureOptions
from agent.engines.criu import hiding
from agent.host import clock
from agent.model import cut, ids
from agent.model.protocol import EVACUATE, LEAVE_RUNNING, LEAVE_RUNNING_HELD, Course, Decision
from agent.node import dump as node_dump
from agent.node.contribution import Contribution
from agent.node.joint import JointDump
from agent.node.session import Session
from agent.store.repository import Part, Store
from tests.host.test_epochs import GROUP, Job, Stream, job, stream

__all__ = ["job", "stream"]


class _DiedError(Exception):
    """The coordinator is gone."""


@dataclasses.dataclass
class Epoch:
    """One epoch of two trees: a session each, a coordinator, the store they share."""

    job: Job
    course: Course
    sessions: list[Session]
    mailbox: Mailbox
    epoch: ids.EpochId
    verdict: cut.Verdict | None = None

    def decide(self, wish: Decision, parts: Mapping[int, bytes]) -> Decision:
        store = self.job.store
        if wish is Decision.ABANDONED:
            return store.abandon(GROUP, self.epoch)
        given = [Contribution.decode(parts[each]) for each in sorted(parts)]
        self.verdict = cut.check(end for each in given for end in each.ends)
        if not self.verdict.consistent:
            raise errors.DumpFailed(str(self.verdict.torn[0]))
        store.commit_joint(
            GROUP,
            self.epoch,
            [Part.decode(each.part) for each in given],
            {},
            now_s=clock.wall_s(),
        )
        return Decision.COMMITTED

    def run(self, *, give_up_at: State | None = None, die_at: State | None = None) -> Report:
        def watch(state: State) -> None:
            if state is die_at:
                raise _DiedError
            if state is give_up_at:
                self.mailbox.put(Cancelled("asked to stop"))

        calls = [each.tell for each in self.sessions]
        made = Coordination(self.course, len(calls), token=1)
        with Links(self.mailbox, calls, self.decide).open() as links:
            return Driver(made, links, self.mailbox, Limits(), watch).run()


@contextlib.contextmanager
def epoch(
    job: Job,
    pids: list[int],
    course: Course = LEAVE_RUNNING,
    short_stop_failed: Callable[[], None] = lambda: None,
) -> Iterator[Epoch]:
    store: Store = job.store
    name = store.new_epoch(GROUP, now_s=clock.wall_s())
    sessions = []
    for number, pid in enumerate(pids):
        member = node_dump.Member(ids.member_name(f"tree-{number}"), pid)
        actions = JointDump(
            store,
            job.host.engine,
            GROUP,
            name,
            course,
            [member],
            CaptureOptions(kill=course is EVACUATE, precopy=True),
            place="here",
            short_stop_failed=short_stop_failed,
        )
        sessions.append(Session(f"tree-{number}", course, actions))
    for each in sessions:
        each.start()
    yield Epoch(job, course, sessions, Mailbox(), name)
    for each in sessions:
        assert each.join(30), "a session does not end"


def test_trees_that_talk_are_cut_together_and_lose_nothing(job: Job, stream: Stream) -> None:
    for _ in range(2):
        with epoch(job, stream.pids) as made:
            report = made.run()
        assert report.committed, report
        assert made.verdict is not None
        assert made.verdict.pairs == 1
        stream.flows()
    assert len(job.epochs()) == 2
    stream.kill()
    job.restore()
    stream.flows()


def test_trees_that_are_moved_are_ended_when_their_image_is_committed(
    job: Job, stream: Stream
) -> None:
    with epoch(job, stream.pids, EVACUATE) as made:
        report = made.run()
    assert report.committed, report
    for popen in stream.ends.values():
        popen.wait(10)
    job.restore()
    stream.flows()


@pytest.mark.parametrize("course", [LEAVE_RUNNING, EVACUATE], ids=lambda each: each.name)
def test_the_memory_of_each_is_copied_while_it_runs(job: Job, course: Course) -> None:
    targets = [job.host.start("memory", MEMORY_MIB="24") for _ in range(2)]
    pids = [each.pid for each in targets]
    with epoch(job, pids, course) as made:
        report = made.run()
    assert report.committed, report
    reader = job.store.read(GROUP, made.epoch)
    for name in reader.members:
        assert reader.member(name).facts()["stop"]["path"] == "precopy"
    for each in targets:
        if course is LEAVE_RUNNING:
            job.host.assert_running(each)
        job.host.kill(each)
    job.restore()
    for each in targets:
        each.check()


def test_one_whose_memory_cannot_be_copied_ahead_says_so_and_all_go_on(
    job: Job, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be done without is then known to who asks for the next epoch."""
    answered = hiding.Hiding._answer

    def spoiled(self: Any, call: Any) -> int | None:
        return None if answered(self, call) is None else -1

    monkeypatch.setattr(hiding.Hiding, "_answer", spoiled)
    large = job.host.start("memory", MEMORY_MIB="24")
    told: list[str] = []
    with epoch(
        job, [*stream.pids, large.pid], short_stop_failed=lambda: told.append("large")
    ) as made:
        report = made.run()
    assert not report.committed
    assert told == ["large"]
    assert isinstance(report.error, errors.ShortStopFailed)
    assert job.epochs() == []
    job.host.assert_running(large)
    stream.flows()


@pytest.mark.parametrize(
    ("course", "state"),
    [
        *((LEAVE_RUNNING_HELD, state) for state in (State.PREPARING, State.HOLDING)),
        *((LEAVE_RUNNING, state) for state in (State.FREEZING, State.CAPTURING, State.PERSISTING)),
        *((EVACUATE, state) for state in (State.PREPARING, State.FREEZING)),
        *((EVACUATE, state) for state in (State.CAPTURING, State.PERSISTING)),
    ],
    ids=lambda each: each.name if isinstance(each, Course) else each.value,
)
def test_an_epoch_that_is_given_up_anywhere_leaves_the_trees_as_they_were(
    job: Job, stream: Stream, course: Course, state: State
) -> None:
    with epoch(job, stream.pids, course) as made:
        report = made.run(give_up_at=state)
    assert not report.committed
    assert report.cause == "asked to stop"
    assert job.epochs() == []
    stream.flows()


@pytest.mark.parametrize("state", [State.FREEZING, State.CAPTURING, State.PERSISTING])
def test_a_coordinator_that_dies_while_they_stand_still_costs_seconds(
    job: Job, stream: Stream, state: State
) -> None:
    with epoch(job, stream.pids, EVACUATE) as made, pytest.raises(_DiedError):
        made.run(die_at=state)
    assert job.epochs() == []
    stream.flows()
