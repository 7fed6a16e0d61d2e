"""A pod's way to another node: dump with stop, delete, create, schedule, restore.

Promises: everything that can be known to stand in the way is looked at while the pod still runs;
nothing is deleted before the image is committed; from then on every failure is an
``errors.MoveIncomplete`` that says what exists where and which command goes on.
Does not: decide what counts; ``model.move`` does. Nor move what a controller owns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from agent import errors
from agent.cluster import objections, pods
from agent.cluster.session import Session
from agent.host import clock
from agent.kube import objects
from agent.kube.connection import Json
from agent.model import move, optin
from agent.model import pods as model_pods
from agent.rpc import results

# Its processes have ended, or are not wanted any more; the kubelet still confirms.
_GRACE_S = 1
# A call that may succeed when tried again is: the job stands still meanwhile, so not for long.
_TRIES = 3
_PAUSE_S = 2.0


@dataclasses.dataclass(frozen=True)
class Moved:
    """A pod that runs on another node. ``away_s`` is from the request to stop until it ran
    again; ``steps`` are the seconds of each step by its name.
    """

    dump: results.DumpOutcome
    restore: results.RestoreOutcome
    source: str
    target: str
    uid: str
    away_s: float
    steps: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A pod that runs an image's processes again."""

    outcome: results.RestoreOutcome
    pod: str
    uid: str
    node: str


@dataclasses.dataclass(frozen=True)
class Watch:
    """Who looks on: ``step`` is called when one begins, ``phase`` and ``bytes`` as the agent
    tells, ``cancel`` is set to give up as long as that is possible.
    """

    cancel: threading.Event = dataclasses.field(default_factory=threading.Event)
    step: Callable[[move.Step], None] = lambda step: None
    phase: Callable[[str, int], None] = lambda phase, raw_bytes: None

    def check(self) -> None:
        """Raise ``errors.Interrupted`` if asked to give up."""
        if self.cancel.is_set():
            raise errors.Interrupted("interrupted")


def migrate(
    session: Session, name: str, node: str, *, engine: str | None = None, watch: Watch | None = None
) -> Moved:
    """Move the pod ``name`` to ``node``.

    Raises:
        errors.Refused | errors.Unreachable: before anything was touched.
        errors.Failed: the dump failed; the pod goes on.
        errors.MoveIncomplete: after the commit; the image is safe.
    """
    watch = watch or Watch()
    objections.check_own_rights(session, dump=True)
    found = pods.running(session, name)
    source = str(found["spec"]["nodeName"])
    agent = session.agent_of(source)
    objections.check(session, found, node, agent)
    # Also shows that the target's agent answers this caller, before anything stops.
    before = session.agent_of(node).images(session.namespace, name)
    steps = _Steps(watch)
    waits = not move.not_waiting(found, move.members(found))
    plan = move.Move(session.namespace, name, source, node, waits=waits)
    with _committed_after_all(session, plan, before), steps.timed(move.Step.DUMP):
        dumped = pods.dump_running(
            session,
            agent,
            found,
            engine=engine,
            stop=True,
            cancel=watch.cancel,
            progress=watch.phase,
        )
    image = _name(dumped.image)
    template = dumped.pod_template or model_pods.template(found)
    with _incomplete(steps, plan, image), steps.timed(move.Step.DELETE):
        uid = str(found["metadata"]["uid"])
        retried(lambda: objects.delete_pod(session.api, session.namespace, name, uid, _GRACE_S))
        objects.await_gone(session.api, session.namespace, name, uid, _GRACE_S, watch.check)
    restored = _bring_up(session, template, plan, dumped.image, steps, watch, again=False)
    return Moved(
        dump=dumped,
        restore=restored.outcome,
        source=source,
        target=restored.node,
        uid=restored.uid,
        away_s=steps.since_s(),
        steps=steps.seconds,
    )


@contextlib.contextmanager
def _committed_after_all(
    session: Session, plan: move.Move, before: Sequence[results.Image]
) -> Iterator[None]:
    """A dump with stop that fails after its commit may have ended the processes: then the image is
    what is left of the job, and the caller must hear of it.
    """
    try:
        yield
    except errors.CkptError as exc:
        known = {_name(image) for image in before}
        try:
            after = session.any_agent(lambda agent: agent.images(session.namespace, plan.pod))
        except errors.CkptError:
            raise exc from None
        new = [_name(image) for image in after if _name(image) not in known]
        if not new:
            raise
        raise told(
            move.incomplete(move.Step.DUMP, plan, new[-1], exc.message), new[-1], exc
        ) from exc


def _name(image: results.Image) -> str:
    return f"{image.group}@{image.epoch}"


def restore_on(
    session: Session,
    image: str,
    node: str,
    *,
    storage: str = "",
    replace: bool = False,
    again: bool = False,
    watch: Watch | None = None,
) -> Restored:
    """Start the pod that ``image`` was taken of on ``node``, as it was. ``replace`` deletes a pod
    of its name first; ``storage`` is where the image lies, "" wherever it does.

    Raises:
        errors.Refused | errors.Unreachable: before anything was touched.
        errors.MoveIncomplete: the pod was created and does not run yet.
    """
    watch = watch or Watch()
    objections.check_own_rights(session, dump=False)
    detail = session.any_agent(lambda agent: agent.image(session.namespace, image, storage))
    name = _name(detail.image)
    if detail.image.damage:
        raise errors.Corrupt(f"image {name} is damaged: {detail.image.damage}")
    template = detail.pod_template
    if template is None:
        raise errors.TargetUnsuitable(
            f"image {name} was not taken of a pod",
            hint="bring it back on a host, with ckpt-agent restore and the store's path",
        )
    if detail.obstacles:
        raise errors.RestoreConflict(
            f"image {name} cannot be restored",
            hint="nothing was touched; ckpt-agent export gives it to a container runtime",
            reasons=list(detail.obstacles),
        )
    if detail.restored_into and not again:
        raise errors.RestoreConflict(
            f"image {name} was restored before, into the pod with uid {detail.restored_into}",
            hint="two copies of one job may destroy each other's results: --again if that is meant",
            reasons=[],
        )
    pod = str(template["metadata"]["name"])
    old = _existing(session, pod)
    if old is not None and not replace:
        raise errors.RestoreConflict(
            f"pod {session.namespace}/{pod} exists ({old.get('status', {}).get('phase')})",
            hint="--replace deletes it first; --pod restores into it if it waits for this image",
            reasons=[],
        )
    objections.check_node(session, template, node)
    objections.check_admitted(session, template, detail.image.members, node, pod)
    session.agent_of(node).images(session.namespace, pod)
    plan = move.Move(session.namespace, pod, "", node)
    steps = _Steps(watch)
    if old is not None:
        with steps.timed(move.Step.DELETE):
            uid = str(old["metadata"]["uid"])
            grace_s = int(old["spec"].get("terminationGracePeriodSeconds") or 0)
            objects.delete_pod(session.api, session.namespace, pod, uid, None)
            objects.await_gone(session.api, session.namespace, pod, uid, grace_s, watch.check)
    return _bring_up(session, template, plan, detail.image, steps, watch, again=again)


def restore_into(
    session: Session,
    image: str,
    pod: str,
    *,
    storage: str = "",
    again: bool = False,
    watch: Watch | None = None,
) -> Restored:
    """Restore ``image`` into a pod that waits for it.

    Raises:
        errors.CkptError: as the agent of the pod's node says; the pod then waits on.
    """
    watch = watch or Watch()
    deadline = clock.Deadline.after(session.settings.schedule_deadline_s)
    found = objects.pod(session.api, session.namespace, pod)
    uid = str(found["metadata"]["uid"])
    node = objects.await_scheduled(session.api, session.namespace, pod, uid, deadline, watch.check)
    watch.step(move.Step.RESTORE)
    outcome = _restore(session, image, storage, pod, uid, node, again=again, watch=watch)
    return Restored(outcome, pod, uid, node)


def _existing(session: Session, name: str) -> Json | None:
    try:
        return objects.pod(session.api, session.namespace, name)
    except errors.NotFound:
        return None


def _bring_up(
    session: Session,
    template: Json,
    plan: move.Move,
    image: results.Image,
    steps: _Steps,
    watch: Watch,
    *,
    again: bool,
) -> Restored:
    api, namespace = session.api, session.namespace
    name = _name(image)
    with _incomplete(steps, plan, name):
        with steps.timed(move.Step.CREATE):
            body = move.replacement(template, image=name, members=image.members, node=plan.target)
            uid = retried(lambda: _created(session, body, image.members))
        with steps.timed(move.Step.SCHEDULE):
            deadline = clock.Deadline.after(session.settings.schedule_deadline_s)
            node = objects.await_scheduled(api, namespace, plan.pod, uid, deadline, watch.check)
        with steps.timed(move.Step.RESTORE):
            outcome = retried(
                lambda: _restore(
                    session, name, image.storage, plan.pod, uid, node, again=again, watch=watch
                )
            )
    return Restored(outcome, plan.pod, uid, node)


def _created(session: Session, body: Json, members: Collection[str]) -> str:
    """Create the replacement and return its uid; one that an earlier try created counts. One that
    would not wait is deleted at once: nobody wants the job to start from its beginning.
    """
    try:
        made = objects.create_pod(session.api, session.namespace, body)
    except errors.Conflict:
        made = _existing(session, body["metadata"]["name"]) or {"metadata": {}}
        wanted = body["metadata"]["annotations"][optin.RESTORE]
        if (made["metadata"].get("annotations") or {}).get(optin.RESTORE) != wanted:
            raise
    uid = str(made["metadata"]["uid"])
    reasons = move.not_waiting(made, members)
    if reasons:
        objects.delete_pod(session.api, session.namespace, body["metadata"]["name"], uid, 0)
        raise errors.TargetUnsuitable(
            f"the replacement would not have waited for the image: {'; '.join(reasons)}",
            hint="it was deleted again",
            reasons=reasons,
        )
    return uid


def _restore(
    session: Session,
    image: str,
    storage: str,
    pod: str,
    uid: str,
    node: str,
    *,
    again: bool,
    watch: Watch,
) -> results.RestoreOutcome:
    return session.agent_of(node).restore(
        session.namespace,
        image,
        pod,
        pod_uid=uid,
        storage=storage,
        again=again,
        deadline_s=session.settings.restore_deadline_s,
        cancel=watch.cancel,
        progress=lambda phase: watch.phase(phase, 0),
    )


def retried(act: Callable[[], Any]) -> Any:
    """Do what the job now waits for, again where that may help."""
    for _ in range(_TRIES - 1):
        try:
            return act()
        except errors.CkptError as exc:
            if not exc.retryable:
                raise
        clock.wait_until(lambda: False, clock.Deadline.after(_PAUSE_S), every_s=_PAUSE_S)
    return act()


class _Steps:
    """Which step runs, and how long each took."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._began_s = clock.monotonic_s()
        self.now = move.Step.DUMP
        self.seconds: dict[str, float] = {}

    def since_s(self) -> float:
        """Seconds since the first step began."""
        return clock.monotonic_s() - self._began_s

    @contextlib.contextmanager
    def timed(self, step: move.Step) -> Iterator[None]:
        self.now = step
        self._watch.check()
        self._watch.step(step)
        began_s = clock.monotonic_s()
        try:
            yield
        finally:
            self.seconds[step.value] = clock.monotonic_s() - began_s


@contextlib.contextmanager
def _incomplete(steps: _Steps, plan: move.Move, image: str) -> Iterator[None]:
    """From the commit on: what fails is told with what exists where and which command goes on."""
    try:
        yield
    except errors.CkptError as exc:
        found = move.incomplete(steps.now, plan, image, exc.message)
        raise told(found, image, exc) from exc


def told(found: move.Incomplete, image: str, cause: errors.CkptError) -> errors.MoveIncomplete:
    """The error that tells people what stands where, because of ``cause``."""
    return errors.MoveIncomplete(
        found.message,
        hint=_commands(found.next, cause.hint),
        reasons=[*_reasons(cause), *found.left],
        image=image,
        left=list(found.left),
        next=list(found.next),
    )


def _reasons(exc: errors.CkptError) -> list[str]:
    found = exc.facts.get("reasons")
    return [str(each) for each in found] if isinstance(found, list | tuple) else []


def _commands(commands: Sequence[str], cause: str) -> str:
    text = f"go on with: {commands[0]}"
    if len(commands) > 1:
        text += f"; or, back where it came from: {commands[1]}"
    return f"{text} ({cause})" if cause else text
