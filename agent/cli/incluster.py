"""What the verbs do where a cluster is meant; loaded only then, since gRPC and the API client cost
more to load than a verb on this host takes.

Promises: as the verbs; the same documents as on a host, with fields added.
Does not: decide anything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from agent import errors, wiring
from agent.cli import documents, exits, interrupts, output, poddocuments, progress
from agent.cli.invocation import Invocation
from agent.cluster import archives as cluster_archives
from agent.cluster import doctor as cluster_doctor
from agent.cluster import move as cluster_move
from agent.cluster import pods
from agent.cluster.session import Session
from agent.host import archivefile
from agent.model import ids, move
from agent.model.archives import Written
from agent.rpc import results
from agent.settings import Settings

_STEPS = {
    move.Step.DUMP: "dumping; the pod goes on if anything fails",
    move.Step.DELETE: "deleting the old pod",
    move.Step.CREATE: "creating the replacement",
    move.Step.SCHEDULE: "waiting for the scheduler",
    move.Step.RESTORE: "restoring",
}


@contextlib.contextmanager
def connected(settings: Settings) -> Iterator[Session]:
    """The cluster; whoever asks to stop ends the verb, but closes the way to the agents first."""

    def leave(number: int) -> None:
        raise KeyboardInterrupt

    with interrupts.caught(leave), wiring.cluster(settings) as made:
        yield made


def list_images(invocation: Invocation, settings: Settings, group: str | None, storage: str) -> int:
    """``list`` of a namespace."""
    wanted = ids.group_name(group) if group else ""
    with connected(settings) as session:
        found = session.any_agent(lambda agent: agent.listing(session.namespace, wanted, storage))
        document = documents.image_list(session.namespace, found.images, found.unread)
        if not found.images:
            invocation.say(f"no images in namespace {session.namespace}")
        invocation.emit(document)
        return _read_all(invocation, document)


def _read_all(invocation: Invocation, document: output.Document) -> int:
    """Tell which storages could not be looked at; the status for what that leaves."""
    unread = document.get("unread") or ()
    for each in unread:
        invocation.say(f"storage {each['storage']} cannot be looked at: {each['problem']}")
    return exits.VOLUME if unread else exits.DONE


def show(invocation: Invocation, settings: Settings, image: str, storage: str) -> None:
    """``show`` of an image."""
    with connected(settings) as session:
        found = session.any_agent(lambda agent: agent.image(session.namespace, image, storage))
        invocation.emit(poddocuments.as_sent(found.document, session.namespace))


def verify(invocation: Invocation, settings: Settings, image: str | None, storage: str) -> int:
    """``verify`` of an image, or of all of the namespace."""
    with connected(settings) as session:
        namespace = session.namespace
        if image is None:
            found = session.any_agent(lambda agent: agent.listing(namespace, "", storage))
        else:
            detail = session.any_agent(lambda agent: agent.image(namespace, image, storage))
            found = results.Listing([detail.image], {})
        reports = []
        for each in found.images:
            try:
                reports.append((each, _verified(invocation, session, each)))
            except errors.NotFound:
                if image is not None or _listed(session, each):
                    raise
                # Removed since it was listed, by another command or to keep the last ones only.
                invocation.say(f"{documents.image_name(each)} was deleted meanwhile")
        if not reports:
            invocation.say(f"no images in namespace {namespace}")
        name = documents.image_name(reports[0][0]) if image else namespace
        document = poddocuments.verify_report(name, reports, found.unread)
        invocation.emit(document)
        read = _read_all(invocation, document)
        return read if document["good"] else exits.DATA


def _listed(session: Session, image: results.Image) -> bool:
    """Whether there may still be such an image: something else was not found then."""
    found = session.any_agent(
        lambda agent: agent.listing(session.namespace, image.group, image.storage)
    )
    return bool(found.unread) or any(each.epoch == image.epoch for each in found.images)


def _verified(
    invocation: Invocation, session: Session, image: results.Image
) -> results.VerifyOutcome:
    name = documents.image_name(image)
    with progress.for_reading(invocation.quiet, name) as bar:
        return session.any_agent(
            lambda agent: agent.verify(session.namespace, name, bar, storage=image.storage)
        )


def export(
    invocation: Invocation,
    settings: Settings,
    image: str,
    member: str | None,
    wanted: archivefile.Wanted,
    storage: str,
) -> Written:
    """``export`` of an image."""
    with (
        connected(settings) as session,
        _given_up(invocation, "stopping; no file is left") as cancel,
        progress.for_reading(invocation.quiet, image) as bar,
    ):
        return cluster_archives.export(
            session, image, member, wanted, storage=storage, cancel=cancel, progress=bar
        )


def take_in(
    invocation: Invocation, settings: Settings, path: str, group: str | None, storage: str
) -> None:
    """``import`` of an archive."""
    with (
        wiring.archive_file(path) as archive,
        connected(settings) as session,
        _given_up(invocation, "stopping; nothing is stored") as cancel,
        progress.for_reading(invocation.quiet, "sending") as bar,
    ):
        found = cluster_archives.take_in(
            session, archive, group, storage=storage, cancel=cancel, progress=bar
        )
        document = documents.import_report(found)
    invocation.emit(document)


@contextlib.contextmanager
def _given_up(invocation: Invocation, message: str) -> Iterator[threading.Event]:
    """What is set when somebody asks to stop."""
    cancel = threading.Event()

    def stop_asked(number: int) -> None:
        cancel.set()
        invocation.say(message)

    with interrupts.caught(stop_asked):
        yield cancel


def delete(invocation: Invocation, settings: Settings, image: str, storage: str) -> None:
    """``delete`` of an image."""
    with connected(settings) as session:
        found = session.any_agent(lambda agent: agent.delete(session.namespace, image, storage))
        _pruned(invocation, poddocuments.as_sent(found, session.namespace))


def prune(
    invocation: Invocation, settings: Settings, group: str | None, storage: str, *, dry_run: bool
) -> int:
    """``prune`` of a namespace."""
    wanted = ids.group_name(group) if group else ""
    with connected(settings) as session:
        found = session.any_agent(
            lambda agent: agent.prune(
                session.namespace,
                group=wanted,
                keep_last=settings.keep_last,
                keep_within_s=settings.keep_within_s,
                dry_run=dry_run,
                storage=storage,
            )
        )
        document = poddocuments.as_sent(found, session.namespace)
        _pruned(invocation, document)
        return _read_all(invocation, document)


def _pruned(invocation: Invocation, document: output.Document) -> None:
    for reason in document["blocked"]:
        invocation.say(f"no space was freed: {reason}")
    freed = "would free" if document["dryRun"] else "freed"
    invocation.say(
        f"{freed} {output.human_bytes(document['freedBytes'])};"
        f" images kept: {len(document['kept'])}"
    )
    invocation.emit(document)


def plan(invocation: Invocation, settings: Settings, pod: str, containers: Sequence[str]) -> int:
    """``plan`` of a pod."""
    with connected(settings) as session:
        document = pods.plan(session, pod, containers) | {"name": f"pod/{pod}"}
        invocation.emit(document)
        return exits.DONE if document.get("feasible") else exits.REFUSED


def doctor(invocation: Invocation, settings: Settings) -> int:
    """``doctor`` of a cluster."""
    with connected(settings) as session:
        document = documents.doctor_report(session.api.name, cluster_doctor.examine(session))
        invocation.emit(document)
        return exits.ENVIRONMENT if document["status"] == "missing" else exits.DONE


def dump(
    invocation: Invocation,
    settings: Settings,
    pod: str,
    containers: Sequence[str],
    *,
    engine: str | None,
    stop: bool,
) -> None:
    """``dump`` of a pod."""
    cancel = threading.Event()

    def stop_asked(number: int) -> None:
        cancel.set()
        invocation.say("stopping; the job goes on")

    with (
        connected(settings) as session,
        interrupts.caught(stop_asked),
        progress.for_pod(invocation.quiet) as show,
    ):
        outcome = pods.dump(
            session,
            pod,
            containers=containers,
            engine=engine,
            stop=stop,
            cancel=cancel,
            progress=show,
        )
        document = poddocuments.dump_report(session.namespace, pod, outcome)
    _said_dumped(invocation, document)
    said_hooks(invocation, document)
    invocation.emit(document)


def said_hooks(invocation: Invocation, document: output.Document) -> None:
    """Tell which hooks failed."""
    for problem in document["hookProblems"]:
        invocation.say(f"warning: {problem}")


def _said_dumped(invocation: Invocation, document: output.Document) -> None:
    invocation.say(
        f"captured {output.human_bytes(document['rawBytes'])} from pod {document['pod']}, stopped"
        f" for {output.human_s(document['stopSeconds'])}, durable after"
        f" {output.human_s(document['durableSeconds'])}; new"
        f" {output.human_bytes(document['newBytes'])}, stored"
        f" {output.human_bytes(document['storedBytes'])} in storage {document['storage']}"
    )


def restore(
    invocation: Invocation,
    settings: Settings,
    image: str,
    *,
    storage: str,
    node: str | None,
    pod: str | None,
    replace: bool,
    again: bool,
) -> None:
    """``restore`` on a node, or into a pod that waits."""
    with connected(settings) as session, _watched(invocation) as watch:
        if node is not None:
            done = cluster_move.restore_on(
                session, image, node, storage=storage, replace=replace, again=again, watch=watch
            )
        elif pod is not None:
            done = cluster_move.restore_into(
                session, image, pod, storage=storage, again=again, watch=watch
            )
        else:
            raise errors.InvalidInput(
                "say where in the cluster the image is to be restored",
                hint="--node NODE starts its pod there; --pod NAME takes one that waits for it",
            )
        document = poddocuments.restore_report(session.namespace, done)
    invocation.say(
        f"pod {done.pod} runs {document['name']} on {done.node} after"
        f" {output.human_s(document['runningSeconds'])}"
    )
    said_hooks(invocation, document)
    invocation.emit(document)


def migrate(
    invocation: Invocation, settings: Settings, pod: str, node: str, *, engine: str | None
) -> None:
    """``migrate`` of a pod."""
    with connected(settings) as session, _watched(invocation) as watch:
        done = cluster_move.migrate(session, pod, node, engine=engine, watch=watch)
        document = poddocuments.move_report(session.namespace, pod, done)
    invocation.say(
        f"pod {pod} runs on {done.target} and was away for"
        f" {output.human_s(document['awaySeconds'])} ("
        + ", ".join(
            f"{name} {output.human_s(span_s)}" for name, span_s in document["stepSeconds"].items()
        )
        + ")"
    )
    said_hooks(invocation, document)
    invocation.emit(document)


@contextlib.contextmanager
def _watched(invocation: Invocation) -> Iterator[cluster_move.Watch]:
    """Someone looks on, and may ask to stop: at once as long as the pod runs or nothing is at
    stake, only when asked twice while a job stands still.
    """
    cancel = threading.Event()
    reached: list[move.Step] = []
    asked: list[int] = []

    def stop_asked(number: int) -> None:
        asked.append(number)
        still = any(each != move.Step.DUMP for each in reached)
        if still and len(asked) == 1:
            invocation.say("the job stands still and its image is safe: going on; again to stop")
            return
        cancel.set()

    def step(now: move.Step) -> None:
        reached.append(now)
        invocation.say(_STEPS[now])

    with interrupts.caught(stop_asked), progress.for_pod(invocation.quiet) as show:
        yield cluster_move.Watch(cancel=cancel, step=step, phase=show)
