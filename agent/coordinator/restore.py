"""A restore of a group of pods of a cluster: one attempt, from the placeholders to the end.

Promises: as ``checkpoint``; before the attempt is committed nothing of the image runs, and whatever
fails leaves placeholders that wait. Of several attempts at an image at the same time, at most one
is committed.
Does not: make placeholders, choose nodes, or try another image.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence

from agent import errors
from agent.cluster.session import Session
from agent.coordinator import checkpoint
from agent.coordinator.driver import Driver, Limits, Report
from agent.coordinator.links import Call, Links
from agent.coordinator.machine import Coordination, State
from agent.host import clock
from agent.model.protocol import RESTORE, Decision, Said, Told
from agent.rpc import epochclient

_ATTEMPT_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Restored:
    """A group that runs again. ``running_s`` is from the request until all of it ran; ``lost`` are
    the peers of the connections that were reset, by the member's name.
    """

    members: tuple[checkpoint.Member, ...]
    lost: dict[str, tuple[str, ...]]
    running_s: float
    spans_s: dict[State, float]


_UNTIL_RUNNING = (
    *(State.PREPARING, State.FILLING, State.STANDING),
    *(State.COMMITTING, State.SETTLING, State.RELEASING, State.RUNNING),
)


def run(
    session: Session,
    group: str,
    epoch: str,
    members: Sequence[checkpoint.Member],
    moved: Mapping[str, str],
    *,
    now_s: float,
    storage: str = "",
    again: bool = False,
    limits: Limits | None = None,
    control: checkpoint.Control | None = None,
    watch: Callable[[State], None] = lambda state: None,
    attempting: Callable[[str], None] = lambda attempt: None,
) -> Restored:
    """Restore ``group`` as it was at ``epoch`` into ``members``, which are placeholders; ``moved``
    has for each address of a pod of the image the one that takes its place, ``now_s`` is wall time.
    ``attempting`` is called with the attempt's name before any pod is told anything; if it raises,
    none is.

    Raises:
        errors.Refused | errors.Unreachable | errors.DataError | errors.Failed | errors.CkptError:
            given up; nothing of the image runs, and the placeholders wait on.
        errors.RestoreFailed: with ``facts["committed"]``: the attempt is committed, and not every
            member runs; those that do are to be ended, and the image can be restored ``again``.
    """
    control = control or checkpoint.Control()
    agents = {each.node: session.agent_of(each.node) for each in members}
    image = epochclient.Epoch(session.namespace, group, epoch, storage)
    attempt = epochclient.Attempt(secrets.token_hex(_ATTEMPT_BYTES), moved, again)
    attempting(attempt.name)
    uids = [each.uid for each in members]
    deadline_s = session.settings.restore_deadline_s
    deadline = clock.Deadline.after(deadline_s)
    stood: dict[int, bytes] = {}

    def call_of(member: checkpoint.Member) -> Call:
        leads = member is members[0]
        pod = epochclient.Pod(member.name, member.pod, member.uid, leads=leads)
        epochs = agents[member.node].epochs

        def call(told: Told, wait_s: float) -> Said | None:
            return epochs.take_part(image, RESTORE, pod, told, wait_s, deadline_s, attempt)

        return call

    def decide(wish: Decision, parts: Mapping[int, bytes]) -> Decision:
        stood.update(parts)
        if wish is Decision.COMMITTED:
            # No agent lets its processes stand for much longer.
            deadline.check("the restore")
        return session.any_agent(
            lambda agent: agent.epochs.decide_restore(image, attempt, wish, uids)
        )

    made = Coordination(RESTORE, len(members), checkpoint.token(now_s))
    with Links(control.mailbox, [call_of(each) for each in members], decide).open() as links:
        report = Driver(made, links, control.mailbox, limits or Limits(), watch).run()
    if not report.committed:
        raise checkpoint.failed(
            report,
            members,
            errors.RestoreFailed,
            "the restore was given up",
            "nothing of the image runs, the placeholders wait",
        )
    if report.late or report.silent:
        raise _incomplete(report, members)
    return Restored(
        members=tuple(members),
        lost={members[i].name: tuple(part.decode().splitlines()) for i, part in stood.items()},
        running_s=sum(report.spans_s.get(state, 0.0) for state in _UNTIL_RUNNING),
        spans_s=report.spans_s,
    )


def _incomplete(report: Report, members: Sequence[checkpoint.Member]) -> errors.RestoreFailed:
    """The error of a restore that is committed, and of which not all runs."""
    reasons = [f"{members[i].name}: {error.message}" for i, error in sorted(report.late.items())]
    quiet = [i for i in report.silent if i not in report.late]
    reasons += [f"{members[i].name}: it does not say that it runs" for i in quiet]
    return errors.RestoreFailed(
        f"the group was let run, and not all of it does: {'; '.join(reasons[:3])}",
        hint="end what runs of it, then restore again (--again)",
        reasons=reasons,
        committed=True,
    )
