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

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

from agent import errors
from agent.cluster import move as cluster_move
from agent.cluster.session import Session
from agent.coordinator import checkpoint, jobsetchecks, jobsets, restore
from agent.coordinator.machine import State
from agent.host import clock
from agent.kube import jobsets as kube
from agent.kube.connection import Json
from agent.model import jobset, jobsetrestore, optin
from agent.model.intent import Intent
from agent.model.jobsetrestore import Plan, Step
from agent.model.pods import Placement
from agent.rpc import results

# How often a JobSet and its pods are looked at: short against the seconds that a kubelet takes.
_LOOK_S = 0.25
# Beyond a pod's own grace a kubelet needs this long to tell that it is gone.
_GONE_S = 30.0
# Any name that looks like an epoch's, to let admission look at pods before there is one.
_TRIAL_EPOCH = "20000101-000000-000000"


class Watch:
    """Who looks on: ``step`` is called when one begins, ``state`` with that of the epoch or the
    restore under way, ``passed_over`` with an image that is given up and why.
    """

    def __init__(
        self,
        step: Callable[[Step], None] = lambda step: None,
        state: Callable[[State], None] = lambda state: None,
        passed_over: Callable[[str, str], None] = lambda image, why: None,
    ) -> None:
        self.step, self.state, self.passed_over = step, state, passed_over
        self._stop = threading.Event()
        self._control = checkpoint.Control()

    def stop(self) -> None:
        """Ask to give up as long as that is possible."""
        self._stop.set()
        self._control.cancel()

    def control(self) -> checkpoint.Control:
        """For the next epoch or restore."""
        self._control = checkpoint.Control()
        if self._stop.is_set():
            self._control.cancel()
        return self._control

    def check(self) -> None:
        """Raise ``errors.Interrupted`` if asked to give up."""
        if self._stop.is_set():
            raise errors.Interrupted("interrupted")


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod of a JobSet that came back, by its identity: where it was, and where it is."""

    identity: str
    was: Placement
    now: Placement
    lost: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Returned:
    """A JobSet that runs again. ``passed_over`` are newer images and why they could not be
    restored; ``created``: there was no such JobSet any more; ``steps`` are seconds.
    """

    image: results.Image
    pods: tuple[Pod, ...]
    passed_over: tuple[tuple[str, str], ...]
    created: bool
    running_s: float
    steps: dict[str, float]


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
        errors.Refused | errors.Unreachable | errors.DataError: before anything was touched.
        errors.MoveIncomplete: it does not run yet; the message says which command goes on.
    """
    found = jobsetchecks.existing(session, name)
    jobsetchecks.check_rights(session, "create" if found is None else "")
    images = jobsetchecks.images_of(session, name, epoch, storage)
    course = _Course(session, Plan(session.namespace, name, tuple(nodes), storage), now_s, watch)
    detail = jobsetchecks.first_whole(session, images)
    template = found or detail.jobset
    if template is None:
        raise errors.TargetUnsuitable(
            f"there is no JobSet {session.namespace}/{name}, and the image does not say what it was"
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
        with course.put(intent, found):
            jobsetchecks.try_pods(session, found, intent)
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
    course = _Course(session, Plan(session.namespace, name, tuple(nodes)), now_s, watch)
    course.adopt(found)
    trial = Intent(f"{jobset.group(name)}@{_TRIAL_EPOCH}", "", jobsetrestore.placed(now, nodes))
    with course.put(trial, found, keep=False):
        jobsetchecks.try_pods(session, found, trial)
    with course.timed(Step.DUMP):
        dumped = jobsets.dump(
            session, name, now_s=now_s, stop=True, control=watch.control(), watch=watch.state
        )
    older = jobsetchecks.older(session, name, dumped.image)
    returned = course.run([dumped.image, *_fitting(older, found)])
    return Moved(dumped, returned, course.since_s())


class _Course:
    """One JobSet on its way."""

    def __init__(self, session: Session, plan: Plan, now_s: float, watch: Watch | None) -> None:
        self._session, self._plan, self._now_s = session, plan, now_s
        self._watch = watch or Watch()
        self._uid = ""
        self._created = False
        self._retried = False
        self._began_s = clock.monotonic_s()
        self._now = Step.DUMP
        self._passed: list[tuple[str, str]] = []
        self.seconds: dict[str, float] = {}

    def since_s(self) -> float:
        """Seconds since it began."""
        return clock.monotonic_s() - self._began_s

    @contextlib.contextmanager
    def timed(self, step: Step) -> Iterator[None]:
        """Around a step."""
        self._now = step
        self._watch.check()
        self._watch.step(step)
        began_s = clock.monotonic_s()
        try:
            yield
        finally:
            spent_s = clock.monotonic_s() - began_s
            self.seconds[step.value] = self.seconds.get(step.value, 0.0) + spent_s

    def adopt(self, found: Json) -> None:
        """Take the JobSet that is there."""
        self._uid = str(found["metadata"]["uid"])

    def create(self, template: Json, intent: Intent) -> None:
        """Create it anew, suspended and with its intent; gone again if its pods would not wait."""
        metadata = template["metadata"]
        said = {**(metadata.get("annotations") or {}), optin.RESTORE: intent.text()}
        body = {
            **template,
            "metadata": {**metadata, "annotations": said},
            "spec": {**template["spec"], "suspend": True},
        }
        made = kube.create(self._session.api, self._plan.namespace, body)
        self.adopt(made)
        self._created = True
        try:
            jobsetchecks.try_pods(self._session, made, intent)
        except BaseException:
            kube.delete(self._session.api, self._plan.namespace, self._plan.name, self._uid)
            raise

    @contextlib.contextmanager
    def put(self, intent: Intent, found: Json, *, keep: bool = True) -> Iterator[None]:
        """Put an intent on the JobSet as long as it is only looked at; what was there is put back
        after a failure, or if it is not to be kept.
        """
        before = (found["metadata"].get("annotations") or {}).get(optin.RESTORE)
        self._change(annotations={optin.RESTORE: intent.text()})
        try:
            yield
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                cluster_move.retried(lambda: self._change(annotations={optin.RESTORE: before}))

    def run(self, images: Sequence[results.Image]) -> Returned:
        """Bring it back from the first of ``images`` that can be restored.

        Raises:
            errors.MoveIncomplete: it does not run.
        """
        waiting = [*images]
        while True:
            image = waiting.pop(0)
            try:
                return self._attempt(image)
            except errors.CkptError as exc:
                name = jobsetchecks.name_of(image)
                if self._may_retry(exc):
                    waiting.insert(0, image)
                elif waiting and isinstance(exc, (errors.DataError, errors.RestoreFailed)):
                    self._passed.append((name, exc.message))
                    self._watch.passed_over(name, exc.message)
                else:
                    raise self._told(name, exc) from exc

    def _may_retry(self, exc: errors.CkptError) -> bool:
        """Whether the same image is tried once more: the restore, not the image, met with something
        that passes, such as an agent that was replaced.
        """
        passing = exc.retryable or bool(exc.facts.get("committed"))
        if self._retried or not passing or self._now is not Step.RESTORE:
            return False
        if isinstance(exc, errors.MoveIncomplete):
            return False
        self._retried = True
        return True

    def _attempt(self, image: results.Image) -> Returned:
        try:
            return self._brought_back(jobsetchecks.detail_of(self._session, image))
        except errors.CkptError:
            raise
        except BaseException:
            # A defect, or a person who does not wait: it shall not start over behind their back.
            self._rest()
            raise

    def _brought_back(self, detail: results.ImageDetail) -> Returned:
        intent = jobsetchecks.intent_for(detail, self._plan.nodes)
        with self.timed(Step.SUSPEND):
            self._change(suspend=True, annotations={optin.RESTORE: intent.text()})
            self._await_rest()
        with self.timed(Step.START):
            self._change(suspend=False)
            waiting = self._await_waiting(intent, detail.image.members)
        with self.timed(Step.RESTORE):
            now = {each: jobsetrestore.addresses(pod) for each, pod in waiting.items()}
            done = restore.run(
                self._session,
                detail.image.group,
                detail.image.epoch,
                [_member(each, pod) for each, pod in sorted(waiting.items())],
                jobsetrestore.moved(detail.pods, now),
                now_s=self._now_s,
                storage=detail.image.storage,
                # Whatever it was restored into before was a pod of this JobSet, and is gone.
                again=True,
                control=self._watch.control(),
                watch=self._watch.state,
            )
        self._forget_intent(jobsetchecks.name_of(detail.image))
        return Returned(
            image=detail.image,
            pods=tuple(
                Pod(
                    each,
                    detail.pods.get(each, Placement("", "", "", ())),
                    _placement(pod, now[each]),
                    done.lost.get(each, ()),
                )
                for each, pod in sorted(waiting.items())
            ),
            passed_over=tuple(self._passed),
            created=self._created,
            running_s=done.running_s,
            steps=dict(self.seconds),
        )

    def _change(
        self, suspend: bool | None = None, annotations: dict[str, str | None] | None = None
    ) -> None:
        kube.change(
            self._session.api,
            self._plan.namespace,
            self._plan.name,
            self._uid,
            suspend=suspend,
            annotations=annotations,
        )

    def _pods(self) -> list[Json]:
        return kube.pods(self._session.api, self._plan.namespace, self._plan.name)

    def _await_rest(self) -> None:
        """Wait until JobSet has seen that it is suspended and no pod is left."""
        session, plan = self._session, self._plan
        pods = self._pods()
        graces = [int(each["spec"].get("terminationGracePeriodSeconds") or 0) for each in pods]

        def rests() -> bool:
            self._watch.check()
            with contextlib.suppress(errors.Unreachable):  # it may answer again in time
                found = kube.read(session.api, plan.namespace, plan.name)
                return jobsetrestore.suspended(found, self._pods())
            return False

        deadline = clock.Deadline.after(max(graces, default=0) + _GONE_S)
        if not clock.wait_until(rests, deadline, every_s=_LOOK_S):
            raise errors.DeadlineExceeded(
                f"JobSet {plan.namespace}/{plan.name} was suspended, and pods of it are left",
                hint=f"kubectl -n {plan.namespace} get pods -l {jobset.NAME_LABEL}={plan.name}",
            )

    def _await_waiting(self, intent: Intent, members: Sequence[str]) -> dict[str, jobset.Json]:
        """Wait until every pod waits for the image; the pods by identity."""
        settings = self._session.settings
        scheduled = clock.Deadline.after(settings.schedule_deadline_s)
        started = clock.Deadline.after(settings.schedule_deadline_s + settings.restore_deadline_s)
        seen = jobsetrestore.gathered((), intent, members)

        def waits() -> bool:
            nonlocal seen
            self._watch.check()
            with contextlib.suppress(errors.Unreachable):  # it may answer again in time
                seen = jobsetrestore.gathered(self._pods(), intent, members)
            return seen.complete or bool(seen.cold) or (scheduled.expired and bool(seen.homeless))

        clock.wait_until(waits, started, every_s=_LOOK_S)
        if seen.cold:
            raise errors.TargetUnsuitable(
                f"JobSet made a pod that does not wait: {seen.cold[0]}", reasons=list(seen.cold)
            )
        if not seen.complete:
            missing = [*seen.homeless, *seen.starting]
            raise errors.DeadlineExceeded(
                f"not all pods came up in time: {missing[0]}",
                hint="make room, or choose other nodes",
                reasons=missing,
            )
        return seen.waiting

    def _forget_intent(self, image: str) -> None:
        """It runs: what its Jobs make from now on starts as any other pod."""
        try:
            cluster_move.retried(lambda: self._change(annotations={optin.RESTORE: None}))
        except errors.CkptError as exc:
            plan = self._plan
            raise _StillIntended(
                f"JobSet {plan.namespace}/{plan.name} runs again, but pods that it makes from now"
                f" on would wait for image {image}: {exc.message}",
                hint=f"kubectl -n {plan.namespace} annotate jobset {plan.name} {optin.RESTORE}-",
                image=image,
            ) from exc

    def _told(self, image: str, exc: errors.CkptError) -> errors.MoveIncomplete:
        """The error to raise, after the JobSet was suspended again as far as that is possible."""
        if isinstance(exc, _StillIntended):
            return exc
        found = jobsetrestore.incomplete(
            self._now, self._plan, image, exc.message, rests=self._rest()
        )
        return cluster_move.told(found, image, exc)

    def _rest(self) -> bool:
        """Suspend it; whether it is, or is no more."""
        try:
            cluster_move.retried(lambda: self._change(suspend=True))
        except errors.NotFound:
            return True
        except errors.CkptError:
            return False
        return True


class _StillIntended(errors.MoveIncomplete):
    """All of it runs, and only its intent is still there."""


def _fitting(images: Sequence[results.Image], found: Json) -> list[results.Image]:
    """Those of ``images`` that are of as many pods as the JobSet makes."""
    return [each for each in images if not jobsetrestore.mismatches(found, each.members)]


def _member(identity: str, pod: jobset.Json) -> checkpoint.Member:
    metadata = pod["metadata"]
    return checkpoint.Member(identity, metadata["name"], metadata["uid"], pod["spec"]["nodeName"])


def _placement(pod: jobset.Json, addresses: Sequence[str]) -> Placement:
    metadata = pod["metadata"]
    return Placement(metadata["name"], metadata["uid"], pod["spec"]["nodeName"], tuple(addresses))
