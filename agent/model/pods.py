"""A pod as its node's agent needs to know it, read from what the API server says.

Promises: pure; everything in a pod is its owner's word and is checked before it names anything.
Does not: keep what the agent does not need: a node has a hundred pods, and each comes anew with
every change of its status.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from agent import errors
from agent.model import optin
from agent.model.container import HOLD

# What the API server gave a pod, and what says where it was: not part of another one like it.
_METADATA_OF_ONE = (
    *("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "selfLink"),
    *("deletionTimestamp", "deletionGracePeriodSeconds", "generateName"),
)
# Gates are gone when a pod runs, and ephemeral containers cannot be asked for at creation.
_SPEC_OF_ONE = ("nodeName", "ephemeralContainers", "schedulingGates")
# The ServiceAccount admission adds this volume to each new pod, under a name of its own.
_TOKEN_VOLUME = "kube-api-access-"  # noqa: S105 - the beginning of a volume's name
_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Pod:
    """``containers`` are the ordinary ones and those init containers that run beside them
    (sidecars), in the order of the specification. ``template_json`` makes another pod like it.
    """

    namespace: str
    name: str
    uid: str
    node: str
    phase: str
    ending: bool
    containers: tuple[str, ...]
    annotations: Mapping[str, str]
    template_json: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a pod's processes run, or ran. ``addresses`` are those of its network that others can
    reach.
    """

    pod: str
    pod_uid: str
    node: str
    addresses: tuple[str, ...]


def read(found: Json) -> Pod:
    """A pod of the API server's JSON; what is not there is empty."""
    metadata, spec = _mapping(found.get("metadata")), _mapping(found.get("spec"))
    status = _mapping(found.get("status"))
    sidecars = [
        each for each in _objects(spec, "initContainers") if each.get("restartPolicy") == "Always"
    ]
    containers = [*sidecars, *_objects(spec, "containers")]
    return Pod(
        namespace=_text(metadata, "namespace"),
        name=_text(metadata, "name"),
        uid=_text(metadata, "uid"),
        node=_text(spec, "nodeName"),
        phase=_text(status, "phase"),
        ending=bool(metadata.get("deletionTimestamp")),
        containers=tuple(_text(each, "name") for each in containers),
        annotations=_words(metadata, "annotations", f"{optin.GROUP}/"),
        template_json=json.dumps(template(found), separators=(",", ":")),
    )


def template(found: Json) -> dict[str, Any]:
    """The pod to create for another one like ``found``: its metadata and specification without
    what the API server, the scheduler and its node added. It keeps name, labels and owner.
    """
    metadata = copy.deepcopy(dict(_mapping(found.get("metadata"))))
    spec = copy.deepcopy(dict(_mapping(found.get("spec"))))
    for field in _METADATA_OF_ONE:
        metadata.pop(field, None)
    for field in _SPEC_OF_ONE:
        spec.pop(field, None)
    annotations = {
        key: value
        for key, value in _mapping(metadata.get("annotations")).items()
        if key not in (_APPLIED, optin.RESTORE)
    }
    metadata["annotations"] = annotations
    spec["volumes"] = [
        each for each in _objects(spec, "volumes") if not _is_token_volume(each.get("name"))
    ]
    for field in ("containers", "initContainers"):
        for container in _objects(spec, field):
            mounts = _objects(container, "volumeMounts")
            container["volumeMounts"] = [m for m in mounts if not _is_token_volume(m.get("name"))]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def with_entrypoints(pod: Json, started: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """``pod``, a template, with what its images run noted where it leaves that to them: admission
    cannot look it up. ``started`` are the whole commands that containers were started with.
    """
    found = copy.deepcopy(dict(pod))
    annotations = found["metadata"].setdefault("annotations", {})
    known: dict[str, list[str]] = {}
    for field in ("containers", "initContainers"):
        for container in _objects(found["spec"], field):
            words = list(started.get(_text(container, "name"), ()))
            given = len(container.get("args") or ())
            # What the pod gives as arguments follows what the image runs.
            words = words[: len(words) - given] if given else words
            if words and words[0] != HOLD and not container.get("command"):
                known[_text(container, "name")] = words
    missing = {name: words for name, words in known.items() if name not in _noted(annotations)}
    if missing:
        annotations[optin.ENTRYPOINT] = json.dumps({**_noted(annotations), **missing})
    return found


def unscheduled(pod: Json) -> str:
    """Why a pod has no node yet, as the scheduler tells."""
    for each in _objects(_mapping(pod.get("status")), "conditions"):
        if each.get("type") == "PodScheduled" and each.get("status") != "True":
            return str(each.get("message") or each.get("reason") or "no reason is given")
    return "the scheduler has not looked at it"


def _noted(annotations: Json) -> Mapping[str, Any]:
    try:
        return optin.entrypoints(annotations)
    except errors.InvalidInput:
        return {}


def _is_token_volume(name: object) -> bool:
    return isinstance(name, str) and name.startswith(_TOKEN_VOLUME)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _objects(of: Json, field: str) -> list[dict[str, Any]]:
    value = of.get(field)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _text(of: Json, field: str) -> str:
    value = of.get(field)
    return value if isinstance(value, str) else ""


def _words(of: Json, field: str, prefix: str) -> dict[str, str]:
    return {
        key: value
        for key, value in _mapping(of.get(field)).items()
        if isinstance(value, str) and key.startswith(prefix)
    }
