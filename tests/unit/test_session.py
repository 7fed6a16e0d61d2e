"""One pod's part in an epoch: time, threads and words around the participant that decides."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent import errors
from agent.host import clock
from agent.model.protocol import EVACUATE, LEAVE_RUNNING, Course, Decision, Step, Told
from agent.node.participant import Timer
from agent.node.session import Session


class Recorded:
    """Actions that only remember; a step in ``stuck`` waits until it is let go."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.stuck: set[Step] = set()
        self.broken: set[Step] = set()
        self.back = False
        self.decision: list[Decision | errors.VolumeError] = [Decision.ABANDONED]
        self._gone = threading.Event()

    def do(self, step: Step) -> bytes:
        self.done.append(step.value)
        if step in self.stuck and self._gone.wait(20):
            raise errors.DumpFailed("given up")
        if step in self.broken:
            raise errors.VolumeFull("no room")
        return b"a part" if step is Step.PERSIST else b""

    def let_go(self, *, committed: bool) -> bool:
        self._gone.set()
        self.done.append("let go, committed" if committed else "let go")
        return committed or not self.back

    def settle(self) -> Decision:
        found = self.decision.pop()
        if isinstance(found, errors.VolumeError):
            raise found
        return found

    def close(self, decision: Decision) -> None:
        self.done.append(decision.value)


@pytest.fixture
def actions() -> Recorded:
    return Recorded()


Start = Callable[..., Session]


@pytest.fixture
def start(actions: Recorded) -> Iterator[Start]:
    made: list[Session] = []

    def begin(course: Course = LEAVE_RUNNING, silence_s: float = 30.0) -> Session:
        timers = {Timer.SILENCE: silence_s, Timer.STOPPED: 30.0}
        made.append(Session("train-0", course, actions, timers_s=timers))
        made[-1].start()
        return made[-1]

    yield begin
    for each in made:
        each.tell(Told(Step.ABORT, 99), 5.0)
        assert each.join(10)


def through(session: Session, course: Course, until: Step) -> None:
    for step in course.before[: course.position(until) + 1]:
        said = session.tell(Told(step, 1), 10.0)
        assert said is not None
        assert said.answer.problem == ""


def through_and_then_silent(
    session: Session, course: Course, until: Step, silence_s: float
) -> None:
    """From the last word on: between two of them a busy machine may be silent for longer."""
    through(session, course, until)
    session._timers_s = {**session._timers_s, Timer.SILENCE: silence_s}
    said = session.tell(Told(until, 1), 10.0)
    assert said is not None
    assert said.answer.problem == ""


def test_steps_are_carried_out_in_order_and_answered(start: Start, actions: Recorded) -> None:
    session = start()
    through(session, LEAVE_RUNNING, Step.PERSIST)
    assert actions.done == [step.value for step in LEAVE_RUNNING.before]
    said = session.tell(Told(Step.PERSIST, 1), 10.0)
    assert said is not None
    assert said.part == b"a part"
    assert session.tell(Told(Step.FINISH, 1), 10.0) is not None
    assert session.join(10)
    assert actions.done[-1] == "committed"


def test_a_word_whose_answer_takes_long_is_said_again(start: Start, actions: Recorded) -> None:
    actions.stuck.add(Step.PREPARE)
    session = start()
    assert session.tell(Told(Step.PREPARE, 1), 0.05) is None
    assert clock.wait_until(lambda: actions.done != [], clock.Deadline.after(20))
    assert session.tell(Told(Step.PREPARE, 1), 0.05) is None
    assert actions.done == ["prepare"]


def test_abort_reaches_a_step_that_is_under_way(start: Start, actions: Recorded) -> None:
    actions.stuck.add(Step.CAPTURE)
    session = start()
    through(session, LEAVE_RUNNING, Step.FREEZE)
    assert session.tell(Told(Step.CAPTURE, 1), 0.05) is None
    assert clock.wait_until(lambda: "capture" in actions.done, clock.Deadline.after(20))
    said = session.tell(Told(Step.ABORT, 1), 10.0)
    assert said is not None
    assert said.answer.problem == ""
    assert session.join(10)
    assert actions.done[-2:] == ["let go", "abandoned"]


def test_a_step_that_fails_is_answered_with_its_error_and_lets_go(
    start: Start, actions: Recorded
) -> None:
    actions.broken.add(Step.CAPTURE)
    session = start()
    through(session, LEAVE_RUNNING, Step.FREEZE)
    said = session.tell(Told(Step.CAPTURE, 1), 10.0)
    assert said is not None
    assert said.answer.problem == "no room"
    assert isinstance(said.error, errors.VolumeFull)
    assert session.join(10)
    assert actions.done[-2:] == ["let go", "abandoned"]


def test_without_a_word_the_processes_go_on(start: Start, actions: Recorded) -> None:
    session = start()
    through_and_then_silent(session, LEAVE_RUNNING, Step.FREEZE, silence_s=0.3)
    assert session.join(10)
    assert actions.done[-2:] == ["let go", "abandoned"]


def test_nor_are_they_kept_by_one_who_only_joined(start: Start, actions: Recorded) -> None:
    assert start(silence_s=0.1).join(10)
    assert actions.done == ["let go", "abandoned"]


def test_what_may_be_committed_is_asked_of_the_store_until_it_tells(
    start: Start, actions: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.node.session._SETTLE_AGAIN_S", 0.05)
    actions.decision = [
        Decision.COMMITTED,
        errors.VolumeGone("gone"),
        errors.VolumeGone("gone"),
    ]
    session = start(EVACUATE)
    through_and_then_silent(session, EVACUATE, Step.PERSIST, silence_s=0.3)
    assert session.join(10)
    assert actions.done[-2] == "let go, committed"
    assert actions.done[-1] == "committed"


def test_one_that_is_over_answers_on(start: Start, actions: Recorded) -> None:
    session = start(silence_s=0.1)
    assert session.join(10)
    said = session.tell(Told(Step.PREPARE, 1), 10.0)
    assert said is not None
    assert said.answer.problem == "the coordinator was silent"
    assert actions.done == ["let go", "abandoned"]


class Content:
    """What a step works on."""


class Failing(Recorded):
    """Its step fails deep inside, with content at hand on every level."""

    def __init__(self) -> None:
        super().__init__()
        self.worked_on: list[weakref.ref[Content]] = []

    def do(self, step: Step) -> bytes:
        content = self._content()
        try:
            self._read()
        except OSError as exc:
            raise errors.VolumeFull(f"no room for {content}") from exc
        raise AssertionError

    def _read(self) -> None:
        content = self._content()
        try:
            int(f"{content}")
        except ValueError:
            raise OSError(28, "no space") from None

    def _content(self) -> Content:
        content = Content()
        self.worked_on.append(weakref.ref(content))
        return content


def test_one_that_is_over_tells_its_failure_on_and_keeps_nothing_of_what_it_worked_on() -> None:
    actions = Failing()
    worked_on, of_actions = actions.worked_on, weakref.ref(actions)
    session = Session("train-0", LEAVE_RUNNING, actions)
    del actions
    session.start()
    session.tell(Told(Step.PREPARE, 1), 10.0)
    session.tell(Told(Step.ABORT, 1), 10.0)
    assert session.join(10)
    gc.collect()
    assert len(worked_on) == 2
    assert [each() for each in worked_on] == [None, None]
    assert of_actions() is None
    said = session.tell(Told(Step.PREPARE, 1), 10.0)
    assert said is not None
    assert isinstance(said.error, errors.VolumeFull)


def test_a_word_that_comes_just_as_it_ends_is_answered(actions: Recorded) -> None:
    ending, spoken = threading.Event(), threading.Event()

    def ended() -> None:
        ending.set()
        assert spoken.wait(10)

    session = Session(
        "train-0",
        LEAVE_RUNNING,
        actions,
        timers_s={Timer.SILENCE: 0.05, Timer.STOPPED: 30.0},
        ended=ended,
    )
    session.start()
    assert ending.wait(10)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(session.tell, Told(Step.CAPTURE, 1), 10.0)
        time.sleep(0.2)
        spoken.set()
        answer = said.result(10)
    assert answer is not None
    assert answer.answer.problem
    assert session.join(10)


def test_a_defect_lets_the_processes_go_on_and_is_told_as_one(
    start: Start, actions: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(step: Step) -> bytes:
        raise ValueError("a secret")

    monkeypatch.setattr(actions, "do", broken)
    session = start()
    said = session.tell(Told(Step.PREPARE, 1), 10.0)
    assert said is not None
    assert isinstance(said.error, errors.AgentDefect)
    assert "secret" not in said.answer.problem
    assert session.join(10)
    assert actions.done == ["let go", "abandoned"]
