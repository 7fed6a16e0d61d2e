"""A checkpoint of a group of pods of a cluster: one epoch, from the names of the pods to its end.

Promises: every pod's agent is known and answers before any pod is told anything; the report says
how long each step took; what failed is raised as the error of the member that failed first, with
the member's name; whatever happens, each pod goes on, unless ``course`` ends it after the commit.
Does not: know what makes pods a group.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent import errors
from agent.cluster.session import Session
from agent.coordinator.driver import Cancelled, Driver, Limits, Report
from agent.coordinator.links import Call, Links, Mailbox
from agent.coordinator.machine import Coordination, State
from agent.model.protocol import Course, Decision, Said, Step, Told
from agent.rpc import epochclient, results

# Tokens grow with time, so that a coordinator that begins later is obeyed by members of the same
# epoch; the low bits tell two of the same second apart.
_TOKEN_BITS = 20
# Beyond a second that each call may wait: as long as a member that hears nothing stands still, so
# long do the others at most if it is the one who is silent (``node.session``).
_SILENT_S = 4.0


@dataclasses.dataclass(frozen=True)
class Member:
    """A pod that takes part, and its node."""

    name: str
    pod: str
    uid: str
    node: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A committed epoch. ``stop_s`` is from the word to freeze until the last pod ran again, or
    was ended; ``durable_s`` from the request to the commit. ``hook_problems`` are those of hooks
    that had failed by then, a text for people each.
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


class Control:
    """Lets somebody else ask a checkpoint to be given up."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self._asked = threading.Event()

    def cancel(self) -> None:
        """Ask; too late once the commit was asked for."""
        self._asked.set()
        self.mailbox.put(Cancelled("interrupted"))

    def check(self) -> None:
        """Raise ``errors.Interrupted`` if that was asked."""
        if self._asked.is_set():
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
) -> Checkpoint:
    """Take an epoch of ``members`` as ``group``; ``now_s`` is wall time. ``named`` is called with
    the epoch's name before any pod is told anything; if it raises, none is.

    Raises:
        errors.Refused | errors.Unreachable: before any pod was touched.
        errors.Failed | errors.CkptError: given up; every pod goes on.
    """
    namespace, control = session.namespace, control or Control()
    agents = {each.node: session.agent_of(each.node) for each in members}
    epoch = session.any_agent(lambda agent: agent.epochs.new(namespace, group, storage))
    named(epoch)
    decided: list[epochclient.Decided] = []
    # Of two epochs that are asked for at once, one finds the first pod taken and touches no other:
    # each could take one of the pods else, and neither would get all.
    let_in = threading.Event()

    def call_of(member: Member) -> Call:
        leads = member is members[0]
        pod = epochclient.Pod(member.name, member.pod, member.uid, leads=leads)
        epochs = agents[member.node].epochs
        deadline_s = session.settings.dump_deadline_s

        def call(told: Told, wait_s: float) -> Said | None:
            if told.step is Step.PREPARE and not let_in.is_set():
                if not leads and not let_in.wait(wait_s):
                    return None
                wait_s = 0.0
            silent_s = _SILENT_S if course.stands(told.step) else None
            said = epochs.take_part(epoch, course, pod, told, wait_s, deadline_s, silent_s=silent_s)
            let_in.set()
            return said

        return call

    def decide(wish: Decision, parts: Mapping[int, bytes]) -> Decision:
        given = [parts[each] for each in sorted(parts)]
        found = session.any_agent(lambda agent: agent.epochs.decide(epoch, wish, given, facts))
        decided.append(found)
        return found.decision

    made = Coordination(course, len(members), token(now_s))
    with Links(control.mailbox, [call_of(each) for each in members], decide).open() as links:
        report = Driver(made, links, control.mailbox, limits or Limits(), watch).run()
    if not report.committed:
        raise failed(
            report,
            members,
            errors.DumpFailed,
            "the checkpoint was given up",
            "every pod of the group goes on",
        )
    ends = _STANDING_TO_THE_END if State.ENDING in report.spans_s else _STANDING
    return Checkpoint(
        image=decided[-1].image
        or session.any_agent(
            lambda agent: agent.image(namespace, f"{group}@{epoch.name}", epoch.storage)
        ).image,
        members=tuple(members),
        stops=decided[-1].members,
        stop_s=_sum(report, ends),
        durable_s=_sum(report, _BEFORE_COMMIT),
        connections=decided[-1].connections,
        leaving=decided[-1].leaving,
        spans_s=report.spans_s,
        hook_problems=decided[-1].hook_problems,
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
