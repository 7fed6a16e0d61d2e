"""How an operation goes on whose coordinator is gone.

Promises: first the store says what became of what was recorded, and it is nothing else ever after;
a job that runs is never ended: where it stands still is looked at, not assumed.
Does not: decide (``model.operations``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from agent import errors
from agent.cluster.session import Session
from agent.coordination import asked, looking, messages
from agent.coordination.book import Book
from agent.coordination.work import Handle, Work
from agent.coordinator import checkpoint, jobsetrestore, selected, takeover
from agent.host import clock
from agent.kube import jobsets as kube
from agent.kube import objects
from agent.kube.connection import Json
from agent.model import intent, operations, optin
from agent.model.operations import Job, Kind, Next, Operation, Stage, State
from agent.model.protocol import EVACUATE, LEAVE_RUNNING, Course, Decision
from agent.rpc import epochclient, results
from agent.rpc.v1 import coordinator_pb2 as api

_OVER = ("Succeeded", "Failed")


class Resuming:
    """Goes on with operations of ``book``."""

    def __init__(self, book: Book, work: Work) -> None:
        self._book, self._work = book, work

    def run(self, operation: Operation, handle: Handle) -> None:
        """Bring it to its end. Raises what ``Work.run`` does."""
        ordered_s = operations.ordered(operation, clock.wall_s())
        operation = self._work.patiently(
            lambda: self._book.change(operation.id, ordered_s=ordered_s)
        )
        with self._work.session(operation.namespace, operation.caller) as session:
            decision = self._work.patiently(lambda: _decision(session, operation))
            job = None
            if operations.looks_at_job(operation, decision):
                job = self._work.patiently(lambda: _job(session, operation))
            following = operations.goes_on(operation, decision, job)
            match following:
                case Next.BEGIN:
                    self._begin(session, operation, handle)
                case Next.FINISH:
                    self._finish(session, operation)
                case Next.BRING_BACK | Next.CONCLUDE:
                    self._go_on(session, operation, handle, following)
                case Next.CANCEL:
                    raise errors.Interrupted("it was cancelled", hint="the job goes on")
                case Next.GIVE_UP:
                    raise _given_up(operation, job)

    def _begin(self, session: Session, operation: Operation, handle: Handle) -> None:
        again = self._book.change(
            operation.id,
            state=State.RUNNING,
            stage=Stage.BEGUN,
            tries=operation.tries + 1,
            ordered_s=operations.ordered(operation, clock.wall_s()),
            epoch="",
            storage="",
            attempt="",
            image=None,
        )
        self._work.begin(session, again, handle)

    def _finish(self, session: Session, operation: Operation) -> None:
        image = self._work.patiently(lambda: _image(session, operation))
        if _course(operation) is EVACUATE and not self._work.patiently(
            lambda: _all_ended(session, operation, image)
        ):
            self._book.change(operation.id, image=messages.image(image))
            raise errors.Abandoned(
                "the coordinator was replaced when the epoch was committed, and not all pods were"
                " ended: those run on",
                hint=f"image {image.group}@{image.epoch} is whole; ask again to stop the pods too",
            )
        self._work.patiently(
            lambda: self._book.change(
                operation.id,
                state=State.SUCCEEDED,
                stage=Stage.COMMITTED,
                ended_s=clock.wall_s(),
                image=messages.image(image),
            )
        )

    def _go_on(
        self, session: Session, operation: Operation, handle: Handle, following: Next
    ) -> None:
        image = self._work.patiently(lambda: _image(session, operation))
        attempt = operation.attempt if following is Next.CONCLUDE else ""
        handle.watch = self._work.watch(operation.id, handle)
        if not operation.jobset:
            returned = self._work.patiently(
                lambda: selected.conclude(
                    session,
                    image,
                    attempt,
                    # Its members have heard this coordinator already.
                    now_s=operation.ordered_s + 1.0,
                    watch=handle.watch.state,
                )
            )
            if returned is None:
                raise errors.AgentDefect("a committed restore was found abandoned")
        else:
            if operation.stage is Stage.NAMED:
                self._work.patiently(
                    lambda: self._book.change(
                        operation.id, stage=Stage.COMMITTED, image=messages.image(image)
                    )
                )
            said = asked.request(operation)
            nodes = () if isinstance(said, api.CreateEpochRequest) else tuple(said.nodes)
            returned = jobsetrestore.go_on(
                session,
                self._work.patiently(
                    lambda: kube.read(session.api, session.namespace, operation.jobset)
                ),
                image,
                nodes,
                attempt=attempt,
                now_s=operation.ordered_s,
                watch=handle.watch,
            )
        self._work.returned(operation.id, returned)


def _decision(session: Session, operation: Operation) -> Decision | None:
    """What the store says of what was recorded last; None if nothing is to be asked."""
    now_s = operation.ordered_s
    if operation.stage is Stage.NAMED:
        taken = epochclient.Epoch(
            operation.namespace, operation.group, operation.epoch, operation.storage
        )
        members = _members(session, operation)
        return takeover.epoch(session, taken, members, _course(operation), now_s=now_s)
    if operation.stage is Stage.ATTEMPTED and operation.image is not None:
        image = messages.read_image(operation.image)
        taken = epochclient.Epoch(operation.namespace, image.group, image.epoch, image.storage)
        # Those of a JobSet are told when it is known what is to become of them; those of a
        # selector stay where they are, and go on or wait.
        told = () if operation.jobset else selected.restored(session, image)
        return takeover.attempt(session, taken, operation.attempt, told, now_s=now_s)
    return None


def _course(operation: Operation) -> Course:
    said = asked.request(operation)
    stops = operation.kind is Kind.MIGRATE or (
        isinstance(said, api.CreateEpochRequest) and said.stop
    )
    return EVACUATE if stops else LEAVE_RUNNING


def _members(session: Session, operation: Operation) -> list[checkpoint.Member]:
    """Those that are still there to be told; the others let their pods go on by themselves."""
    target = asked.target_of(operation)
    try:
        return looking.members(session, target)
    except errors.Refused:
        return []
    except errors.Unreachable:
        # Who is connected is asked of the agents, of which one may be gone for good with its node.
        if not target.followed:
            raise
        return []


def _image(session: Session, operation: Operation) -> results.Image:
    """The image that is recorded, or that of the epoch that is."""
    if operation.image is not None:
        return messages.read_image(operation.image)
    name = f"{operation.group}@{operation.epoch}"
    found = session.any_agent(lambda agent: agent.image(session.namespace, name, operation.storage))
    return found.image


def _job(session: Session, operation: Operation) -> Job:
    """Whether the JobSet stands still for this operation."""
    namespace, name = session.namespace, operation.jobset
    try:
        # What the coordinator before this one sent last must not arrive later than this look.
        uid = str(kube.read(session.api, namespace, name)["metadata"]["uid"])
        kube.fence(session.api, namespace, name, uid)
        found = kube.read(session.api, namespace, name)
    except errors.NotFound:
        return Job.RUNS
    image = _image(session, operation)
    text = (found["metadata"].get("annotations") or {}).get(optin.RESTORE)
    if text:
        with contextlib.suppress(errors.InvalidInput):
            intended = intent.read(str(text))
            if intended.image == f"{image.group}@{image.epoch}" and not intended.only:
                return Job.STANDS
    if operation.kind is Kind.RESTORE or operation.stage is Stage.ATTEMPTED:
        return Job.RUNS
    # One that was ended is enough: the others wait for what it does not say any more.
    return Job.STANDS if any(_ended_pods(session, operation, image)) else Job.RUNS


def _all_ended(session: Session, operation: Operation, image: results.Image) -> bool:
    """Whether nothing runs any more of what the image was taken of."""
    found = list(_ended_pods(session, operation, image))
    return bool(found) and all(found)


def _ended_pods(session: Session, operation: Operation, image: results.Image) -> Iterator[bool]:
    """For each pod of the image that is still there, whether nothing has run in it since it was
    ended.
    """
    name = f"{image.group}@{image.epoch}"
    detail = session.any_agent(lambda agent: agent.image(session.namespace, name, image.storage))
    uids = {each.pod_uid for each in detail.pods.values()}
    for pod in objects.pods(session.api, session.namespace):
        over = (pod.get("status") or {}).get("phase") in _OVER
        if pod["metadata"]["uid"] in uids and not over:
            yield _ended(session, pod)


def _ended(session: Session, pod: Json) -> bool:
    """Whether each container's first process is alone, and waits."""
    name = str(pod["metadata"]["name"])
    found = session.agent_of(str(pod["spec"]["nodeName"])).plan(session.namespace, name)
    containers = [each for each in found.get("blockers") or () if each.get("code") == "container"]
    return bool(containers) and len(found.get("processes") or ()) == len(containers)


def _given_up(operation: Operation, job: Job | None) -> errors.CkptError:
    if job is Job.RUNS and operation.image is not None:
        image = messages.read_image(operation.image)
        return errors.Abandoned(
            f"the coordinator was replaced, and JobSet {operation.jobset} runs again since, or is"
            " no more: it was left as it is",
            hint=f"image {image.group}@{image.epoch} is safe; ask again if it is to come back",
        )
    return errors.Abandoned(
        f"the coordinator was replaced {operation.takeovers} times before it could end this; the"
        " job goes on",
        hint="ask again",
    )
