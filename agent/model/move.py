"""What moving a pod to another node takes: what stands against it, the pod that replaces it, the
order of the steps, and what exists where if a step fails.

A move is: dump with stop, delete, create, schedule, restore. Nothing is deleted before the image is
committed, so from there on a failure leaves the job standing still but whole, and one command goes
on.

Promises: pure; objects of Kubernetes are read as JSON values and never changed in place; every
objection is found at once, before anything stops.
Does not: know whether the target has room; the scheduler does.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from agent.model import affinity, optin, pods
from agent.model.container import HOLD

Json = Mapping[str, Any]

_MIRROR = "kubernetes.io/config.mirror"
# The labels by which Jobs and ReplicaSets tell their own pods from others.
_OF_A_CONTROLLER = ("controller-uid", "batch.kubernetes.io/controller-uid", "pod-template-hash")
_NO_SCHEDULE = ("NoSchedule", "NoExecute")
# Any name that looks like an epoch's, to let admission look at pods before there is one.
TRIAL_EPOCH = "20000101-000000-000000"
_NAME_CHARS = 253


class Step(enum.Enum):
    """The steps of a move, in their order."""

    DUMP = "dump"
    DELETE = "delete"
    CREATE = "create"
    SCHEDULE = "schedule"
    RESTORE = "restore"


@dataclasses.dataclass(frozen=True)
class Move:
    """Which pod goes where; ``source`` is "" if it no longer runs anywhere. ``waits``: stopped, it
    waits for its image where it is; one that was never opted in is frozen.
    """

    namespace: str
    pod: str
    source: str
    target: str
    waits: bool = True


@dataclasses.dataclass(frozen=True)
class Incomplete:
    """What to tell when a step failed: a headline, what exists where, and the commands that go
    on, the best first.
    """

    message: str
    left: tuple[str, ...]
    next: tuple[str, ...]


def objections(pod: Json) -> list[str]:
    """Why a pod cannot be replaced by one of ours, each with its way out."""
    metadata = pod["metadata"]
    owners = metadata.get("ownerReferences") or ()
    found = [_owned(owner) for owner in owners if owner.get("controller")]
    if _MIRROR in (metadata.get("annotations") or {}):
        found.append("it is a static pod of its node: nothing but that node can run it")
    return found


def _owned(owner: Json) -> str:
    kind, name = owner.get("kind", "object"), owner.get("name", "")
    return (
        f"{kind} {name} controls it and would start its own replacement from the beginning, beside"
        " or instead of the restored one: dump the pod without stopping it, or give up the"
        f" controller and keep its pods (kubectl delete {str(kind).lower()} {name}"
        " --cascade=orphan) and then move it"
    )


def members(pod: Json) -> tuple[str, ...]:
    """The containers of a pod that are dumped if nobody says which: its owner's choice, or all
    that run on.
    """
    chosen = optin.chosen_containers(pod["metadata"].get("annotations") or {})
    return chosen or tuple(str(each["name"]) for each in _long_running(pod["spec"]))


def not_waiting(made: Json, members: Collection[str]) -> list[str]:
    """Why the containers ``members`` of a replacement, as admission has left it, would not wait for
    their image.
    """
    said = (made["metadata"].get("annotations") or {}).get(optin.NOT_HELD)
    why = f"admission says: {said}" if said else "is ckpt-agent's admission webhook running?"
    return [
        f"container {each['name']} would start from the beginning instead of waiting; {why}"
        for each in _long_running(made["spec"])
        if each["name"] in members and not _held(each)
    ]


def _held(container: Json) -> bool:
    return list(container.get("command") or ())[:1] == [HOLD]


def _long_running(spec: Json) -> list[Json]:
    """The containers that an image can be of."""
    sidecars = [
        each for each in spec.get("initContainers") or () if each.get("restartPolicy") == "Always"
    ]
    return [*spec["containers"], *sidecars]


def node_objections(template: Json, node: Json) -> list[str]:
    """Why a pod of ``template`` could never run on ``node``, as a scheduler would see it."""
    spec, labels = template["spec"], node["metadata"].get("labels") or {}
    found = []
    if not any(
        each.get("type") == "Ready" and each.get("status") == "True"
        for each in node.get("status", {}).get("conditions") or ()
    ):
        found.append("it is not ready")
    tolerations = spec.get("tolerations") or ()
    if node["spec"].get("unschedulable"):
        found.append("it is cordoned: kubectl uncordon it")
    for taint in node["spec"].get("taints") or ():
        cordon = taint.get("key") == "node.kubernetes.io/unschedulable"
        if (
            taint.get("effect") in _NO_SCHEDULE
            and not cordon
            and not _tolerated(taint, tolerations)
        ):
            found.append(f"its taint {_taint(taint)} is not tolerated by the pod")
    for key, value in (spec.get("nodeSelector") or {}).items():
        if labels.get(key) != value:
            found.append(f"the pod's nodeSelector wants the label {key}={value}")
    terms = affinity.terms(spec)
    if terms and not any(_matches(term, labels) for term in terms):
        found.append("the pod's node affinity does not match its labels")
    return found


def _taint(taint: Json) -> str:
    value = f"={taint['value']}" if taint.get("value") else ""
    return f"{taint.get('key')}{value}:{taint.get('effect')}"


def _tolerated(taint: Json, tolerations: Any) -> bool:
    def tolerates(each: Json) -> bool:
        if each.get("effect") not in (None, "", taint.get("effect")):
            return False
        if each.get("operator", "Equal") == "Exists":
            return each.get("key") in (None, "", taint.get("key"))
        return each.get("key") == taint.get("key") and each.get("value", "") == taint.get(
            "value", ""
        )

    return any(tolerates(each) for each in tolerations)


def _matches(term: Json, labels: Json) -> bool:
    """Whether labels match a term; what pins to a node by name is replaced and so left out."""
    return all(_expression(each, labels) for each in term.get("matchExpressions") or ())


def _expression(expression: Json, labels: Json) -> bool:
    key, values = str(expression.get("key")), list(expression.get("values") or ())
    here = labels.get(key)
    match expression.get("operator"):
        case "In":
            return here in values
        case "NotIn":
            return here not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case "Gt" | "Lt" as operator:
            try:
                left, right = int(str(here)), int(str(values[0]))
            except (ValueError, IndexError):
                return False
            return left > right if operator == "Gt" else left < right
    return True  # an operator of a later version: the scheduler decides


def replacement(
    template: Json, *, image: str, members: Collection[str], node: str, name: str | None = None
) -> dict[str, Any]:
    """The pod to create: ``template``, for no other node than ``node``, with ``members`` waiting
    for ``image``. One that was never opted in is now, since only then it waits.
    """
    made = copy.deepcopy({"apiVersion": "v1", "kind": "Pod", **template})
    metadata, spec = made["metadata"], made["spec"]
    metadata["name"] = name or metadata["name"]
    metadata["annotations"] = {**(metadata.get("annotations") or {}), optin.RESTORE: image}
    _opt_in(metadata, spec, members)
    _stand_alone(metadata)
    spec.pop("nodeName", None)
    spec["affinity"] = affinity.pinned(spec, node)
    return made


def trial(replacement: Json) -> dict[str, Any]:
    """A replacement for admission to look at, before it is known what the images run."""
    made = copy.deepcopy(dict(replacement))
    started = {str(each["name"]): ["/trial"] for each in _long_running(made["spec"])}
    for each in _long_running(made["spec"]):
        started[str(each["name"])] += each.get("args") or []
    return pods.with_entrypoints(made, started)


def _opt_in(metadata: dict[str, Any], spec: Json, members: Collection[str]) -> None:
    """Let admission make every one of ``members`` wait, and no other."""
    wanted = [each for each in _long_running(spec) if each["name"] in members]
    if all(_held(each) for each in wanted):
        return
    metadata["labels"] = {**(metadata.get("labels") or {}), optin.LABEL: optin.ENABLED}
    metadata["annotations"][optin.CONTAINERS] = ",".join(str(each["name"]) for each in wanted)


def _stand_alone(metadata: dict[str, Any]) -> None:
    """Take off what ties a pod to a controller: a controller that is gone would have it collected,
    one that is there would count it, and only it takes its finalizer off again.
    """
    metadata.pop("finalizers", None)
    owners = metadata.pop("ownerReferences", None) or ()
    kept = [each for each in owners if not each.get("controller")]
    if kept:
        metadata["ownerReferences"] = kept
    labels = metadata.get("labels") or {}
    for each in _OF_A_CONTROLLER:
        labels.pop(each, None)


def trial_name(name: str) -> str:
    """A name to try a replacement with while the pod itself still has its own."""
    suffix = "-ckpt-trial"
    return name[: _NAME_CHARS - len(suffix)].rstrip("-.") + suffix


def incomplete(failed: Step, move: Move, image: str, why: str) -> Incomplete:
    """What to tell when ``failed`` failed because of ``why``, with ``image`` committed."""
    target = f"ckpt-agent restore {image} -n {move.namespace} --node {move.target}"
    back = f"ckpt-agent restore {image} -n {move.namespace} --node {move.source} --replace"
    into = f"ckpt-agent restore {image} -n {move.namespace} --pod {move.pod}"
    return Incomplete(
        message=f"{_HEADLINES[failed]}: {why}",
        left=(f"image {image} is committed: nothing of the job is lost", *_left(failed, move)),
        next=tuple(_next(failed, move, target=target, back=back, into=into)),
    )


_HEADLINES = {
    Step.DUMP: "the dump failed when its image was already committed",
    Step.DELETE: "the old pod could not be deleted",
    Step.CREATE: "the replacement could not be created",
    Step.SCHEDULE: "the replacement was not scheduled",
    Step.RESTORE: "the image could not be restored",
}


def _left(failed: Step, move: Move) -> Iterator[str]:
    pod = f"pod {move.namespace}/{move.pod}"
    match failed:
        case Step.DUMP:
            yield f"{pod} still exists on node {move.source} and may have been stopped"
        case Step.DELETE:
            how = "waits" if move.waits else "is frozen"
            yield f"{pod} was stopped on node {move.source}, still exists and {how}"
        case Step.CREATE:
            yield f"{pod} was deleted; no replacement exists"
        case Step.SCHEDULE:
            yield f"its replacement {pod} waits for a node"
        case Step.RESTORE:
            yield (
                f"its replacement {pod} waits for the image on node {move.target}, or runs it"
                " already if only the answer was lost"
            )


def _next(failed: Step, move: Move, *, target: str, back: str, into: str) -> Iterator[str]:
    match failed:
        case Step.DUMP | Step.DELETE:
            yield f"{target} --replace"
            if move.waits:
                yield into
            else:
                yield back
        case Step.CREATE:
            yield target
        case Step.SCHEDULE | Step.RESTORE:
            yield into
            if move.source and move.source != move.target:
                yield back
