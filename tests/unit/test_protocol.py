"""Both halves of the protocol of an epoch, step by step."""

from __future__ import annotations

import pytest

from agent.coordinator import machine
from agent.coordinator.machine import Arm, Conclude, Coordination, Decide, State, Tell
from agent.model.protocol import (
    COURSES,
    EVACUATE,
    LEAVE_RUNNING,
    RESTORE,
    Answer,
    Course,
    Decision,
    Step,
    Told,
)
from agent.node import participant
from agent.node.participant import (
    Close,
    Do,
    LetGo,
    Participant,
    Phase,
    Processes,
    Reply,
    Settle,
    Timer,
)

EACH = pytest.mark.parametrize("course", COURSES.values(), ids=lambda each: each.name)


def coordination(course: Course = LEAVE_RUNNING, members: int = 2) -> Coordination:
    made = Coordination(course, members, token=7)
    made.begin()
    return made


def through(made: Coordination, until: State) -> list[machine.Command]:
    """Everybody answers until the coordinator is in a state; what it commanded last."""
    commands: list[machine.Command] = []
    while made.state is not until:
        asked = machine.ASKS.get(made.state)
        if asked is None:
            commands = made.decided(Decision.COMMITTED)
        else:
            for member in range(made.members):
                commands = made.answer(member, Answer(asked))
    return commands


@EACH
def test_members_hear_every_step_of_the_course_and_then_it_is_committed(course: Course) -> None:
    made = Coordination(course, 2, token=7)
    commands, told = made.begin(), []
    while made.state not in machine.FINAL:
        asked = machine.ASKS.get(made.state)
        if asked is None:
            assert commands == [Decide(Decision.COMMITTED), Arm(State.COMMITTING)]
            told.append("commit")
            commands = made.decided(Decision.COMMITTED)
        else:
            assert commands == [Tell(Told(asked, 7), (0, 1)), Arm(made.state)]
            told.append(asked.value)
            assert made.answer(0, Answer(asked)) == []
            commands = made.answer(1, Answer(asked))
    assert told == [*(s.value for s in course.before), "commit", *(s.value for s in course.after)]
    assert commands == [Conclude(State.COMMITTED)]


def test_an_answer_counts_once_and_only_for_what_is_asked_now() -> None:
    made = coordination()
    assert made.answer(0, Answer(Step.PREPARE)) == []
    assert made.answer(0, Answer(Step.PREPARE)) == []
    assert made.answer(1, Answer(Step.FREEZE)) == []
    assert made.state is State.PREPARING
    assert made.silent == (1,)


@pytest.mark.parametrize(
    ("course", "state"),
    [
        (course, machine._STATE_OF[step])
        for course in (LEAVE_RUNNING, RESTORE)
        for step in course.before
    ],
    ids=lambda each: each.name if isinstance(each, Course) else each.value,
)
@pytest.mark.parametrize("how", ["fails", "expires", "is cancelled", "is lost"])
def test_until_the_commit_whatever_goes_wrong_makes_all_abort(
    course: Course, state: State, how: str
) -> None:
    made = coordination(course)
    through(made, state)
    commands = {
        "fails": lambda: made.answer(0, Answer(machine.ASKS[state], "no room")),
        "expires": lambda: made.expired(state),
        "is cancelled": lambda: made.cancel("asked to stop"),
        "is lost": lambda: made.lost(0, "its node is gone"),
    }[how]()
    assert commands == [Tell(Told(Step.ABORT, 7), (0, 1)), Arm(State.ABORTING)]
    assert made.cause
    assert through(made, State.ABORTED) == [Conclude(State.ABORTED)]


@pytest.mark.parametrize("state", [State.COMMITTING, State.FINISHING])
def test_past_the_request_to_commit_nobody_can_cancel(state: State) -> None:
    made = coordination()
    through(made, state)
    assert made.cancel("asked to stop") == []
    assert made.state is state


def test_an_unknown_outcome_is_asked_for_until_it_is_known() -> None:
    made = coordination()
    through(made, State.COMMITTING)
    for _ in range(3):
        assert made.undecided("no reply") == [Decide(Decision.ABANDONED), Arm(State.SETTLING)]
        assert made.expired(State.SETTLING) == [Decide(Decision.ABANDONED), Arm(State.SETTLING)]
    assert made.decided(Decision.COMMITTED)[0] == Tell(Told(Step.FINISH, 7), (0, 1))
    assert made.cause == ""


def test_a_second_coordinator_settles_the_epoch_before_it_says_anything() -> None:
    made = Coordination(LEAVE_RUNNING, 2, token=8)
    assert made.take_over() == [Decide(Decision.ABANDONED), Arm(State.SETTLING)]
    assert made.decided(Decision.ABANDONED)[0] == Tell(Told(Step.ABORT, 8), (0, 1))


def test_members_that_never_answer_do_not_keep_the_coordinator() -> None:
    made = coordination()
    made.expired(State.PREPARING)
    made.answer(1, Answer(Step.ABORT))
    assert made.expired(State.ABORTING) == [Conclude(State.ABORTED)]
    assert made.silent == (0,)


def test_a_reminder_reaches_everybody_so_that_all_know_of_a_coordinator() -> None:
    made = coordination()
    made.answer(0, Answer(Step.PREPARE))
    assert made.remind() == [Tell(Told(Step.PREPARE, 7), (0, 1))]
    through(made, State.COMMITTING)
    assert made.remind() == []


def test_a_deadline_of_a_state_that_is_past_changes_nothing() -> None:
    made = coordination()
    through(made, State.FREEZING)
    assert made.expired(State.PREPARING) == []
    assert made.state is State.FREEZING


# The member's half.


def member(course: Course = LEAVE_RUNNING, until: Step | None = None) -> Participant:
    made = Participant.begin(course)
    for step in course.before[: course.position(until) + 1] if until else ():
        made.told(Told(step, 1))
        made.did(step)
    return made


def test_a_step_is_done_once_and_answered_as_often_as_it_is_asked() -> None:
    made = Participant(LEAVE_RUNNING)
    assert Do(Step.PREPARE) in made.told(Told(Step.PREPARE, 1))
    assert Do(Step.PREPARE) not in made.told(Told(Step.PREPARE, 1))
    assert Reply(Answer(Step.PREPARE)) in made.did(Step.PREPARE)
    again = made.told(Told(Step.PREPARE, 1))
    assert Reply(Answer(Step.PREPARE)) in again
    assert Do(Step.PREPARE) not in again


def test_a_step_before_its_turn_is_not_done() -> None:
    made = member(until=Step.QUIESCE)
    (reply,) = made.told(Told(Step.CAPTURE, 1))
    assert isinstance(reply, Reply)
    assert reply.answer.problem == "the steps before it are not done"


def test_a_step_of_another_course_is_not_done() -> None:
    made = member(EVACUATE, until=Step.CAPTURE)
    assert not [each for each in made.told(Told(Step.RESUME, 1)) if isinstance(each, Do)]


def test_an_older_coordinator_is_not_obeyed() -> None:
    made = member()
    made.told(Told(Step.PREPARE, 5))
    (reply,) = made.told(Told(Step.ABORT, 4))
    assert isinstance(reply, Reply)
    assert reply.answer.problem == "a newer coordinator took over"
    assert made.phase is Phase.TAKING_PART


@pytest.mark.parametrize("step", LEAVE_RUNNING.before)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "done"])
def test_abort_lets_the_processes_go_whatever_was_reached(step: Step, *, busy: bool) -> None:
    made = member(until=step)
    if busy and (following := LEAVE_RUNNING.position(step) + 1) < len(LEAVE_RUNNING.before):
        made.told(Told(LEAVE_RUNNING.before[following], 1))
    assert made.told(Told(Step.ABORT, 1)) == [LetGo()]
    effects = made.let_go()
    assert Close(Decision.ABANDONED) in effects
    assert effects[-1] == Reply(Answer(Step.ABORT))
    assert not made.stopped


def test_abort_before_anything_else_keeps_the_epoch_from_beginning_later() -> None:
    made = Participant(LEAVE_RUNNING)
    made.told(Told(Step.ABORT, 1))
    made.let_go()
    effects = made.told(Told(Step.PREPARE, 1))
    assert [type(each) for each in effects] == [Reply]


@pytest.mark.parametrize("timer", list(Timer))
@pytest.mark.parametrize("step", [Step.FREEZE, Step.CAPTURE])
def test_a_silent_coordinator_does_not_keep_the_processes(step: Step, timer: Timer) -> None:
    made = member(until=step)
    assert made.stopped
    assert made.expired(timer) == [LetGo()]
    made.let_go()
    assert not made.stopped
    (reply,) = made.told(Told(Step.CAPTURE, 1))
    assert isinstance(reply, Reply)
    assert reply.answer.problem


def test_what_is_durable_may_be_committed_so_the_store_is_asked_first() -> None:
    made = member(until=Step.PERSIST)
    assert made.expired(Timer.SILENCE) == [Settle()]
    assert made.settled(Decision.COMMITTED) == [LetGo(committed=True)]
    assert Close(Decision.COMMITTED) in made.let_go()


def test_nor_does_a_store_that_never_answers_keep_them() -> None:
    made = member(EVACUATE, until=Step.PERSIST)
    assert Settle() in made.expired(Timer.STOPPED)
    assert made.expired(Timer.SILENCE) == [LetGo()]
    made.let_go()
    assert not made.stopped
    assert made.phase is Phase.SETTLING
    assert made.settled(Decision.ABANDONED) == [LetGo()]
    assert Close(Decision.ABANDONED) in made.let_go()


def test_what_cannot_be_ended_runs_on_and_its_image_stays() -> None:
    made = member(EVACUATE, until=Step.PERSIST)
    made.told(Told(Step.END, 1))
    effects = made.could_not(Step.END, "a process would not die")
    assert effects == [LetGo(committed=True), Reply(Answer(Step.END, "a process would not die"))]
    assert Close(Decision.COMMITTED) in made.let_go()


def test_what_was_ended_stays_ended_when_nobody_says_that_it_is_over() -> None:
    made = member(EVACUATE, until=Step.PERSIST)
    made.told(Told(Step.END, 1))
    made.did(Step.END)
    effects = made.expired(Timer.SILENCE)
    assert LetGo() not in effects
    assert Close(Decision.COMMITTED) in effects
    assert made.processes is participant.Processes.ENDED


def test_a_late_end_of_a_step_changes_nothing_after_the_epoch_was_given_up() -> None:
    made = member(until=Step.FREEZE)
    made.told(Told(Step.CAPTURE, 1))
    made.told(Told(Step.ABORT, 1))
    assert made.did(Step.CAPTURE) == []
    assert made.could_not(Step.CAPTURE, "cancelled") == []


# A member that is restored.


def test_nothing_is_undone_or_run_before_the_store_has_said_which_it_is_to_be() -> None:
    made = member(RESTORE, until=Step.STAND)
    assert made.expired(Timer.SILENCE) == [Settle()]
    # A store that does not answer is waited for: others may run.
    assert made.expired(Timer.SILENCE) == []
    assert made.settled(Decision.ABANDONED) == [LetGo()]
    effects = made.let_go(running=False)
    assert Close(Decision.ABANDONED) in effects
    assert made.processes is Processes.ABSENT


@pytest.mark.parametrize("step", [Step.PREPARE, Step.FILL])
def test_what_does_not_stand_yet_is_undone_without_a_question(step: Step) -> None:
    assert member(RESTORE, until=step).expired(Timer.SILENCE) == [LetGo()]


def test_who_hears_nothing_runs_what_is_committed_and_says_so_when_asked() -> None:
    made = member(RESTORE, until=Step.STAND)
    made.expired(Timer.SILENCE)
    assert made.told(Told(Step.RUN, 1)) == []
    assert made.settled(Decision.COMMITTED) == [LetGo(committed=True)]
    effects = made.let_go()
    assert effects[-2:] == [Close(Decision.COMMITTED), Reply(Answer(Step.FINISH))]
    for step in RESTORE.after:
        assert made.told(Told(step, 1)) == [Reply(Answer(step))]


def test_the_word_that_it_is_over_does_not_let_run_what_never_heard_to_run() -> None:
    made = member(RESTORE, until=Step.STAND)
    assert made.told(Told(Step.FINISH, 1)) == [Settle()]
    assert made.told(Told(Step.FINISH, 1)) == []
    assert made.settled(Decision.COMMITTED) == [LetGo(committed=True)]


def test_what_is_committed_and_cannot_run_is_told_whenever_it_is_asked() -> None:
    made = member(RESTORE, until=Step.STAND)
    made.told(Told(Step.RELEASE, 1))
    made.did(Step.RELEASE)
    assert Do(Step.RUN) in made.told(Told(Step.RUN, 1))
    assert made.expired(Timer.SILENCE) == []
    effects = made.could_not(Step.RUN, "CRIU died")
    assert effects == [Settle(), Reply(Answer(Step.RUN, "CRIU died"))]
    made.settled(Decision.COMMITTED)
    assert Reply(Answer(Step.FINISH, "CRIU died")) in made.let_go(running=False)
    for step in RESTORE.after:
        assert made.told(Told(step, 1)) == [Reply(Answer(step, "CRIU died"))]


def test_what_runs_is_left_alone_whatever_comes_later() -> None:
    made = member(RESTORE, until=Step.STAND)
    for step in (Step.RELEASE, Step.RUN):
        made.told(Told(step, 1))
        made.did(step)
    assert made.told(Told(Step.ABORT, 1)) == []
    effects = made.expired(Timer.SILENCE)
    assert Close(Decision.COMMITTED) in effects
    assert not [each for each in effects if isinstance(each, LetGo)]
    assert made.processes is Processes.RUNNING
