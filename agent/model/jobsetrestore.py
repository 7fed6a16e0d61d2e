"""What bringing a JobSet back takes: what stands against it, which pod goes where, whether the pods
that JobSet made wait, and what exists where if it fails.

The order is: the intent is put on the JobSet, it is suspended, its pods go; it is resumed, and each
new pod waits from its first moment; when all wait, the image is restored into them at one instant.
At every failure the JobSet is left suspended with its intent, so that it never starts over.

Promises: pure; objects of Kubernetes are read as JSON values; every objection is found at once.
Does not: know whether nodes have room; the scheduler does.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent.model import jobset, move, optin
from agent.model.intent import Intent
from agent.model.pods import Placement, unscheduled

Json = Mapping[str, Any]

_KUEUE = "kueue.x-k8s.io/queue-name"
_OWN_CONTROLLER = "jobset.sigs.k8s.io/jobset-controller"
_OVER = ("Succeeded", "Failed")
_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


class Step(enum.Enum):
    """The steps, in their order; a restore begins with the second."""

    DUMP = "dump"
    SUSPEND = "suspend"
    START = "start"
    RESTORE = "restore"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which JobSet comes back on which nodes (none: the scheduler chooses), from which storage."""

    namespace: str
    name: str
    nodes: tuple[str, ...]
    storage: str = ""


def objections(found: Json) -> list[str]:
    """Why a JobSet cannot be suspended and brought back, each with its way out."""
    name, spec = found["metadata"]["name"], found.get("spec") or {}
    reasons = list(_of_others(found))
    reasons += [
        f"it has {each.lower()}, and nothing of it runs again: kubectl delete jobset {name}, and"
        " it is created anew"
        for each in jobset.ends(found)
    ]
    jobs = jobset.replicated_jobs(found)
    reasons += [
        f"the pods of {job.get('name')} are not opted in and would not wait: their template needs"
        f" the label {optin.LABEL}={optin.ENABLED}"
        for job in jobs
        if not _opted_in(job)
    ]
    ordered = (spec.get("startupPolicy") or {}).get("startupPolicyOrder") == "InOrder"
    if (ordered or any(job.get("dependsOn") for job in jobs)) and any(_probed(job) for job in jobs):
        reasons.append(
            "its jobs start one after the other, each when the one before is ready, and pods that"
            " wait for an image are never ready by their probes"
        )
    return reasons


def _of_others(found: Json) -> Iterator[str]:
    """Who else would have to suspend and resume it."""
    metadata = found["metadata"]
    if metadata.get("deletionTimestamp"):
        yield "it is being deleted: when it is gone it is created anew"
    if _KUEUE in (metadata.get("labels") or {}):
        yield "Kueue admits it, and alone may suspend and resume it"
    manager = (found.get("spec") or {}).get("managedBy")
    if manager and manager != _OWN_CONTROLLER:
        yield f"{manager} manages it, and alone may suspend and resume it"
    for owner in metadata.get("ownerReferences") or ():
        if owner.get("controller"):
            kind = f"{owner.get('kind', 'an object')} {owner.get('name', '')}".strip()
            yield f"{kind} controls it, and alone may suspend and resume it"


def _opted_in(job: Json) -> bool:
    labels = (jobset.pod_template(job).get("metadata") or {}).get("labels") or {}
    return bool(labels.get(optin.LABEL) == optin.ENABLED)


def _probed(job: Json) -> bool:
    containers = (jobset.pod_template(job).get("spec") or {}).get("containers") or ()
    return any(each.get(probe) for each in containers for probe in _PROBES)


def running(found: Json, pods: Iterable[Json]) -> bool:
    """Whether a JobSet runs, or has pods that are not over yet."""
    suspended = bool((found.get("spec") or {}).get("suspend"))
    return not suspended or any(_alive(each) for each in pods)


def suspended(found: Json, pods: Iterable[Json]) -> bool:
    """Whether a suspended JobSet has come to rest: JobSet has seen it, and no pod is left."""
    conditions = (found.get("status") or {}).get("conditions") or ()
    seen = any(
        each.get("type") == "Suspended" and each.get("status") == "True" for each in conditions
    )
    return seen and not any(_alive(each) for each in pods)


def _alive(pod: Json) -> bool:
    return (pod.get("status") or {}).get("phase") not in _OVER


def finished(pods: Iterable[Json]) -> list[str]:
    """Pods that have ended well: their Jobs do not make them again."""
    return [
        f"pod {each['metadata']['name']} has finished, and JobSet would not make it again"
        for each in pods
        if (each.get("status") or {}).get("phase") == "Succeeded"
    ]


def containers(members: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The containers of each pod of an image, by the pod's identity."""
    found: dict[str, tuple[str, ...]] = {}
    for member in members:
        identity, _, container = member.rpartition(".")
        found[identity] = (*found.get(identity, ()), container)
    return found


def mismatches(found: Json, members: Iterable[str]) -> list[str]:
    """In what a JobSet's pods are not those of an image."""
    image = containers(members)
    wanted = jobset.identities(found)
    reasons = [f"the image has no pod {each}" for each in wanted if each not in image]
    reasons += [f"the JobSet makes no pod {each}" for each in image if each not in wanted]
    for job in jobset.replicated_jobs(found):
        names = _containers_of(jobset.pod_template(job).get("spec") or {})
        lacking = {
            each
            for identity, given in image.items()
            if identity.rsplit("-", 2)[0] == job.get("name")
            for each in given
            if each not in names
        }
        reasons += [f"the pods of {job.get('name')} have no container {each}" for each in lacking]
    return reasons


def _containers_of(spec: Json) -> set[str]:
    every = (*(spec.get("containers") or ()), *(spec.get("initContainers") or ()))
    return {str(each.get("name")) for each in every}


def placed(sources: Mapping[str, str], targets: Sequence[str]) -> dict[str, str]:
    """The node for each pod: those that were on one node stay together, and the nodes they were on
    (in the order of the first pod of each) take the ``targets`` in turn. ``sources`` are the nodes
    by identity; nothing is chosen where there are no targets.
    """
    if not targets:
        return {}
    order: dict[str, int] = {}
    for identity in sorted(sources):
        order.setdefault(sources[identity], len(order))
    return {identity: targets[order[source] % len(targets)] for identity, source in sources.items()}


def moved(before: Mapping[str, Placement], now: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The new address for each old one, by identity and of the same family."""
    found = {}
    for identity, was in before.items():
        new = {_family(each): each for each in reversed(now.get(identity) or ())}
        seen = set()
        for address in was.addresses:
            family = _family(address)
            if family in new and family not in seen:
                found[address] = new[family]
                seen.add(family)
    return found


def _family(address: str) -> int:
    return ipaddress.ip_address(address).version


def trial(found: Json, job: Json, name: str) -> dict[str, Any]:
    """The first pod of a replicated job, for admission to look at without being made."""
    template = jobset.pod_template(job)
    metadata = template.get("metadata") or {}
    labels, annotations = jobset.marks(str(found["metadata"]["name"]), str(job.get("name")))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": move.trial_name(name),
            "labels": {**(metadata.get("labels") or {}), **labels},
            "annotations": {**(metadata.get("annotations") or {}), **annotations},
        },
        "spec": template.get("spec") or {},
    }


def not_waiting(pod: Json, intent: Intent, members: Collection[str]) -> list[str]:
    """Why a pod that admission has seen would start over instead of waiting for ``intent``."""
    if (pod["metadata"].get("annotations") or {}).get(optin.RESTORE) == intent.image:
        return move.not_waiting(pod, members)
    return [
        f"pod {pod['metadata']['name']} would start from the beginning instead of waiting: is"
        " ckpt-agent's admission webhook running, and may it read JobSets?"
    ]


@dataclasses.dataclass(frozen=True)
class Gathering:
    """The new pods of a JobSet at one moment: ``waiting`` those that run and have an address, by
    identity; the others are told by what they lack: ``cold`` are pods that start over, ``homeless``
    those without a node, ``starting`` those that have one.
    """

    waiting: dict[str, Json]
    cold: tuple[str, ...]
    homeless: tuple[str, ...]
    starting: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every pod waits."""
        return not (self.cold or self.homeless or self.starting)


def gathered(pods: Iterable[Json], intent: Intent, members: Iterable[str]) -> Gathering:
    """What has become of the pods that JobSet made for ``intent``."""
    wanted = containers(members)
    waiting: dict[str, Json] = {}
    cold: list[str] = []
    homeless: list[str] = []
    starting: list[str] = []
    there = set()
    for pod in pods:
        if pod["metadata"].get("deletionTimestamp") or not _alive(pod):
            continue
        name, status = pod["metadata"]["name"], pod.get("status") or {}
        identity = jobset.identity(pod)
        if identity not in wanted:
            cold.append(f"pod {name} is none of the image's")
            continue
        cold += not_waiting(pod, intent, wanted[identity])
        if identity in there:
            starting.append(f"pod {name} is a second {identity}")
        elif not (pod.get("spec") or {}).get("nodeName"):
            homeless.append(f"pod {name} has no node: {unscheduled(pod)}")
        elif status.get("phase") != "Running" or not jobset.addresses(pod):
            starting.append(f"pod {name} does not run yet: {_starting(status)}")
        else:
            waiting[identity] = pod
        there.add(identity)
    homeless += [f"pod {each} is not there" for each in wanted if each not in there]
    return Gathering(waiting, tuple(cold), tuple(homeless), tuple(starting))


def left_waiting(pods: Iterable[Json], image: str, restored: Collection[str]) -> list[str]:
    """Pods that wait for an image although it was restored, into the pods of these uids."""
    return [
        f"pod {metadata['name']} waits"
        for pod in pods
        if (metadata := pod["metadata"])["uid"] not in restored
        and (metadata.get("annotations") or {}).get(optin.RESTORE) == image
        and not metadata.get("deletionTimestamp")
        and _alive(pod)
    ]


def _starting(status: Json) -> str:
    for field in ("initContainerStatuses", "containerStatuses"):
        for each in status.get(field) or ():
            waiting = (each.get("state") or {}).get("waiting") or {}
            if waiting.get("reason"):
                return str(waiting.get("message") or waiting["reason"])
    return "it starts"


def incomplete(failed: Step, plan: Plan, image: str, why: str, *, rests: bool) -> move.Incomplete:
    """What to tell when ``failed`` failed because of ``why``; ``rests``: the JobSet is
    suspended.
    """
    command = f"ckpt-agent restore jobset/{plan.name}@{image.rpartition('@')[2]}"
    words = [command, f"-n {plan.namespace}"]
    words += [f"--storage {plan.storage}"] if plan.storage else []
    words += [f"--node {each}" for each in plan.nodes]
    again = " ".join(words)
    left = tuple(_left(plan, image, rests=rests))
    return move.Incomplete(
        message=f"{_HEADLINES[failed]}: {why}",
        left=left,
        next=(again if rests else f"{again} --replace",),
    )


_HEADLINES = {
    Step.DUMP: "the dump failed when its image was already committed",
    Step.SUSPEND: "the JobSet could not be suspended",
    Step.START: "not all pods of the JobSet came to wait for the image",
    Step.RESTORE: "the image could not be restored",
}


def _left(plan: Plan, image: str, *, rests: bool) -> Iterator[str]:
    yield f"image {image} is committed: nothing of the job is lost"
    where = f"JobSet {plan.namespace}/{plan.name}"
    if rests:
        yield f"{where} is suspended, and waits for this image when it is resumed"
    else:
        yield f"{where} could not be suspended again: its pods wait, or some start over"
