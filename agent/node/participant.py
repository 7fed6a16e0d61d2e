"""A member's half of the protocol: events in, effects out.

Promises: pure; whatever arrives, and whenever it stops arriving, the member's processes run again
after ``SILENCE`` or ``STOPPED`` has expired, unless they were ended for a committed epoch; those
of a restore never run unless the store says that it is committed; steps are done in the order of
the course, each once; nothing is captured or answered for an epoch that was given up; a coordinator
older than one heard of is not obeyed.
Does not: keep time or touch a process. An effect that is asked for while another one still runs
makes that one give up: whoever carries effects out sees to it, and reports each end once.
"""

from __future__ import annotations

import dataclasses
import enum

from agent.model.protocol import Answer, Course, Decision, Step, Told


class Phase(enum.Enum):
    """Whether the member still takes part."""

    TAKING_PART = "taking part"
    SETTLING = "settling"
    LETTING_GO = "letting go"
    CLOSED = "closed"


class Processes(enum.Enum):
    """What became of the member's processes."""

    RUNNING = "running"
    STOPPED = "stopped"
    ENDED = "ended"
    ABSENT = "absent"
    """Of a restore: none has run so far, or what stood was undone."""


class Timer(enum.Enum):
    """What a member waits for at most so long."""

    SILENCE = "silence"
    """Any word of a coordinator."""

    STOPPED = "stopped"
    """The end of the stop, however busy the coordinator is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Do:
    """Carry out a step; ``did`` or ``could_not`` follows."""

    step: Step


@dataclasses.dataclass(frozen=True, slots=True)
class LetGo:
    """Release the hold, let the processes run, run the post hooks; ``let_go`` follows. Always
    possible, and a no-op for what already runs. Those of a restore run if it is ``committed``, and
    are undone otherwise.
    """

    committed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Settle:
    """Abandon the epoch in the store; ``settled`` says what it is now. Tried until known, beside
    every other effect.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class Close:
    """Nothing more follows: what was stored is kept if the epoch is committed, else dropped."""

    decision: Decision


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """Start a timer, or start it anew; ``expired`` follows."""

    timer: Timer


@dataclasses.dataclass(frozen=True, slots=True)
class Disarm:
    """Forget a timer."""

    timer: Timer


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """Send an answer to whoever spoke last."""

    answer: Answer


Effect = Do | LetGo | Settle | Close | Arm | Disarm | Reply


@dataclasses.dataclass(slots=True)
class Participant:
    """One member of one epoch. ``done`` counts the steps of the course that are behind it,
    ``busy`` is the one being carried out, ``problem`` why it no longer takes part.
    """

    course: Course
    token: int = 0
    phase: Phase = Phase.TAKING_PART
    done: int = 0
    busy: Step | None = None
    processes: Processes = Processes.RUNNING
    problem: str = ""
    outcome: Decision | None = None

    @classmethod
    def begin(cls, course: Course) -> Participant:
        """One that has heard nothing so far."""
        made = cls(course)
        if made._restores:
            made.processes = Processes.ABSENT
        return made

    def told(self, told: Told) -> list[Effect]:
        """A coordinator spoke."""
        if told.token < self.token:
            return [Reply(Answer(told.step, "a newer coordinator took over"))]
        self.token = told.token
        if told.step is Step.ABORT:
            return self._abort()
        if told.step is Step.FINISH:
            return self._finish()
        if self.phase is not Phase.TAKING_PART:
            return self._refuse(told.step)
        if told.step not in self.course:
            return [Reply(Answer(told.step, f"no step of the course {self.course.name}"))]
        position = self.course.position(told.step)
        alive: list[Effect] = [Arm(Timer.SILENCE)]
        if position < self.done:
            return [*alive, Reply(Answer(told.step))]
        if self.busy is told.step:
            return alive
        if self.busy or position > self.done:
            return [Reply(Answer(told.step, "the steps before it are not done"))]
        self.busy = told.step
        if told.step is Step.FREEZE:
            self.processes = Processes.STOPPED
            alive.append(Arm(Timer.STOPPED))
        return [*alive, Do(told.step)]

    def did(self, step: Step) -> list[Effect]:
        """A step was carried out."""
        if self.busy is not step:
            return []
        self.busy = None
        self.done += 1
        effects: list[Effect] = [Arm(Timer.SILENCE), Reply(Answer(step))]
        if step is Step.RESUME:
            self.processes = Processes.RUNNING
            effects.append(Disarm(Timer.STOPPED))
        if step is Step.END:
            self.processes, self.outcome = Processes.ENDED, Decision.COMMITTED
            effects.append(Disarm(Timer.STOPPED))
        if step is Step.RUN:
            self.processes, self.outcome = Processes.RUNNING, Decision.COMMITTED
        return effects

    def could_not(self, step: Step, why: str) -> list[Effect]:
        """A step failed."""
        if self.busy is not step:
            return []
        self.busy = None
        if step is Step.END:
            # Committed, and not ended: the job goes on where it is.
            self.outcome = Decision.COMMITTED
        if self._restores and step in self.course.after:
            # Only the store knows whether what still stands is to run.
            return [*self._settle(why), Reply(Answer(step, why))]
        return [*self._let_go(why), Reply(Answer(step, why))]

    def expired(self, timer: Timer) -> list[Effect]:
        """A timer ran out."""
        if self.phase in (Phase.LETTING_GO, Phase.CLOSED) or self._past_the_decision:
            return []
        why = {
            Timer.SILENCE: "the coordinator was silent",
            Timer.STOPPED: "the processes stood still for too long",
        }[timer]
        if self.outcome:
            return self._close(self.outcome)  # ended, and nobody came to say FINISH
        if self.phase is Phase.SETTLING:
            # The store does not answer either: the job comes first, the epoch can wait. What is
            # being restored waits with it: others may run.
            return [LetGo()] if self.stopped else []
        if not self._may_be_committed():
            return self._let_go(why)
        return self._settle(why)

    def settled(self, decision: Decision) -> list[Effect]:
        """The store said what the epoch is."""
        if self.phase is not Phase.SETTLING:
            return []
        self.outcome = decision
        return self._let_go(self.problem)

    def let_go(self, *, running: bool = True) -> list[Effect]:
        """The processes run and their traffic flows; if not ``running``, nothing of them is left,
        and it was a restore.
        """
        self.processes = Processes.RUNNING if running else Processes.ABSENT
        if self.phase is not Phase.LETTING_GO:
            return []
        answer = Step.FINISH if self.outcome is Decision.COMMITTED else Step.ABORT
        problem = self._missing if answer is Step.FINISH else ""
        return [*self._close(self.outcome or Decision.ABANDONED), Reply(Answer(answer, problem))]

    @property
    def stopped(self) -> bool:
        """Whether the processes stand still, or may."""
        return self.processes is Processes.STOPPED

    def _may_be_committed(self) -> bool:
        """Whether all that a commit needs of this member was answered for."""
        return self.done >= len(self.course.before)

    @property
    def _restores(self) -> bool:
        return Step.RUN in self.course

    @property
    def _past_the_decision(self) -> bool:
        """Whether it is doing what is told only when the decision is made."""
        return self.busy in self.course.after

    @property
    def _missing(self) -> str:
        """Why nothing runs of a restore that is committed; "" if it does, or is none."""
        if self.processes is not Processes.ABSENT:
            return ""
        return self.problem or "the restored processes are gone"

    def _settle(self, why: str) -> list[Effect]:
        self.phase, self.problem = Phase.SETTLING, why
        return [Settle(), *([Arm(Timer.SILENCE)] if self.stopped else [])]

    def _abort(self) -> list[Effect]:
        if self.phase is Phase.CLOSED:
            problem = "it is committed" if self.outcome is Decision.COMMITTED else ""
            return [Reply(Answer(Step.ABORT, problem))]
        if self.phase is Phase.LETTING_GO or self.outcome or self._past_the_decision:
            return []  # the end of that is the answer
        return self._let_go("the coordinator gave the epoch up")

    def _finish(self) -> list[Effect]:
        if self.phase is Phase.CLOSED:
            problem = self._missing if self.outcome is Decision.COMMITTED else self.problem
            return [Reply(Answer(Step.FINISH, problem))]
        if self.phase is Phase.LETTING_GO or self.busy:
            return []
        if not self._may_be_committed():
            return [Reply(Answer(Step.FINISH, "this member was not captured"))]
        if self.processes is Processes.ABSENT:
            # It never heard that it may run, or could not; the store knows whether it may.
            return [] if self.phase is Phase.SETTLING else self._settle("")
        self.outcome = Decision.COMMITTED
        if self.stopped:
            return self._let_go("")
        return [*self._close(Decision.COMMITTED), Reply(Answer(Step.FINISH))]

    def _refuse(self, step: Step) -> list[Effect]:
        if self._restores and step in self.course.after:
            # What becomes of it is the answer: it may still run.
            closed = self.phase is Phase.CLOSED
            return [Reply(Answer(step, self._missing))] if closed else []
        if self.phase is Phase.CLOSED:
            return [Reply(Answer(step, self.problem or "the epoch is over"))]
        return [Reply(Answer(step, self.problem))] if self.problem else []

    def _let_go(self, why: str) -> list[Effect]:
        self.phase, self.busy = Phase.LETTING_GO, None
        self.problem = self.problem or why
        return [LetGo(committed=self.outcome is Decision.COMMITTED)]

    def _close(self, decision: Decision) -> list[Effect]:
        self.phase, self.outcome = Phase.CLOSED, decision
        return [Disarm(Timer.SILENCE), Disarm(Timer.STOPPED), Close(decision)]
