"""Which pods a label selector makes one group of, and which of them an image is brought back into.

A member is known by its pod's name: pods that are to come back have the names that they had.

Promises: pure; either all pods that are meant can take part, or every one that stands in the way
is named.
Does not: read anything, or know what a selector means; the API server does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from agent import errors
from agent.model import ids, jobset, optin
from agent.model.jobset import Json, Member
from agent.model.move import members as long_running
from agent.model.pods import unscheduled

_OF_JOBSETS = jobset.group("")
_ENDED = ("Succeeded", "Failed")


def group(name: str) -> str:
    """The group of the images of selected pods, as the caller calls it.

    Raises:
        errors.InvalidInput: no group can be called so, or only a JobSet's.
    """
    if name.startswith(_OF_JOBSETS):
        raise errors.InvalidInput(
            f"the group {name!r} is that of a JobSet",
            hint=f"say jobset/{name.removeprefix(_OF_JOBSETS)}, or choose another name",
        )
    return ids.group_name(name)


def owned(pods: Sequence[Json]) -> tuple[str, ...]:
    """The JobSets whose Jobs made one of ``pods``."""
    found = (
        str(each["metadata"]["labels"][jobset.NAME_LABEL])
        for each in pods
        if jobset.made_by_job(each)
    )
    return tuple(sorted(set(found)))


def membership(
    selector: str, pods: Sequence[Json], of_jobsets: Mapping[str, Sequence[Json]]
) -> tuple[Member, ...]:
    """The pods that make up a group: all of ``pods``, which are those that ``selector`` means, but
    for those that have failed. ``of_jobsets`` are all pods of the JobSets that own one.

    Raises:
        errors.NotFound: there are none.
        errors.TargetUnsuitable: not all of them can take part; every reason is told.
    """
    meant = [each for each in pods if (each.get("status") or {}).get("phase") != "Failed"]
    if not meant:
        raise errors.NotFound(
            f"no pod runs whose labels match {selector}",
            hint="check the selector and the namespace: kubectl get pods -l shows what it means",
        )
    return together(f"that match {selector}", meant, of_jobsets)


def together(
    what: str, meant: Sequence[Json], of_jobsets: Mapping[str, Sequence[Json]]
) -> tuple[Member, ...]:
    """All of ``meant`` as the members of a group; ``what`` says for people which pods these are.
    Raises as ``membership``.
    """
    reasons = [
        f"pod {each['metadata']['name']} {problem}" for each in meant if (problem := _problem(each))
    ]
    inside = {each["metadata"]["uid"] for each in meant}
    for name, its in sorted(of_jobsets.items()):
        outside = [str(each["metadata"]["name"]) for each in its if _left_out(each, inside)]
        if outside:
            reasons.append(
                f"JobSet {name} would be cut in two: its pod {outside[0]}"
                + (f" and {len(outside) - 1} more are" if outside[1:] else " is")
                + " not among them"
            )
    if reasons:
        raise errors.TargetUnsuitable(
            f"the pods {what} cannot be checkpointed together now: {'; '.join(reasons[:3])}",
            hint="nothing was touched; mean others, or wait until all of them run",
            reasons=reasons,
        )
    found = [
        Member(
            str(each["metadata"]["name"]),
            str(each["metadata"]["name"]),
            str(each["metadata"]["uid"]),
            str(each["spec"]["nodeName"]),
            tuple(jobset.addresses(each)),
        )
        for each in meant
    ]
    return tuple(sorted(found, key=lambda each: each.identity))


def _problem(pod: Json) -> str:
    """Why a pod cannot take part, "" if it can."""
    metadata, phase = pod["metadata"], (pod.get("status") or {}).get("phase")
    if metadata.get("deletionTimestamp"):
        return "is being deleted"
    if phase == "Succeeded":
        return "has finished"
    if phase != "Running":
        return f"does not run ({phase})"
    if (metadata.get("labels") or {}).get(optin.LABEL) != optin.ENABLED:
        return f"is not opted in (label {optin.LABEL}={optin.ENABLED})"
    try:
        for container in long_running(pod):
            ids.member_name(f"{metadata['name']}.{container}")
    except errors.InvalidInput as exc:
        return f"cannot be a member: {exc.message}"
    return ""


def _left_out(pod: Json, inside: set[str]) -> bool:
    ended = (pod.get("status") or {}).get("phase") in _ENDED
    return not ended and pod["metadata"]["uid"] not in inside


@dataclasses.dataclass(frozen=True)
class Gathering:
    """The pods of an image at one moment, by name: ``ready`` have a node and an address,
    ``unfit`` can never be filled, ``starting`` may yet be ready.
    """

    ready: Mapping[str, Json]
    unfit: tuple[str, ...]
    starting: tuple[str, ...]


def gathered(pods: Sequence[Json], names: Sequence[str], image: str) -> Gathering:
    """What has become of the pods that ``image`` is brought back into, which have ``names``. One
    that says nothing of an image may be one that was stopped and waits; only its agent knows.
    """
    there = {str(each["metadata"]["name"]): each for each in pods}
    ready: dict[str, Json] = {}
    unfit: list[str] = []
    starting: list[str] = []
    for name in names:
        pod = there.get(name)
        if pod is None:
            unfit.append(f"there is no pod {name}")
            continue
        status = pod.get("status") or {}
        said = (pod["metadata"].get("annotations") or {}).get(optin.RESTORE)
        if pod["metadata"].get("deletionTimestamp"):
            unfit.append(f"pod {name} is being deleted")
        elif status.get("phase") in _ENDED:
            unfit.append(f"pod {name} has ended ({status['phase']})")
        elif said and said not in (image, image.rpartition("@")[0]):
            unfit.append(f"pod {name} waits for another image ({said})")
        elif not (pod.get("spec") or {}).get("nodeName"):
            starting.append(f"pod {name} has no node: {unscheduled(pod)}")
        elif status.get("phase") != "Running" or not status.get("podIPs"):
            starting.append(f"pod {name} does not run yet")
        else:
            ready[name] = pod
    return Gathering(ready, tuple(unfit), tuple(starting))
