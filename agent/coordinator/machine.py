"""The coordinator's half of the protocol: events in, commands out.

Promises: pure; every transition is in ``TRANSITIONS``, an event without one changes nothing; the
commit is asked for only when every member has answered every step before it; members are told to
abort only when the epoch cannot be or was not committed; from every state a failure, a deadline or
a wish to cancel leads to an end. Handling an event takes constant time but for commands that name
members.
Does not: keep time, send anything, or know who the members are beyond their number.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping

from agent.model.protocol import COURSES, Answer, Course, Decision, Step, Told


class State(enum.Enum):
    """What the coordinator waits for."""

    PREPARING = "preparing"
    QUIESCING = "quiescing"
    FREEZING = "freezing"
    HOLDING = "holding"
    CAPTURING = "capturing"
    RELEASING = "releasing"
    RESUMING = "resuming"
    PERSISTING = "persisting"
    FILLING = "filling"
    STANDING = "standing"
    COMMITTING = "committing"
    SETTLING = "settling"
    ENDING = "ending"
    RUNNING = "running"
    FINISHING = "finishing"
    ABORTING = "aborting"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Input(enum.Enum):
    """What an event means to the machine."""

    ALL_ANSWERED = "all answered"
    FAILED = "a member failed"
    EXPIRED = "deadline"
    CANCELLED = "cancelled"
    COMMITTED = "found committed"
    ABANDONED = "found abandoned"
    UNDECIDED = "no decision"


ASKS: Mapping[State, Step] = {
    State.PREPARING: Step.PREPARE,
    State.QUIESCING: Step.QUIESCE,
    State.FREEZING: Step.FREEZE,
    State.HOLDING: Step.HOLD,
    State.CAPTURING: Step.CAPTURE,
    State.RELEASING: Step.RELEASE,
    State.RESUMING: Step.RESUME,
    State.PERSISTING: Step.PERSIST,
    State.FILLING: Step.FILL,
    State.STANDING: Step.STAND,
    State.ENDING: Step.END,
    State.RUNNING: Step.RUN,
    State.FINISHING: Step.FINISH,
    State.ABORTING: Step.ABORT,
}
"""What members are told in a state. In COMMITTING and SETTLING the store is asked instead."""

FINAL = frozenset({State.COMMITTED, State.ABORTED})

_STATE_OF = {step: state for state, step in ASKS.items()}


def _transitions(course: Course) -> dict[tuple[State, Input], State]:
    states = [_STATE_OF[step] for step in course.before]
    table = {
        (here, Input.ALL_ANSWERED): there
        for here, there in zip(states, [*states[1:], State.COMMITTING], strict=True)
    }
    for state in states:
        # Nothing was decided and nobody but this coordinator would ask for the commit.
        for failure in (Input.FAILED, Input.EXPIRED, Input.CANCELLED):
            table[state, failure] = State.ABORTING
    first_after, *_ = after = [_STATE_OF[step] for step in course.after]
    for state in (State.COMMITTING, State.SETTLING):
        table[state, Input.COMMITTED] = first_after
        table[state, Input.ABANDONED] = State.ABORTING
        # The answer may have been lost after the name was taken: only asking again tells.
        table[state, Input.UNDECIDED] = State.SETTLING
        table[state, Input.EXPIRED] = State.SETTLING
    for here, there in zip(after, [*after[1:], State.COMMITTED], strict=True):
        for end in (Input.ALL_ANSWERED, Input.EXPIRED):
            table[here, end] = there
    # Members that do not answer let their processes go on by themselves.
    for end in (Input.ALL_ANSWERED, Input.EXPIRED):
        table[State.ABORTING, end] = State.ABORTED
    return table


TRANSITIONS: Mapping[str, Mapping[tuple[State, Input], State]] = {
    course.name: _transitions(course) for course in COURSES.values()
}
"""For each course what a state and an input lead to."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tell:
    """Send ``told`` to these members; told twice does no harm."""

    told: Told
    members: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Decide:
    """Take the epoch's name in the store: for its manifest, after the cut was checked, or for good
    as abandoned. The outcome comes back as ``decided`` or ``undecided``.
    """

    wish: Decision


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """Call ``expired(state)`` when the state's time is over."""

    state: State


@dataclasses.dataclass(frozen=True, slots=True)
class Conclude:
    """The epoch has ended in ``state``."""

    state: State


Command = Tell | Decide | Arm | Conclude


@dataclasses.dataclass(slots=True)
class Coordination:
    """One epoch as one coordinator sees it. ``problems`` says of each member that failed what it
    said last; ``cause`` is what made the epoch fail.
    """

    course: Course
    members: int
    token: int
    state: State = State.PREPARING
    answered: set[int] = dataclasses.field(default_factory=set)
    problems: dict[int, str] = dataclasses.field(default_factory=dict)
    cause: str = ""

    def begin(self) -> list[Command]:
        """Start the epoch."""
        return self._enter(State.PREPARING)

    def take_over(self) -> list[Command]:
        """Go on for a coordinator that is gone or slow, whatever it had reached: the epoch is
        given up, or finished if it turns out to be committed.
        """
        self.cause = "its coordinator was silent"
        return self._enter(State.SETTLING)

    def answer(self, member: int, answer: Answer) -> list[Command]:
        """A member answered."""
        asked = ASKS.get(self.state)
        if answer.step is not asked:
            return []
        if answer.problem:
            self.problems[member] = answer.problem
            if (self.state, Input.FAILED) in self._table:
                self.cause = self.cause or answer.problem
                return self._move(Input.FAILED)
        # A problem with what follows the decision cannot change it: the member is through.
        self.answered.add(member)
        return self._move(Input.ALL_ANSWERED) if len(self.answered) == self.members else []

    def lost(self, member: int, why: str) -> list[Command]:
        """A member will not answer any more: its pod or its node is gone."""
        asked = ASKS.get(self.state)
        return self.answer(member, Answer(asked, why)) if asked else []

    def decided(self, decision: Decision) -> list[Command]:
        """The store said what became of the epoch."""
        if decision is Decision.COMMITTED:
            self.cause = ""
            return self._move(Input.COMMITTED)
        self.cause = self.cause or "the epoch was abandoned by a member"
        return self._move(Input.ABANDONED)

    def undecided(self, why: str) -> list[Command]:
        """The store could not be asked, or the cut is not consistent."""
        self.cause = self.cause or why
        return self._move(Input.UNDECIDED)

    def expired(self, state: State) -> list[Command]:
        """The time of ``state`` is over."""
        if state is not self.state:
            return []
        if self._table.get((state, Input.EXPIRED)) in (State.ABORTING, State.SETTLING):
            self.cause = self.cause or f"the deadline passed while {state.value}"
        return self._move(Input.EXPIRED)

    def cancel(self, why: str) -> list[Command]:
        """Somebody asks to give up; past the request to commit it is too late."""
        if (self.state, Input.CANCELLED) in self._table:
            self.cause = self.cause or why
        return self._move(Input.CANCELLED)

    def remind(self) -> list[Command]:
        """Some time has passed: whoever has not answered is told again, everybody else hears that
        there still is a coordinator.
        """
        asked = ASKS.get(self.state)
        return [Tell(Told(asked, self.token), tuple(range(self.members)))] if asked else []

    @property
    def silent(self) -> tuple[int, ...]:
        """Members that have not answered what they were asked in this state."""
        return tuple(each for each in range(self.members) if each not in self.answered)

    @property
    def _table(self) -> Mapping[tuple[State, Input], State]:
        return TRANSITIONS[self.course.name]

    def _move(self, given: Input) -> list[Command]:
        there = self._table.get((self.state, given))
        return [] if there is None else self._enter(there)

    def _enter(self, state: State) -> list[Command]:
        self.state = state
        if state in FINAL:
            return [Conclude(state)]
        self.answered.clear()
        asked = ASKS.get(state)
        if asked:
            return [Tell(Told(asked, self.token), tuple(range(self.members))), Arm(state)]
        wish = Decision.COMMITTED if state is State.COMMITTING else Decision.ABANDONED
        return [Decide(wish), Arm(state)]


def edges(course: Course) -> Iterable[tuple[State, Input, State]]:
    """The transitions of a course in the order of the states, for a drawing."""
    for (here, given), there in sorted(
        TRANSITIONS[course.name].items(), key=lambda each: _rank(each[0])
    ):
        yield here, given, there


def _rank(key: tuple[State, Input]) -> tuple[int, int]:
    return list(State).index(key[0]), list(Input).index(key[1])
