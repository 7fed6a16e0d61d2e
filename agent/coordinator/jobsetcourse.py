"""The steps by which a JobSet comes back: suspend, resume, restore, with what undoes them.

Promises: before it is to be suspended, whatever fails leaves the JobSet as it was; from then on,
suspended with its intent, by an ``errors.MoveIncomplete`` that says which command goes on; what
passes is tried once more, and an image that cannot be restored is followed by the next one that it
was given.
Does not: look at what stands against it; ``jobsetchecks`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from agent import errors
from agent.cluster import move as cluster_move
from agent.cluster.session import Session
from agent.coordinator import checkpoint, jobsetchecks, restore, takeover
from agent.coordinator.machine import State
from agent.host import clock
from agent.kube import jobsets as kube
from agent.kube.connection import Json
from agent.model import jobset, jobsetrestore, move, optin
from agent.model.intent import Intent
from agent.model.jobsetrestore import Plan, Step
from agent.model.pods import Placement
from agent.model.protocol import Decision
from agent.rpc import epochclient, results

# How often a JobSet and its pods are looked at: short against the seconds that a kubelet takes.
_LOOK_S = 0.25
# A DaemonSet makes a lost pod again within seconds, and an agent is ready a few seconds later.
_AGENTS_S = 60.0
# Beyond a pod's own grace a kubelet needs this long to tell that it is gone.
_GONE_S = 30.0


class Watch:
    """Who looks on: ``step`` is called when one begins, ``state`` with that of the epoch or the
    restore under way, ``passed_over`` with an image that is given up and why. The others are
    called before what they announce is done, which it is not if they raise: ``named`` with an
    epoch to come, ``intends`` with the image that the JobSet shall come back as, ``attempting``
    with the name of a restore; and ``committed`` with an epoch that is.
    """

    def __init__(
        self,
        step: Callable[[Step], None] = lambda step: None,
        state: Callable[[State], None] = lambda state: None,
        passed_over: Callable[[str, str], None] = lambda image, why: None,
        *,
        named: Callable[[epochclient.Epoch], None] = lambda epoch: None,
        committed: Callable[[checkpoint.Checkpoint], None] = lambda done: None,
        intends: Callable[[results.Image], None] = lambda image: None,
        attempting: Callable[[str], None] = lambda attempt: None,
    ) -> None:
        self.step, self.state, self.passed_over = step, state, passed_over
        self.named, self.committed = named, committed
        self.intends, self.attempting = intends, attempting
        self._stop = threading.Event()
        self._control = checkpoint.Control()

    def stop(self) -> None:
        """Ask to give up as long as that is possible."""
        self._stop.set()
        self._control.cancel()

    def go_on(self) -> None:
        """Forget that it was asked to give up: that is possible no longer."""
        self._stop.clear()

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
    """A pod of a group that came back, by its identity: where it was, and where it is."""

    identity: str
    was: Placement
    now: Placement
    lost: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Returned:
    """A group that runs again. ``passed_over`` are newer images and why they could not be
    restored; ``created``: there was no such JobSet any more; ``verified_s`` is from the request to
    the agents until the image was read whole, ``running_s`` until all ran; ``steps`` are seconds.
    """

    image: results.Image
    pods: tuple[Pod, ...]
    passed_over: tuple[tuple[str, str], ...]
    created: bool
    verified_s: float
    running_s: float
    steps: dict[str, float]


class Course:
    """One JobSet on its way: first ``adopt`` or ``create``, then ``run``."""

    def __init__(self, session: Session, plan: Plan, now_s: float, watch: Watch | None) -> None:
        self._session, self._plan, self._now_s = session, plan, now_s
        self._watch = watch or Watch()
        self._uid = ""
        self._created = False
        # Whether it does not run as before, or may not: it was ended, made or is being suspended.
        self._touched = False
        # The image of the intent that is on it.
        self._intended = ""
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
        self._created = self._touched = True
        try:
            self.try_pods(intent, made)
        except BaseException:
            kube.delete(self._session.api, self._plan.namespace, self._plan.name, self._uid)
            raise

    def try_pods(self, intent: Intent, found: Json) -> None:
        """Let admission look at pods that shall come back as ``intent`` says. It has to be on the
        JobSet for that, which may run: it means no other pods, and what was there is put back.

        Raises:
            errors.TargetUnsuitable: they would not wait.
        """
        metadata = found["metadata"]
        before = (metadata.get("annotations") or {}).get(optin.RESTORE)
        trial = dataclasses.replace(intent, only=move.trial_name(str(metadata["name"])))
        try:
            self._change(annotations={optin.RESTORE: trial.text()})
            jobsetchecks.try_pods(self._session, found, trial)
        finally:
            cluster_move.retried(lambda: self._change(annotations={optin.RESTORE: before}))

    def run(self, images: Sequence[results.Image], *, ended: bool = False) -> Returned:
        """Bring it back from the first of ``images`` that can be restored. ``ended``: its processes
        were, and nothing but an image lets it go on.

        Raises:
            errors.MoveIncomplete: it does not run.
            errors.CkptError: before anything was touched.
        """
        waiting = [*images]
        self._touched = self._touched or ended
        self._now = Step.SUSPEND
        while True:
            image = waiting.pop(0)
            try:
                return self._attempt(image)
            except _StillIntended:
                raise
            except errors.CkptError as exc:
                name = jobsetchecks.name_of(image)
                if self._may_retry(exc):
                    waiting.insert(0, image)
                elif waiting and isinstance(exc, (errors.DataError, errors.RestoreFailed)):
                    self._passed.append((name, exc.message))
                    self._watch.passed_over(name, exc.message)
                elif self._touched:
                    raise self._told(image, exc) from exc
                else:
                    raise

    def _may_retry(self, exc: errors.CkptError) -> bool:
        """Whether the same image is tried once more before an older one: it was read whole, and the
        restore may have met with something that passes, such as an agent that was replaced.
        """
        passing = exc.retryable or isinstance(exc, errors.RestoreFailed)
        if self._retried or not passing or self._now is not Step.RESTORE:
            return False
        self._retried = True
        self._session.look_again()
        return True

    def _attempt(self, image: results.Image) -> Returned:
        try:
            return self._brought_back(jobsetchecks.detail_of(self._session, image))
        except errors.CkptError:
            raise
        except BaseException:
            # A defect, or a person who does not wait: it shall not start over behind their back.
            if self._touched:
                self._rest(image)
            raise

    def _brought_back(self, detail: results.ImageDetail) -> Returned:
        intent = jobsetchecks.intent_for(detail, self._plan.nodes)
        with self.timed(Step.SUSPEND):
            self._watch.intends(detail.image)
            self._touched = True
            self._change(suspend=True, annotations={optin.RESTORE: intent.text()})
            self._intended = intent.image
            self._await_rest()
        with self.timed(Step.START):
            self._change(suspend=False)
            waiting = self._await_waiting(intent, detail.image.members)
            self._await_agents({each["spec"]["nodeName"] for each in waiting.values()})
        with self.timed(Step.RESTORE):
            now = {each: jobset.addresses(pod) for each, pod in waiting.items()}
            done = restore.run(
                self._session,
                detail.image.group,
                detail.image.epoch,
                [member(each, pod) for each, pod in sorted(waiting.items())],
                jobsetrestore.moved(detail.pods, now),
                now_s=self._now_s,
                storage=detail.image.storage,
                # Whatever it was restored into before was a pod of this JobSet, and is gone.
                again=True,
                control=self._watch.control(),
                watch=self._watch.state,
                attempting=self._watch.attempting,
            )
        return self._returned(detail, waiting, done)

    def conclude(self, image: results.Image, attempt: str) -> Returned | None:
        """Bring an attempt to its end whose coordinator is gone; None if it is abandoned, and
        nothing of the image runs.

        Raises:
            errors.RestoreFailed: it is committed, and not all of it runs.
            errors.CkptError: what it is cannot be told now.
        """
        detail = jobsetchecks.detail_of(self._session, image)
        seen = jobsetrestore.gathered(
            self._pods(), jobsetchecks.intent_for(detail, ()), image.members
        )
        taken = epochclient.Epoch(self._session.namespace, image.group, image.epoch, image.storage)
        found = takeover.attempt(
            self._session,
            taken,
            attempt,
            [member(each, pod) for each, pod in sorted(seen.waiting.items())],
            now_s=self._now_s,
            watch=self._watch.state,
        )
        if found is Decision.ABANDONED:
            return None
        if not seen.complete:
            missing = [*seen.cold, *seen.homeless, *seen.starting]
            raise errors.RestoreFailed(
                f"the image was let run, and not all of it does: {missing[0]}", reasons=missing
            )
        return self._returned(detail, seen.waiting, restore.Restored((), {}, 0.0, {}))

    def _returned(
        self,
        detail: results.ImageDetail,
        waiting: Mapping[str, jobset.Json],
        done: restore.Restored,
    ) -> Returned:
        """What to tell of a JobSet that runs in the pods that waited."""
        image = jobsetchecks.name_of(detail.image)
        self._forget_intent(image, {each["metadata"]["uid"] for each in waiting.values()})
        now = {each: jobset.addresses(pod) for each, pod in waiting.items()}
        return Returned(
            image=detail.image,
            pods=tuple(
                Pod(
                    each,
                    detail.pods.get(each, Placement("", "", "", ())),
                    placement(pod, now[each]),
                    done.lost.get(each, ()),
                )
                for each, pod in sorted(waiting.items())
            ),
            passed_over=tuple(self._passed),
            created=self._created,
            verified_s=done.spans_s.get(State.PREPARING, 0.0),
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
                hint=f"kubectl -n {plan.namespace} get pods -l {jobset.NAME_LABEL}={plan.name}; a"
                " node that is gone for good keeps its pods until they are deleted with --force",
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

    def _await_agents(self, nodes: Collection[str]) -> None:
        """Wait until the agents of ``nodes`` can be asked: one that was just replaced comes up in
        its own time.
        """
        problem: errors.CkptError | None = None

        def ready() -> bool:
            nonlocal problem
            self._watch.check()
            try:
                for node in nodes:
                    self._session.agent_of(node)
            except (errors.Unreachable, errors.NotFound) as exc:
                problem = exc
                self._session.look_again()
                return False
            return True

        deadline = clock.Deadline.after(_AGENTS_S)
        if not clock.wait_until(ready, deadline, every_s=_LOOK_S) and problem is not None:
            raise problem

    def _forget_intent(self, image: str, restored: Collection[str]) -> None:
        """It runs: what its Jobs make from now on starts as any other pod. ``restored`` are the
        uids of those that run.

        Raises:
            errors.TargetUnsuitable: one was made meanwhile and waits, for nobody would restore it.
        """
        try:
            cluster_move.retried(lambda: self._change(annotations={optin.RESTORE: None}))
            self._intended = ""
            pods = cluster_move.retried(self._pods)
        except errors.CkptError as exc:
            plan = self._plan
            raise _StillIntended(
                f"JobSet {plan.namespace}/{plan.name} runs again, but pods that it made since then"
                f" or makes from now on may wait for image {image}: {exc.message}",
                hint=f"kubectl -n {plan.namespace} annotate jobset {plan.name} {optin.RESTORE}-",
                image=image,
            ) from exc
        late = jobsetrestore.left_waiting(pods, image, restored)
        if late:
            raise errors.TargetUnsuitable(
                f"JobSet made a pod anew when all had begun to run: {late[0]}", reasons=late
            )

    def _told(self, image: results.Image, exc: errors.CkptError) -> errors.MoveIncomplete:
        """The error to raise, after the JobSet was suspended again as far as that is possible."""
        name = jobsetchecks.name_of(image)
        found = jobsetrestore.incomplete(
            self._now, self._plan, name, exc.message, rests=self._rest(image)
        )
        return cluster_move.told(found, name, exc)

    def _rest(self, image: results.Image) -> bool:
        """Suspend it, to come back as ``image``; whether it is suspended, or is no more."""
        name = jobsetchecks.name_of(image)
        said: dict[str, str | None] = {}
        if self._intended != name:
            said[optin.RESTORE] = Intent(name, image.storage).text()
        try:
            cluster_move.retried(lambda: self._change(suspend=True, annotations=said))
        except errors.NotFound:
            return True
        except errors.CkptError:
            return False
        return True


class _StillIntended(errors.MoveIncomplete):
    """All of it runs, and only its intent is still there."""


def member(identity: str, pod: jobset.Json) -> checkpoint.Member:
    """A pod that has a node, as a member of that name."""
    metadata = pod["metadata"]
    return checkpoint.Member(identity, metadata["name"], metadata["uid"], pod["spec"]["nodeName"])


def placement(pod: jobset.Json, addresses: Sequence[str]) -> Placement:
    """Where a pod is."""
    metadata = pod["metadata"]
    return Placement(metadata["name"], metadata["uid"], pod["spec"]["nodeName"], tuple(addresses))
