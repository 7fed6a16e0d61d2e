"""What is looked at before a JobSet is brought back: rights, images, the JobSet itself, nodes, and
what admission would make of its pods.

Promises: nothing is touched; where it refuses, every reason is told.
Does not: bring anything back; ``jobsetrestore`` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from agent import errors
from agent.cluster import objections
from agent.cluster.session import Session
from agent.kube import jobsets as kube
from agent.kube import objects
from agent.kube.connection import Json
from agent.model import access, jobset, jobsetrestore, move
from agent.model.intent import Intent
from agent.rpc import results

# A damaged image is followed by at most two older ones.
_IMAGES = 3


def existing(session: Session, name: str) -> Json | None:
    """The JobSet, or None."""
    try:
        return kube.read(session.api, session.namespace, name)
    except errors.NotFound:
        return None


def check_rights(session: Session, what: str) -> None:
    """``what`` is create where the JobSet is to be created, dump where it is to be dumped."""
    namespace = session.namespace
    wanted = [
        access.Right("restore", "images", namespace),
        access.Right("get", "images", namespace),
        access.Right("list", "images", namespace),
        access.Right("list", "pods", namespace, group=""),
        access.Right("create", "pods", namespace, group=""),
        kube.right("get", namespace),
        kube.right("patch", namespace),
    ]
    if what == "create":
        wanted += [kube.right("create", namespace), kube.right("delete", namespace)]
    if what == "dump":
        wanted.append(access.Right("create", "images", namespace))
    objections.check_rights(session, wanted)


def images_of(session: Session, name: str, epoch: str, storage: str) -> list[results.Image]:
    """What it may be restored from, the best first: the one that is named, or the newest ones."""
    group = jobset.group(name)
    if epoch:
        image = f"{group}@{epoch}"
        found = session.any_agent(lambda agent: agent.image(session.namespace, image, storage))
        return [found.image]
    listing = session.any_agent(lambda agent: agent.listing(session.namespace, group, storage))
    if listing.unread:
        away = "; ".join(f"{each}: {problem}" for each, problem in listing.unread.items())
        raise errors.VolumeGone(
            f"the newest image of JobSet {name} may lie in a storage that cannot be read now:"
            f" {away}",
            hint="name the image whole (jobset/NAME@EPOCH), or a storage (--storage)",
        )
    if not listing.images:
        raise errors.NotFound(
            f"there is no image of JobSet {session.namespace}/{name}",
            hint=f"ckpt-agent list -n {session.namespace} shows what there is",
        )
    return sorted(listing.images, key=lambda each: each.epoch, reverse=True)[:_IMAGES]


def first_whole(session: Session, images: Sequence[results.Image]) -> results.ImageDetail:
    """The newest of ``images`` that can be read.

    Raises:
        errors.DataError: none can; it is the last one's error.
    """
    for image in images[:-1]:
        with contextlib.suppress(errors.DataError):
            return detail_of(session, image)
    return detail_of(session, images[-1])


def older(session: Session, name: str, image: results.Image) -> list[results.Image]:
    """Older images than one that was just taken; none if that cannot be known now."""
    try:
        known = images_of(session, name, "", image.storage)
    except errors.CkptError:
        return []
    return [each for each in known if each.epoch < image.epoch]


def detail_of(session: Session, image: results.Image) -> results.ImageDetail:
    """An image in detail.

    Raises:
        errors.DataError: it is damaged.
        errors.RestoreConflict: no agent could ever restore it.
    """
    name = name_of(image)
    if image.damage:
        raise errors.Corrupt(f"image {name} is damaged: {image.damage}")
    found = session.any_agent(lambda agent: agent.image(session.namespace, name, image.storage))
    if found.obstacles:
        raise errors.RestoreConflict(
            f"image {name} cannot be restored",
            hint="nothing was touched",
            reasons=list(found.obstacles),
        )
    return found


def name_of(image: results.Image) -> str:
    """What restore takes."""
    return f"{image.group}@{image.epoch}"


def intent_for(detail: results.ImageDetail, nodes: Sequence[str]) -> Intent:
    """What the JobSet shall come back as."""
    sources = {identity: was.node for identity, was in detail.pods.items()}
    return Intent(name_of(detail.image), detail.image.storage, jobsetrestore.placed(sources, nodes))


def check(
    session: Session,
    found: Json,
    pods: Sequence[Json],
    detail: results.ImageDetail,
    nodes: Sequence[str],
) -> None:
    """Refuse, with every reason, what could not end well."""
    reasons = jobsetrestore.objections(found)
    reasons += jobsetrestore.mismatches(found, detail.image.members)
    reasons += jobsetrestore.finished(pods)
    refuse(session, str(found["metadata"]["name"]), reasons)
    check_nodes(session, found, nodes)


def refuse(session: Session, name: str, reasons: Sequence[str]) -> None:
    """Raise ``errors.TargetUnsuitable`` if there are ``reasons``."""
    if reasons:
        raise errors.TargetUnsuitable(
            f"JobSet {session.namespace}/{name} cannot be brought back: {'; '.join(reasons[:3])}",
            hint="nothing was touched",
            reasons=list(reasons),
        )


def check_nodes(session: Session, found: Json, nodes: Sequence[str]) -> None:
    """Refuse nodes that could not run its pods, or whose agent does not answer."""
    for node in dict.fromkeys(nodes):
        for job in jobset.replicated_jobs(found):
            objections.check_node(session, jobset.pod_template(job), node)
        session.agent_of(node).images(session.namespace, jobset.group(found["metadata"]["name"]))


def try_pods(session: Session, found: Json, intent: Intent) -> None:
    """Let admission look at a pod of each replicated job as JobSet would make it; it must come back
    waiting. A quota that has no room for it is no objection.
    """
    reasons = []
    for job in jobset.replicated_jobs(found):
        pod = jobsetrestore.trial(found, job, str(found["metadata"]["name"]))
        try:
            made = objects.create_pod(session.api, session.namespace, pod, dry_run=True)
        except errors.Forbidden as exc:
            if "exceeded quota" not in exc.message:
                raise
            continue
        reasons += jobsetrestore.not_waiting(made, intent, move.members(jobset.pod_template(job)))
    refuse(session, str(found["metadata"]["name"]), reasons)
