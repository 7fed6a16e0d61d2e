"""Epochs and restores whose coordinator is gone, brought to their end by another.

Promises: nothing is decided twice: what the store says holds, and what it says nothing of is
abandoned for good; members that can be told are told at once, the others let their pods go on, or
run what is committed, by themselves (``node.participant``).
Does not: begin anything anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from agent import errors
from agent.cluster.session import Session
from agent.coordinator import checkpoint
from agent.coordinator.driver import Driver, Limits, Report
from agent.coordinator.links import Call, Links
from agent.coordinator.machine import Coordination, State
from agent.model.protocol import RESTORE, Course, Decision, Said, Told
from agent.rpc import client, epochclient


def epoch(
    session: Session,
    taken: epochclient.Epoch,
    members: Sequence[checkpoint.Member],
    course: Course,
    *,
    now_s: float,
    watch: Callable[[State], None] = lambda state: None,
) -> Decision:
    """Settle an epoch: what it is found to be, or abandoned. ``members`` are those that are still
    there to be told; ``now_s`` is wall time.

    Raises:
        errors.CkptError: the store could not be asked.
    """
    asked = session.any_agent(lambda agent: agent.epochs.decide(taken, Decision.ABANDONED))
    _drive(session, taken, members, course, asked.decision, now_s=now_s, watch=watch)
    return asked.decision


def attempt(
    session: Session,
    image: epochclient.Epoch,
    name: str,
    members: Sequence[checkpoint.Member],
    *,
    now_s: float,
    watch: Callable[[State], None] = lambda state: None,
) -> Decision:
    """Settle the attempt ``name`` to restore ``image`` into ``members``, as ``epoch`` does.

    Raises:
        errors.RestoreFailed: with ``facts["committed"]``: it is committed, and not every member
            runs.
        errors.CkptError: the store could not be asked.
    """
    tried = epochclient.Attempt(name, {})
    found = session.any_agent(
        lambda agent: agent.epochs.decide_restore(image, tried, Decision.ABANDONED)
    )
    told, report = _drive(
        session, image, members, RESTORE, found, now_s=now_s, watch=watch, attempt=tried
    )
    reasons = [f"{each.name}: its agent cannot be asked" for each in members if each not in told]
    if found is Decision.COMMITTED and report is not None:
        reasons += [f"{told[i].name}: {error.message}" for i, error in report.late.items()]
        quiet = [i for i in report.silent if i not in report.late]
        reasons += [f"{told[i].name}: it does not say that it runs" for i in quiet]
    if found is Decision.COMMITTED and reasons:
        raise errors.RestoreFailed(
            f"the group was let run, and not all of it does: {'; '.join(reasons[:3])}",
            hint="end what runs of it, then restore again (--again)",
            reasons=reasons,
            committed=True,
        )
    return found


def _drive(
    session: Session,
    taken: epochclient.Epoch,
    members: Sequence[checkpoint.Member],
    course: Course,
    decision: Decision,
    *,
    now_s: float,
    watch: Callable[[State], None],
    attempt: epochclient.Attempt | None = None,
) -> tuple[list[checkpoint.Member], Report | None]:
    """Tell the members what was decided; those that were told, and how that went."""
    told: list[checkpoint.Member] = []
    calls: list[Call] = []
    for each in members:
        with contextlib.suppress(errors.Unreachable, errors.NotFound):
            agent = session.agent_of(each.node)
            calls.append(_call(session, agent, taken, course, each, attempt))
            told.append(each)
    if not calls:
        return told, None
    made, control = Coordination(course, len(calls), checkpoint.token(now_s)), checkpoint.Control()
    with Links(control.mailbox, calls, lambda wish, parts: decision).open() as links:
        driver = Driver(made, links, control.mailbox, Limits(), watch)
        return told, driver.run(take_over=True)


def _call(
    session: Session,
    agent: client.Agent,
    taken: epochclient.Epoch,
    course: Course,
    member: checkpoint.Member,
    attempt: epochclient.Attempt | None,
) -> Call:
    pod = epochclient.Pod(member.name, member.pod, member.uid)
    settings = session.settings
    deadline_s = settings.restore_deadline_s if attempt else settings.dump_deadline_s

    def call(word: Told, wait_s: float) -> Said | None:
        return agent.epochs.take_part(taken, course, pod, word, wait_s, deadline_s, attempt)

    return call
