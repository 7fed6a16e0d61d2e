"""Which pods make up a JobSet, and what each is called in it whatever its pod is named.

A member is known by its replicated job, the job's index and its completion index: these stay the
same when JobSet starts the pods anew, while names, addresses and nodes change.

Promises: pure; either all pods that the JobSet wants are there and run, or every one that stands in
the way is named.
Does not: read anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from agent import errors

API = "jobset.x-k8s.io/v1alpha2"
NAME_LABEL = "jobset.sigs.k8s.io/jobset-name"
_REPLICATED_JOB = "jobset.sigs.k8s.io/replicatedjob-name"
_JOB_INDEX = "jobset.sigs.k8s.io/job-index"
_ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
_COMPLETION = "batch.kubernetes.io/job-completion-index"

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Member:
    """A pod of a JobSet. ``identity`` is what it is called in every attempt."""

    identity: str
    pod: str
    uid: str
    node: str


@dataclasses.dataclass(frozen=True)
class Membership:
    """The pods of a JobSet at one moment."""

    uid: str
    attempt: int
    members: tuple[Member, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What an image tells of it."""
        return {"jobset_uid": self.uid, "restart_attempt": self.attempt}


def group(name: str) -> str:
    """What the images of a JobSet are called."""
    return f"jobset.{name}"


def identity(pod: Json) -> str:
    """What a pod is called in its JobSet; "" if it lacks the marks of one."""
    metadata = pod.get("metadata") or {}
    marks = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}
    found = [marks.get(key) for key in (_REPLICATED_JOB, _JOB_INDEX, _COMPLETION)]
    return "-".join(str(each) for each in found) if all(found) else ""


def membership(jobset: Json, pods: Sequence[Json]) -> Membership:
    """The pods that make up ``jobset``.

    Raises:
        errors.TargetUnsuitable: not all of them run; every reason is told.
    """
    name = jobset["metadata"]["name"]
    attempt = int((jobset.get("status") or {}).get("restarts") or 0)
    reasons, members = [], []
    if (jobset.get("spec") or {}).get("suspend"):
        reasons.append("it is suspended")
    conditions = (jobset.get("status") or {}).get("conditions") or ()
    met = {each.get("type") for each in conditions if each.get("status") == "True"}
    reasons += [f"it has {each.lower()}" for each in ("Completed", "Failed") if each in met]
    for pod in pods:
        problem = _problem(pod, attempt)
        if problem is None:
            continue
        if problem:
            reasons.append(f"pod {pod['metadata']['name']} {problem}")
            continue
        metadata, node = pod["metadata"], str(pod["spec"]["nodeName"])
        members.append(Member(identity(pod), metadata["name"], metadata["uid"], node))
    twice = {each.identity for each in members if _count(members, each.identity) > 1}
    reasons += [f"two pods run as {each}" for each in sorted(twice)]
    wanted = _wanted(jobset)
    if not reasons and len(members) != wanted:
        reasons.append(f"{len(members)} of its {wanted} pods run")
    if reasons:
        raise errors.TargetUnsuitable(
            f"JobSet {name} cannot be checkpointed now: {'; '.join(reasons[:3])}",
            hint="wait until all of its pods run",
            reasons=reasons,
        )
    ordered = sorted(members, key=lambda each: each.identity)
    return Membership(jobset["metadata"]["uid"], attempt, tuple(ordered))


def _problem(pod: Json, attempt: int) -> str | None:
    """Why a pod cannot take part, "" if it can; None if it is none of this attempt's any more."""
    labels = pod["metadata"].get("labels") or {}
    phase = (pod.get("status") or {}).get("phase")
    if str(labels.get(_ATTEMPT, attempt)) != str(attempt) or phase == "Failed":
        return None
    if not identity(pod):
        return "does not say which of the JobSet's pods it is (no indexed Job)"
    if pod["metadata"].get("deletionTimestamp"):
        return "is being deleted"
    if phase == "Succeeded":
        return "has finished"
    return "" if phase == "Running" else f"does not run ({phase})"


def _count(members: Sequence[Member], name: str) -> int:
    return sum(each.identity == name for each in members)


def _wanted(jobset: Json) -> int:
    total = 0
    for job in (jobset.get("spec") or {}).get("replicatedJobs") or ():
        template = (job.get("template") or {}).get("spec") or {}
        pods = template.get("completions") or template.get("parallelism") or 1
        total += int(job.get("replicas") or 1) * int(pods)
    return total
