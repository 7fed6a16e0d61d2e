"""The words of the protocol that cuts a group, or brings one back: what a coordinator asks of
members, in what order.

An epoch of a group follows a *course*: steps that every member does before the commit, and steps
that follow it. All members finish a step before any is told the next. The commit is a decision in
the store that is made once: the epoch's name is taken either by its manifest (committed) or by a
blob that says it never will be (abandoned). Whoever must know the outcome of an epoch whose
coordinator is silent takes the name for "abandoned" himself, and learns from a failure that it is
committed. So nobody ever waits for a dead coordinator, and no two can disagree. An attempt to
restore an epoch follows a course as well, and is decided in the same way under a name of its own.

Promises: pure data; both halves (``coordinator.machine``, ``node.participant``) are built on it.
Does not: know how messages travel, or how long anything may take.
"""

from __future__ import annotations

import dataclasses
import enum

from agent import errors


class Step(enum.Enum):
    """What a member is told to do. Told again, it answers again."""

    PREPARE = "prepare"
    """Look at everything that could stand in the way; reserve; copy ahead. The job runs."""

    QUIESCE = "quiesce"
    """Run the pre hooks. The job runs."""

    FREEZE = "freeze"
    """Stop the processes; nothing is read yet."""

    HOLD = "hold"
    """Let nothing through to or from others. A step of its own only where a member may be read
    while it runs.
    """

    CAPTURE = "capture"
    """Let nothing through, then read the processes while they stand still. What was on the wire
    when the last of them froze has arrived, or is sent again.
    """

    RELEASE = "release"
    """Let traffic through again."""

    RESUME = "resume"
    """Let the processes run, then run the post hooks."""

    PERSIST = "persist"
    """Have everything of the member durable, its manifest included."""

    END = "end"
    """End the processes; told only when the epoch is committed, and checked once more."""

    FILL = "fill"
    """Put the member's files in place; none of its processes exists."""

    STAND = "stand"
    """Make the processes, complete and silent; none of them runs."""

    RUN = "run"
    """Let the processes run. Like RELEASE in a restore it is told only when the attempt is
    committed, and that is checked once more.
    """

    FINISH = "finish"
    """The epoch is committed: nothing of it needs protection any more."""

    ABORT = "abort"
    """Let the processes go on as if nothing had been, and drop what was stored; of a restore,
    leave nothing of them.
    """


@dataclasses.dataclass(frozen=True)
class Course:
    """The steps of an epoch: all of ``before`` the commit, ``after`` it."""

    name: str
    before: tuple[Step, ...]
    after: tuple[Step, ...]

    def position(self, step: Step) -> int:
        """Where a step stands in the course, from 0; ABORT, which may come anywhere, has none.

        Raises:
            ValueError: the course does not have it.
        """
        return (*self.before, *self.after).index(step)

    def stands(self, step: Step) -> bool:
        """Whether processes that ran stand still while all members do this step."""
        if Step.FREEZE not in self or step not in self:
            return False
        last = Step.RESUME if Step.RESUME in self else Step.END
        return self.position(Step.FREEZE) <= self.position(step) <= self.position(last)

    def __contains__(self, step: Step) -> bool:
        return step in self.before or step in self.after


LEAVE_RUNNING = Course(
    "leave-running",
    before=(
        *(Step.PREPARE, Step.QUIESCE, Step.FREEZE),
        *(Step.CAPTURE, Step.RELEASE, Step.RESUME, Step.PERSIST),
    ),
    after=(Step.FINISH,),
)
"""A checkpoint: the job stands still from FREEZE to RESUME and persists while it runs.

When the first member is read all stand still, so nobody writes any more, and what each has received
stays as it is from its own hold on until all were read. A sender that is read earlier than its
receiver holds has forgotten no more than that one had received by then; one that is read later, no
more than that one ever received (``model.cut``). So nobody waits for the holds of the others.
"""

LEAVE_RUNNING_HELD = Course(
    "leave-running-held",
    before=(
        *(Step.PREPARE, Step.QUIESCE, Step.FREEZE, Step.HOLD),
        *(Step.CAPTURE, Step.RELEASE, Step.RESUME, Step.PERSIST),
    ),
    after=(Step.FINISH,),
)
"""A checkpoint of members of which some may run while others are read: all hold before any is."""

EVACUATE = Course(
    "evacuate",
    before=(
        *(Step.PREPARE, Step.QUIESCE, Step.FREEZE),
        *(Step.CAPTURE, Step.PERSIST),
    ),
    after=(Step.END, Step.FINISH),
)
"""A move: the job stands still from FREEZE on and is ended once its image is committed."""

RESTORE = Course(
    "restore",
    before=(Step.PREPARE, Step.FILL, Step.STAND),
    after=(Step.RELEASE, Step.RUN, Step.FINISH),
)
"""The way back: nothing runs before all of it stands, the attempt is committed, and all hear: what
is said to somebody who does not hear yet is said again only a second later.
"""

COURSES = {course.name: course for course in (LEAVE_RUNNING, LEAVE_RUNNING_HELD, EVACUATE, RESTORE)}


class Decision(enum.Enum):
    """What became of an epoch, or of an attempt to restore one; made once, in the store."""

    COMMITTED = "committed"
    ABANDONED = "abandoned"


@dataclasses.dataclass(frozen=True, slots=True)
class Told:
    """A coordinator's message to a member. Coordinators are ordered by ``token``; a member obeys
    none that is older than one it has heard.
    """

    step: Step
    token: int


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A member's message to a coordinator: ``step`` is done, or ``problem`` says why it is not and
    never will be. ``step`` is the one that was asked about.
    """

    step: Step
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Times:
    """Seconds on a member's own clock: when it heard the word, when the answer left, and between
    which the step was carried out (0: it was not).
    """

    heard_s: float
    answered_s: float
    began_s: float = 0.0
    done_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """An answer with what belongs to it: the error behind a problem, and the ``part`` that a step
    gave: for PERSIST what the commit needs of this member, which only the store reads; for STAND
    what a restore has to tell of it. ``times`` are only there from members that tell.
    """

    answer: Answer
    error: errors.CkptError | None = None
    part: bytes = b""
    times: Times | None = None
