"""Which pods make up a JobSet, and what each is called in it whatever its pod is named.

A member is known by its replicated job, the job's index and its completion index: these stay the
same when JobSet starts the pods anew, while names, addresses and nodes change.

Promises: pure; either all pods that the JobSet wants are there and run, or every one that stands in
the way is named.
Does not: read anything.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from agent import errors
from agent.model import optin

API_GROUP = "jobset.x-k8s.io"
API = f"{API_GROUP}/v1alpha2"
# The fact of an image that says what the JobSet was.
TEMPLATE = "jobset_template"
NAME_LABEL = "jobset.sigs.k8s.io/jobset-name"
_REPLICATED_JOB = "jobset.sigs.k8s.io/replicatedjob-name"
_JOB_INDEX = "jobset.sigs.k8s.io/job-index"
_ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
_COMPLETION = "batch.kubernetes.io/job-completion-index"
_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Member:
    """A pod of a JobSet. ``identity`` is what it is called in every attempt."""

    identity: str
    pod: str
    uid: str
    node: str
    addresses: tuple[str, ...] = ()


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


def addresses(pod: Json) -> list[str]:
    """A pod's own addresses, one of each family."""
    status = pod.get("status") or {}
    return [str(each["ip"]) for each in status.get("podIPs") or () if each.get("ip")]


def marks(name: str, job: str) -> tuple[dict[str, str], dict[str, str]]:
    """The labels and annotations by which the first pod of a replicated job is known."""
    found = {_REPLICATED_JOB: job, _JOB_INDEX: "0", _COMPLETION: "0"}
    return {NAME_LABEL: name, **found}, {_COMPLETION: "0"}


def made_by_job(pod: Json) -> bool:
    """Whether a Job of its JobSet made a pod. Labels alone are anybody's to give; who owns a pod
    that the Job controller made is not.
    """
    metadata = pod.get("metadata") or {}
    labels = metadata.get("labels") or {}
    job = "-".join(str(labels.get(key)) for key in (NAME_LABEL, _REPLICATED_JOB, _JOB_INDEX))
    return any(
        owner.get("controller") is True and (owner.get("kind"), owner.get("name")) == ("Job", job)
        for owner in metadata.get("ownerReferences") or ()
    )


def ends(jobset: Json) -> list[str]:
    """The conditions of a JobSet of which nothing runs any more: "Completed" or "Failed"."""
    conditions = (jobset.get("status") or {}).get("conditions") or ()
    met = {each.get("type") for each in conditions if each.get("status") == "True"}
    return [each for each in ("Completed", "Failed") if each in met]


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
    reasons += [f"it has {each.lower()}" for each in ends(jobset)]
    for pod in pods:
        problem = _problem(pod, attempt)
        if problem is None:
            continue
        if problem:
            reasons.append(f"pod {pod['metadata']['name']} {problem}")
            continue
        metadata, node = pod["metadata"], str(pod["spec"]["nodeName"])
        here = tuple(addresses(pod))
        members.append(Member(identity(pod), metadata["name"], metadata["uid"], node, here))
    twice = {each.identity for each in members if _count(members, each.identity) > 1}
    reasons += [f"two pods run as {each}" for each in sorted(twice)]
    wanted = len(identities(jobset))
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


def identities(jobset: Json) -> tuple[str, ...]:
    """What each of the pods is called that a JobSet wants."""
    return tuple(
        f"{job.get('name')}-{index}-{completion}"
        for job in replicated_jobs(jobset)
        for index in range(int(job.get("replicas", 1)))
        for completion in range(_completions(job))
    )


def replicated_jobs(jobset: Json) -> list[Json]:
    """Its replicated jobs."""
    return list((jobset.get("spec") or {}).get("replicatedJobs") or ())


def pod_template(job: Json) -> Json:
    """The pods of a replicated job, as its Job makes them."""
    found: Json = ((job.get("template") or {}).get("spec") or {}).get("template") or {}
    return found


def template(jobset: Json) -> dict[str, Any]:
    """The JobSet to create for another one like it: without what the API server and others added,
    and who owned it.
    """
    metadata = jobset["metadata"]
    annotations = {
        key: value
        for key, value in (metadata.get("annotations") or {}).items()
        if key not in (_APPLIED, optin.RESTORE)
    }
    kept = {"name": metadata["name"], "annotations": annotations}
    if metadata.get("labels"):
        kept["labels"] = metadata["labels"]
    made = {"apiVersion": API, "kind": "JobSet", "metadata": kept, "spec": jobset.get("spec") or {}}
    return copy.deepcopy(made)


def _completions(job: Json) -> int:
    """How many pods each of its Jobs has."""
    spec = (job.get("template") or {}).get("spec") or {}
    return int(spec.get("completions") or spec.get("parallelism") or 1)
