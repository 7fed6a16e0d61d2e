"""Checkpoints of the pods that a label selector means, and their way back into pods of the same
names.

Promises: as ``checkpoint`` and ``restore``; what can be known to stand in the way is told whole
before any agent is asked.
Does not: make, place or delete pods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from agent import errors
from agent.cluster.session import Session
from agent.coordinator import checkpoint, jobsetcourse, takeover
from agent.coordinator import restore as coordinator_restore
from agent.coordinator.jobsetcourse import Pod, Returned
from agent.coordinator.machine import State
from agent.host import clock
from agent.kube import jobsets, objects
from agent.model import jobset, jobsetrestore, optin, podfollow, selection
from agent.model import storage as model_storage
from agent.model.protocol import EVACUATE, LEAVE_RUNNING, Decision
from agent.rpc import epochclient, results

# How often pods are looked at that are to come up: short against the seconds that they take.
_LOOK_S = 0.25


def members(session: Session, group: str, selector: str) -> list[checkpoint.Member]:
    """The pods that make up ``group`` now. Raises as ``dump``, before any agent is asked."""
    found, _ = _members(session, group, selector)
    return found


def dump(
    session: Session,
    group: str,
    selector: str,
    *,
    now_s: float,
    storage: str = "",
    stop: bool = False,
    control: checkpoint.Control | None = None,
    watch: Callable[[State], None] = lambda state: None,
    named: Callable[[epochclient.Epoch], None] = lambda epoch: None,
    engine: str = "",
) -> checkpoint.Checkpoint:
    """Checkpoint all pods of the namespace that ``selector`` means (as kubectl's ``-l``) at one
    instant, as ``group``. ``stop``: they are ended once that is committed, and wait where they are.
    ``named`` and ``engine`` as ``checkpoint.run`` has them.

    Raises:
        errors.InvalidInput: no group can be called so, the selector is none, or the pods ask for
            different storages, and ``storage`` is "".
        errors.NotFound | errors.TargetUnsuitable: none matches, or not all of them can take part.
        errors.CkptError: as ``checkpoint.run``.
    """
    taking, said = _members(session, group, selector)
    return checkpoint.run(
        session,
        group,
        taking,
        EVACUATE if stop else LEAVE_RUNNING,
        facts={"selector": selector},
        now_s=now_s,
        storage=storage or model_storage.agreed(said),
        control=control,
        watch=watch,
        named=named,
        engine=engine,
    )


def _members(
    session: Session, group: str, selector: str
) -> tuple[list[checkpoint.Member], dict[str, dict[str, str]]]:
    """The members of ``group``, and the annotations of their pods by name."""
    selection.group(group)
    if not selector.strip():
        raise errors.InvalidInput(
            "an empty selector means every pod of the namespace", hint="say which: -l app=train"
        )
    api, namespace = session.api, session.namespace
    if objects.pods(api, namespace, name=group):
        raise errors.InvalidInput(
            f"a pod is called {group}: its own images and those of the group would be mixed",
            hint="choose another name for the group",
        )
    pods = objects.pods(api, namespace, selector=selector)
    of_jobsets = {each: jobsets.pods(api, namespace, each) for each in selection.owned(pods)}
    made = selection.membership(selector, pods, of_jobsets)
    found = [checkpoint.member(each) for each in made]
    taking = {each.pod for each in found}
    said = {
        name: each["metadata"].get("annotations") or {}
        for each in pods
        if (name := str(each["metadata"]["name"])) in taking
    }
    return found, said


def restore(
    session: Session,
    group: str,
    epoch: str = "",
    *,
    now_s: float,
    storage: str = "",
    again: bool = False,
    control: checkpoint.Control | None = None,
    watch: Callable[[State], None] = lambda state: None,
    attempting: Callable[[results.Image, str], None] = lambda image, attempt: None,
) -> Returned:
    """Restore ``group`` as it was at ``epoch`` ("": its newest image) into pods of the same names,
    which wait for it; ``again``: even if the image was restored before. ``attempting`` is called
    with the image and the attempt's name before any pod is told anything.

    Raises:
        errors.TargetUnsuitable | errors.DeadlineExceeded: the pods are not there, or cannot be
            filled; every reason is told.
        errors.CkptError: as ``restore.run``; nothing of the image runs, and the pods wait on,
            unless ``facts["committed"]``.
    """
    control = control or checkpoint.Control()
    detail = _detail(session, selection.group(group), epoch, storage)
    image = f"{detail.image.group}@{detail.image.epoch}"
    ready = _await_pods(session, sorted(detail.pods), image, control)
    now = {name: jobset.addresses(pod) for name, pod in ready.items()}
    done = coordinator_restore.run(
        session,
        group,
        detail.image.epoch,
        [jobsetcourse.member(name, pod) for name, pod in sorted(ready.items())],
        jobsetrestore.moved(detail.pods, now),
        now_s=now_s,
        storage=detail.image.storage,
        again=again,
        control=control,
        watch=watch,
        attempting=lambda attempt: attempting(detail.image, attempt),
    )
    return _returned(detail, ready, done)


def conclude(
    session: Session,
    image: results.Image,
    attempt: str,
    *,
    now_s: float,
    watch: Callable[[State], None] = lambda state: None,
) -> Returned | None:
    """Bring the restore ``attempt`` of ``image`` to its end, whose coordinator is gone; None if it
    is abandoned, and the pods wait on. Raises what ``takeover.attempt`` does.
    """
    detail, ready = _taken(session, image)
    taken = epochclient.Epoch(session.namespace, image.group, image.epoch, image.storage)
    members = [jobsetcourse.member(each, pod) for each, pod in sorted(ready.items())]
    found = takeover.attempt(session, taken, attempt, members, now_s=now_s, watch=watch)
    if found is Decision.ABANDONED:
        return None
    gone = [f"pod {each} is gone" for each in detail.pods if each not in ready]
    if gone:
        raise errors.RestoreFailed(
            f"the image was let run, and not all of it does: {gone[0]}", reasons=gone
        )
    return _returned(detail, ready, coordinator_restore.Restored(tuple(members), {}, 0.0, {}))


def restored(session: Session, image: results.Image) -> list[checkpoint.Member]:
    """The pods that ``image`` is, or was, brought back into, as far as they are there."""
    _, ready = _taken(session, image)
    return [jobsetcourse.member(each, pod) for each, pod in sorted(ready.items())]


def _taken(
    session: Session, image: results.Image
) -> tuple[results.ImageDetail, dict[str, jobset.Json]]:
    name = f"{image.group}@{image.epoch}"
    detail = session.any_agent(lambda agent: agent.image(session.namespace, name, image.storage))
    pods = {each["metadata"]["name"]: each for each in objects.pods(session.api, session.namespace)}
    # One without a node has no agent that could know of it.
    ready: dict[str, jobset.Json] = {
        each: pods[each]
        for each in detail.pods
        if each in pods and pods[each]["spec"].get("nodeName")
    }
    return detail, ready


def _returned(
    detail: results.ImageDetail,
    ready: Mapping[str, jobset.Json],
    done: coordinator_restore.Restored,
) -> Returned:
    """What to tell of a group that runs in these pods."""
    return Returned(
        image=detail.image,
        pods=tuple(
            Pod(
                name,
                detail.pods[name],
                jobsetcourse.placement(pod, jobset.addresses(pod)),
                done.lost.get(name, ()),
            )
            for name, pod in sorted(ready.items())
        ),
        passed_over=(),
        created=False,
        verified_s=done.spans_s.get(State.PREPARING, 0.0),
        running_s=done.running_s,
        steps={},
    )


def _detail(session: Session, group: str, epoch: str, storage: str) -> results.ImageDetail:
    """The image, which an agent could restore."""
    name = f"{group}@{epoch}" if epoch else group
    found = session.any_agent(lambda agent: agent.image(session.namespace, name, storage))
    image = f"{found.image.group}@{found.image.epoch}"
    if found.image.damage:
        raise errors.Corrupt(f"image {image} is damaged: {found.image.damage}")
    if found.obstacles:
        raise errors.RestoreConflict(
            f"image {image} cannot be restored",
            hint="nothing was touched",
            reasons=list(found.obstacles),
        )
    if not found.pods:
        raise errors.InvalidInput(
            f"image {image} is of one pod, not of several",
            hint=f"ckpt-agent restore {image} --pod NAME, or --node NODE",
        )
    return found


def _await_pods(
    session: Session, names: Sequence[str], image: str, control: checkpoint.Control
) -> dict[str, jobset.Json]:
    """The pods of the image, by name, once all of them have an address."""
    api, namespace = session.api, session.namespace
    seen = selection.gathered((), (), image)

    def ready() -> bool:
        nonlocal seen
        control.check()
        seen = selection.gathered(objects.pods(api, namespace), names, image)
        return bool(seen.unfit) or not seen.starting

    deadline = clock.Deadline.after(session.settings.schedule_deadline_s)
    came = clock.wait_until(ready, deadline, every_s=_LOOK_S)
    if seen.unfit:
        of_jobsets = "; a JobSet's pods never have the names that they had: what is connected with"
        of_jobsets += (
            " them is dumped with --stop, to come back where it is, or as jobset/NAME alone"
        )
        raise errors.TargetUnsuitable(
            f"image {image} cannot be restored: {'; '.join(seen.unfit[:3])}",
            hint="nothing was touched; create each pod again under its name, with the annotation"
            f" {optin.RESTORE}: {image}{of_jobsets if podfollow.is_group(image) else ''}",
            reasons=list(seen.unfit),
        )
    if not came:
        raise errors.DeadlineExceeded(
            f"not all pods came up in time: {seen.starting[0]}",
            hint="make room for them, then restore again",
            reasons=list(seen.starting),
        )
    return dict(seen.ready)
