"""A checkpoint of a group of pods of a cluster: one epoch, from the names of the pods to its end.

Promises: every pod's agent is known and answers before any pod is told anything; the report says
how long each step took; what failed is raised as the error of the member that failed first, with
the member's name; whatever happens, each pod goes on, unless ``course`` ends it after the commit.
A cut that would lose a connection between members, which one of them has not accepted yet, is tried
again before that is put up with.
Does not: know what makes pods a group.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent import errors
from agent.cluster.session import Session
from agent.coordinator.driver import Cancelled, Driver, Limits, Report
from agent.coordinator.links import PATIENCE_S, Call, Links, Mailbox
from agent.coordinator.machine import ASKS, Coordination, State
from agent.coordinator.timing import Timing
from agent.host import clock
from agent.model import jobset
from agent.model.protocol import (
    LEAVE_RUNNING,
    LEAVE_RUNNING_HELD,
    Course,
    Decision,
    Said,
    Step,
    Told,
)
from agent.rpc import epochclient, results

_log = logging.getLogger(__name__)

# Tokens grow with time, so that a coordinator that begins later is obeyed by members of the same
# epoch; the low bits tell two of the same second apart.
_TOKEN_BITS = 20
# Parts of the patience with a silent agent: a call that has nothing to tell comes back after the
# first, and one whose connection breaks is called again for the second: if it has ended, its pod
# runs, and a new one knows nothing of the epoch.
_NOTHING_YET, _ENDED = 0.2, 0.5
# Cuts that are tried again for connections which were not accepted, and what lies between: a
# program accepts within milliseconds, unless it is at something else; the random part keeps the
# next stop from meeting the same moment of something that comes again and again.
_UNACCEPTED_AGAIN = 2
_UNACCEPTED_WAIT_S = (0.05, 0.25)
# What is tried again for them may find that the post hooks of the try before still run in a pod.
_BUSY_S = 60.0
_BUSY_AGAIN_S = 0.5
# More than this many addresses leave no room in a request for what else is in it (epochs.proto).
_MOST_ADDRESSES = 10_000


@dataclasses.dataclass(frozen=True)
class Member:
    """A pod that takes part, its node, and the addresses that are its own."""

    name: str
    pod: str
    uid: str
    node: str
    addresses: tuple[str, ...] = ()


def member(found: jobset.Member) -> Member:
    """Of a pod that was found to be one."""
    return Member(found.identity, found.pod, found.uid, found.node, found.addresses)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A committed epoch. ``stop_s`` is at most how long it was from when the first pod was frozen
    until the last one ran again, or was ended: by the agents' clocks, or where not all of them
    tell, from the word to freeze until the last answer. ``durable_s`` is from the request to the
    commit. ``hook_problems`` are those of hooks that had failed by then, a text for people each.
    ``skew_s`` is how far apart at most the first and the last pod came to stand still, and
    ``slowest_s`` how long the slowest pod's own work took within the stop, as far as all agents
    tell. ``engine`` names what captured the pods.
    """

    image: results.Image
    members: tuple[Member, ...]
    stops: tuple[epochclient.MemberStop, ...]
    stop_s: float
    durable_s: float
    connections: int
    leaving: tuple[tuple[str, str, str], ...]
    spans_s: dict[State, float]
    hook_problems: tuple[str, ...] = ()
    skew_s: float | None = None
    slowest_s: float | None = None
    engine: str = "container"


class Control:
    """Lets somebody else ask a checkpoint to be given up."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self._asked = threading.Event()

    def begin(self) -> Mailbox:
        """An empty mailbox for what begins now: words of members to what was given up before must
        not be taken for answers.
        """
        self.mailbox = Mailbox()
        if self._asked.is_set():
            self.cancel()
        return self.mailbox

    def cancel(self) -> None:
        """Ask; too late once the commit was asked for."""
        self._asked.set()
        self.mailbox.put(Cancelled("interrupted"))

    def check(self, wait_s: float = 0.0) -> None:
        """Raise ``errors.Interrupted`` if that was asked, or is within ``wait_s``."""
        if self._asked.wait(wait_s):
            raise errors.Interrupted("interrupted")


_STANDING = (*(State.FREEZING, State.HOLDING, State.CAPTURING, State.RELEASING, State.RESUMING),)
_STANDING_TO_THE_END = (*_STANDING, State.PERSISTING, State.COMMITTING, State.ENDING)
_BEFORE_COMMIT = (State.PREPARING, State.QUIESCING, *_STANDING, State.PERSISTING, State.COMMITTING)


def run(
    session: Session,
    group: str,
    members: Sequence[Member],
    course: Course,
    *,
    facts: Mapping[str, Any],
    now_s: float,
    storage: str = "",
    limits: Limits | None = None,
    control: Control | None = None,
    watch: Callable[[State], None] = lambda state: None,
    named: Callable[[epochclient.Epoch], None] = lambda epoch: None,
    engine: str = "",
) -> Checkpoint:
    """Take an epoch of ``members`` as ``group``, captured by ``engine`` or whichever each agent
    chooses; ``now_s`` is wall time. ``named`` is called with the epoch's name before any pod is
    told anything; if it raises, none is. Both happen again with another epoch where a connection
    between members was not accepted yet, or where one of them may run while others are read.

    Raises:
        errors.Refused | errors.Unreachable: before any pod was touched.
        errors.Failed | errors.CkptError: given up; every pod goes on.
    """
    began_s = clock.monotonic_s()
    control = control or Control()
    within = tuple(address for each in members for address in each.addresses)
    if len(within) > _MOST_ADDRESSES:
        within = ()
    again, busy = 0, clock.Deadline.after(0.0)
    while True:
        before_s = clock.monotonic_s() - began_s
        try:
            found = _once(
                session,
                group,
                members,
                course,
                facts=facts,
                now_s=now_s + before_s,
                storage=storage,
                limits=limits or Limits(),
                control=control,
                watch=watch,
                named=named,
                within=within if again < _UNACCEPTED_AGAIN else (),
                engine=engine,
            )
        except errors.ConnectionUnaccepted as exc:
            if again == _UNACCEPTED_AGAIN:
                raise
            _log.warning(
                "a connection was not accepted yet; the cut is tried again",
                extra={"facts": {"group": group, "reason": exc.message}},
            )
            again, busy = again + 1, clock.Deadline.after(_BUSY_S)
            control.check(secrets.SystemRandom().uniform(*_UNACCEPTED_WAIT_S))
        except errors.HoldNeeded:
            if course is not LEAVE_RUNNING:
                raise
            course, busy = LEAVE_RUNNING_HELD, clock.Deadline.after(_BUSY_S)
        except errors.TargetBusy:
            if busy.expired:
                raise
            control.check(_BUSY_AGAIN_S)
        else:
            return dataclasses.replace(found, durable_s=found.durable_s + before_s)


def _once(
    session: Session,
    group: str,
    members: Sequence[Member],
    course: Course,
    *,
    facts: Mapping[str, Any],
    now_s: float,
    storage: str,
    limits: Limits,
    control: Control,
    watch: Callable[[State], None],
    named: Callable[[epochclient.Epoch], None],
    within: tuple[str, ...],
    engine: str,
) -> Checkpoint:
    """As ``run``, once. Leave a connection from ``within`` out of no image."""
    namespace, patience_s = session.namespace, session.settings.agent_silence_s
    agents = {each.node: session.agent_of(each.node) for each in members}
    epoch = session.any_agent(lambda agent: agent.epochs.new(namespace, group, storage))
    named(epoch)
    decided: list[epochclient.Decided] = []
    timing = Timing()
    # Of two epochs that are asked for at once, one finds the first pod taken and touches no other:
    # each could take one of the pods else, and neither would get all.
    let_in = threading.Event()

    def call_of(member: Member) -> Call:
        leads = member is members[0]
        pod = epochclient.Pod(
            member.name, member.pod, member.uid, leads=leads, within=within, engine=engine
        )
        epochs = agents[member.node].epochs
        deadline_s = session.settings.dump_deadline_s

        def call(told: Told, wait_s: float) -> Said | None:
            if told.step is Step.PREPARE and not let_in.is_set():
                if not leads and not let_in.wait(wait_s):
                    return None
                wait_s = 0.0
            silent_s = None
            if course.stands(told.step):
                wait_s = min(wait_s, patience_s * _NOTHING_YET)
                silent_s = patience_s - wait_s
            sent_s = clock.monotonic_s()
            said = epochs.take_part(epoch, course, pod, told, wait_s, deadline_s, silent_s=silent_s)
            let_in.set()
            if said is not None:
                timing.heard(member.node, member.name, said, sent_s, clock.monotonic_s())
            return said

        return call

    def decide(wish: Decision, parts: Mapping[int, bytes]) -> Decision:
        given = [parts[each] for each in sorted(parts)]
        found = session.any_agent(lambda agent: agent.epochs.decide(epoch, wish, given, facts))
        decided.append(found)
        return found.decision

    made, mailbox = Coordination(course, len(members), token(now_s)), control.begin()

    def patient_s(step: Step) -> float:
        return patience_s * _ENDED if course.stands(step) else PATIENCE_S

    with Links(mailbox, [call_of(each) for each in members], decide, patient_s).open() as links:
        report = Driver(made, links, mailbox, limits, watch).run()
    if not report.committed:
        raise failed(
            report,
            members,
            errors.DumpFailed,
            "the checkpoint was given up",
            "every pod of the group goes on",
        )
    ends = _STANDING_TO_THE_END if State.ENDING in report.spans_s else _STANDING
    names = [each.name for each in members]
    steps = [ASKS[state] for state in ends if state in report.spans_s and state in ASKS]
    told_s, stood_s = _sum(report, ends), timing.stood_s(steps[0], steps[-1], names)
    return Checkpoint(
        image=decided[-1].image
        or session.any_agent(
            lambda agent: agent.image(namespace, f"{group}@{epoch.name}", epoch.storage)
        ).image,
        members=tuple(members),
        stops=decided[-1].members,
        stop_s=told_s if stood_s is None else min(told_s, stood_s),
        durable_s=_sum(report, _BEFORE_COMMIT),
        connections=decided[-1].connections,
        leaving=decided[-1].leaving,
        spans_s=report.spans_s,
        hook_problems=decided[-1].hook_problems,
        skew_s=timing.skew_s(Step.FREEZE, names),
        slowest_s=timing.longest_s(steps, names),
        engine=decided[-1].engine or "container",
    )


def _sum(report: Report, states: Sequence[State]) -> float:
    return sum(report.spans_s.get(state, 0.0) for state in states)


def token(now_s: float) -> int:
    """What orders a coordinator that begins at ``now_s``, wall time."""
    return (int(now_s) << _TOKEN_BITS) + secrets.randbits(_TOKEN_BITS)


def failed(
    report: Report, members: Sequence[Member], kind: type[errors.Failed], what: str, hint: str
) -> errors.CkptError:
    """The error of what was given up: that of the member that failed first, with its name, or if
    no member did, one of ``kind`` that says ``what``, with ``hint``.
    """
    error = report.error
    where = f" at {members[report.at].name}" if report.at is not None else ""
    if error is None:
        kind = errors.Interrupted if report.cause == "interrupted" else kind
        return kind(f"{what}{where}: {report.cause}", hint=hint)
    found = type(error)(f"{error.message}{where}", hint=error.hint)
    found.facts.update(error.facts)
    if report.at is not None:
        found.facts["member"] = members[report.at].name
    return found
