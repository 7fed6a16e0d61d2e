"""A JobSet's way back: on other nodes, with other addresses, all of its pods at one instant.

JobSet itself makes the pods: it is suspended and resumed with an intent on it (``model.intent``),
by which admission makes each new pod wait. Nothing of a pod's template changes.

Promises: what can be known to stand in the way is looked at before anything is touched; the JobSet
never starts over: a pod that does not wait, or any failure, leaves it suspended with an error that
says which command goes on; an image that turns out damaged, or cannot be restored, is passed over
for an older one of the same JobSet where the caller named none.
Does not: stop what Kueue or another controller manages, or know how an image is restored
(``restore``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from agent import errors
from agent.cluster import move as cluster_move
from agent.cluster.session import Session
from agent.coordinator import checkpoint, jobsetchecks, jobsets
from agent.coordinator.jobsetcourse import Course, Returned, Watch
from agent.kube import jobsets as kube
from agent.kube.connection import Json
from agent.model import jobset, jobsetrestore, move, optin
from agent.model.intent import Intent
from agent.model.jobsetrestore import Plan, Step
from agent.rpc import results


@dataclasses.dataclass(frozen=True)
class Moved:
    """A JobSet that runs elsewhere. ``away_s`` is from the request to stop until it ran again."""

    dump: checkpoint.Checkpoint
    returned: Returned
    away_s: float


def bring_back(
    session: Session,
    name: str,
    *,
    epoch: str = "",
    nodes: Sequence[str] = (),
    storage: str = "",
    replace: bool = False,
    now_s: float,
    watch: Watch | None = None,
) -> Returned:
    """Restore the JobSet ``name`` from its newest image, or from that of ``epoch``, on ``nodes``
    (none: where the scheduler likes). ``replace`` ends what runs of it first.

    Raises:
        errors.Refused | errors.Unreachable | errors.DataError | errors.Interrupted: before
            anything was touched.
        errors.MoveIncomplete: it does not run yet; the message says which command goes on.
    """
    found = jobsetchecks.existing(session, name)
    jobsetchecks.check_rights(session, "create" if found is None else "")
    images = jobsetchecks.images_of(session, name, epoch, storage)
    course = Course(session, Plan(session.namespace, name, tuple(nodes), storage), now_s, watch)
    detail = jobsetchecks.first_whole(session, images)
    template = found or detail.jobset
    if template is None:
        raise errors.TargetUnsuitable(
            f"there is no JobSet {session.namespace}/{name}, and the image does not say what it"
            " was",
            hint="only a dump by somebody who may create JobSets says it: create it anew,"
            " suspended, and restore again",
        )
    pods = kube.pods(session.api, session.namespace, name)
    jobsetchecks.check(session, template, pods, detail, nodes)
    if found is not None and jobsetrestore.running(found, pods) and not replace:
        raise errors.RestoreConflict(
            f"JobSet {session.namespace}/{name} is not suspended",
            hint="--replace ends what runs of it, and brings it back as the image has it",
            reasons=[],
        )
    intent = jobsetchecks.intent_for(detail, nodes)
    if found is None:
        course.create(template, intent)
    else:
        course.adopt(found)
        course.try_pods(intent, found)
    return course.run(_fitting(images, template))


def migrate(
    session: Session,
    name: str,
    nodes: Sequence[str],
    *,
    now_s: float,
    watch: Watch | None = None,
) -> Moved:
    """Move the JobSet ``name`` to ``nodes``: pods that are on one node stay together.

    Raises:
        errors.Refused | errors.Unreachable: before anything was touched.
        errors.Failed: the dump failed; every pod goes on.
        errors.MoveIncomplete: after the commit; the image is safe.
    """
    watch = watch or Watch()
    found = kube.read(session.api, session.namespace, name)
    jobsetchecks.check_rights(session, "dump")
    pods = kube.pods(session.api, session.namespace, name)
    made = jobset.membership(found, pods)
    now = {each.identity: each.node for each in made.members}
    if jobsetrestore.placed(now, nodes) == now:
        raise errors.InvalidInput(
            f"the pods of JobSet {session.namespace}/{name} already run there",
            hint="name other nodes, or the same in another order",
        )
    jobsetchecks.refuse(session, name, jobsetrestore.objections(found))
    jobsetchecks.check_nodes(session, found, nodes)
    course = Course(session, Plan(session.namespace, name, tuple(nodes)), now_s, watch)
    course.adopt(found)
    trial = Intent(f"{jobset.group(name)}@{move.TRIAL_EPOCH}", "", jobsetrestore.placed(now, nodes))
    course.try_pods(trial, found)
    with course.timed(Step.DUMP):
        dumped = jobsets.dump(
            session,
            name,
            now_s=now_s,
            stop=True,
            control=watch.control(),
            watch=watch.state,
            named=watch.named,
        )
    watch.committed(dumped)
    older = jobsetchecks.older(session, name, dumped.image)
    returned = course.run([dumped.image, *_fitting(older, found)], ended=True)
    return Moved(dumped, returned, course.since_s())


def go_on(
    session: Session,
    found: Json,
    image: results.Image,
    nodes: Sequence[str],
    *,
    attempt: str = "",
    now_s: float,
    watch: Watch | None = None,
) -> Returned:
    """Bring back the JobSet ``found``, which stands still since another coordinator ended or
    suspended it to come back as ``image``. ``attempt`` is a restore that it had begun; if that is
    committed, it is brought to its end.

    Raises:
        errors.MoveIncomplete: it does not run yet; the message says which command goes on.
    """
    plan = Plan(session.namespace, str(found["metadata"]["name"]), tuple(nodes))
    course = Course(session, plan, now_s, watch)
    course.adopt(found)
    if attempt:
        returned = _concluded(course, plan, image, attempt)
        if returned is not None:
            return returned
    return course.run([image], ended=True)


def _concluded(course: Course, plan: Plan, image: results.Image, attempt: str) -> Returned | None:
    """None: it does not run, or not all of it does, and what does is ended with the rest."""
    try:
        found: Returned | None = cluster_move.retried(lambda: course.conclude(image, attempt))
    except errors.RestoreFailed:
        return None
    except errors.MoveIncomplete:
        raise
    except errors.CkptError as exc:
        name = f"{image.group}@{image.epoch}"
        where = f"-n {plan.namespace}"
        raise errors.MoveIncomplete(
            f"JobSet {plan.namespace}/{plan.name} was let run from image {name}, and it cannot be"
            f" told whether all of it does: {exc.message}",
            hint=f"if it runs: kubectl {where} annotate jobset {plan.name} {optin.RESTORE}-; if"
            f" not: ckpt-agent restore jobset/{plan.name}@{image.epoch} {where} --replace",
            image=name,
        ) from exc
    return found


def _fitting(images: Sequence[results.Image], found: Json) -> list[results.Image]:
    """Those of ``images`` that are of as many pods as the JobSet makes."""
    return [each for each in images if not jobsetrestore.mismatches(found, each.members)]
