"""Carries out what the coordinator's machine commands, and tells it what happened.

Promises: one epoch at a time and a driver; the machine hears of events one after the other; every
state has its time, after which the machine is told; as long as a step lasts, its members hear every
``Limits.remind_s`` that there is a coordinator; when ``run`` returns the epoch has ended and the
report says how, why, and how long each state took.
Does not: know what carries messages or what stores decisions, or who the members are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

from agent import errors
from agent.coordinator import machine
from agent.coordinator.machine import Coordination, State
from agent.model.protocol import Answer, Decision, Said, Step, Told


@dataclasses.dataclass(frozen=True, slots=True)
class Answered:
    """A member answered."""

    member: int
    said: Said


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """A member will not answer any more."""

    member: int
    error: errors.CkptError


@dataclasses.dataclass(frozen=True, slots=True)
class Settled:
    """The store was asked: ``decision`` is None if that failed with ``error``."""

    decision: Decision | None
    error: errors.CkptError | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody wants the epoch given up."""

    why: str


Event = Answered | Lost | Settled | Cancelled


class Mailbox(Protocol):
    """Where events arrive, and the time by which they do."""

    def now_s(self) -> float:
        """Seconds from any beginning, never backwards."""

    def next(self, until_s: float) -> Event | None:
        """The next event; None if it is ``until_s`` and none has come."""


class Links(Protocol):
    """The way to the members and to the store. Neither method waits: what follows arrives in the
    mailbox.
    """

    def tell(self, member: int, told: Told) -> None:
        """Send a message; it may be lost."""

    def decide(self, wish: Decision, parts: Mapping[int, bytes]) -> None:
        """Have the epoch committed, of what the members gave for it, or abandoned; ``Settled``
        follows, perhaps never.
        """


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long each state may last, in seconds; those that are not named take ``other_s``.

    A member is frozen for no longer than FREEZING to RESUMING together, and by itself lets go after
    what ``node.participant`` arms.
    """

    states_s: Mapping[State, float] = dataclasses.field(
        default_factory=lambda: {
            State.PREPARING: 600.0,
            # What hooks.LONGEST_S allows those of a pod, and the way there and back.
            State.QUIESCING: 330.0,
            State.CAPTURING: 600.0,
            State.PERSISTING: 3600.0,
            State.FILLING: 600.0,
            State.STANDING: 600.0,
            State.RUNNING: 60.0,
            # A second try is better than a long wait: whoever holds the volume up holds up the job.
            State.COMMITTING: 30.0,
            State.SETTLING: 5.0,
        }
    )
    other_s: float = 10.0
    remind_s: float = 0.5

    def of(self, state: State) -> float:
        """Seconds that a state may last."""
        return self.states_s.get(state, self.other_s)


@dataclasses.dataclass(frozen=True)
class Report:
    """How an epoch ended. ``cause`` is the first thing that went wrong, with the member it went
    wrong at (None: none in particular); ``silent`` are members that did not confirm the end,
    ``late`` those that failed when it was committed already; ``spans_s`` is how long each state
    lasted.
    """

    committed: bool
    cause: str
    at: int | None
    error: errors.CkptError | None
    silent: tuple[int, ...]
    spans_s: dict[State, float]
    late: dict[int, errors.CkptError] = dataclasses.field(default_factory=dict)


class Driver:
    """Drives one epoch. ``watch`` is called with each state as it begins."""

    def __init__(
        self,
        coordination: Coordination,
        links: Links,
        mailbox: Mailbox,
        limits: Limits,
        watch: Callable[[State], None] = lambda state: None,
    ) -> None:
        self._machine = coordination
        self._links = links
        self._mailbox = mailbox
        self._limits = limits
        self._watch = watch
        self._parts: dict[int, bytes] = {}
        self._late: dict[int, errors.CkptError] = {}
        self._spans_s: dict[State, float] = {}
        self._entered_s = mailbox.now_s()
        self._deadline_s = self._entered_s
        self._shown: State | None = None
        self._at: int | None = None
        self._error: errors.CkptError | None = None

    def run(self, *, take_over: bool = False) -> Report:
        """Drive the epoch from its beginning, or from wherever another coordinator left it, to its
        end.
        """
        made = self._machine
        self._obey(made.take_over() if take_over else made.begin())
        while made.state not in machine.FINAL:
            remind_s = self._mailbox.now_s() + self._limits.remind_s
            event = self._mailbox.next(min(remind_s, self._deadline_s))
            if event is not None:
                self._obey(self._told(event))
            elif self._mailbox.now_s() >= self._deadline_s:
                self._obey(made.expired(made.state))
            else:
                self._obey(made.remind())
        committed = made.state is State.COMMITTED
        return Report(
            committed=committed,
            cause="" if committed else made.cause,
            at=None if committed else self._at,
            error=None if committed else self._error,
            silent=made.silent,
            spans_s=self._spans_s,
            late=self._late if committed else {},
        )

    def _told(self, event: Event) -> list[machine.Command]:
        made = self._machine
        blamed = bool(made.cause)
        match event:
            case Answered(member, said):
                if said.part and not said.answer.problem:
                    self._parts[member] = said.part
                self._note_late(member, said.answer, said.error)
                commands = made.answer(member, said.answer)
                self._blame(blamed, member, said.error)
            case Lost(member, error):
                if self._decided:
                    self._late[member] = error
                commands = made.lost(member, error.message)
                self._blame(blamed, member, error)
            case Settled(None, error):
                commands = made.undecided(error.message if error else "the store did not answer")
                self._blame(blamed, None, error)
            case Settled(Decision() as decision, _):
                commands = made.decided(decision)
            case Cancelled(why):
                commands = made.cancel(why)
        return commands

    @property
    def _decided(self) -> bool:
        """Whether a problem comes too late to change what was decided."""
        return machine.ASKS.get(self._machine.state) in self._machine.course.after

    def _note_late(self, member: int, answer: Answer, error: errors.CkptError | None) -> None:
        if answer.problem and self._decided:
            self._late[member] = error or errors.Failed(answer.problem)
        elif answer.step is Step.FINISH:
            self._late.pop(member, None)  # it came to its end after all

    def _blame(self, blamed: bool, member: int | None, error: errors.CkptError | None) -> None:
        if self._machine.cause and not blamed:
            self._at, self._error = member, error

    def _obey(self, commands: list[machine.Command]) -> None:
        for command in commands:
            match command:
                case machine.Tell(told, members):
                    for member in members:
                        self._links.tell(member, told)
                case machine.Decide(wish):
                    self._links.decide(wish, self._parts)
                case machine.Arm(state):
                    self._entered(state)
                case machine.Conclude():
                    self._left()

    def _entered(self, state: State) -> None:
        self._left()
        self._shown = state
        self._deadline_s = self._entered_s + self._limits.of(state)
        self._watch(state)

    def _left(self) -> None:
        now_s = self._mailbox.now_s()
        if self._shown is not None:
            spent_s = now_s - self._entered_s
            self._spans_s[self._shown] = self._spans_s.get(self._shown, 0.0) + spent_s
        self._entered_s = now_s
