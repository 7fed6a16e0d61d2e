"""What the webhook adds to a pod that wants to be checkpointed: pure, pod in, JSON patch out.

A held container starts under a tiny pid 1 (``hold``), so that the same pod template serves the
first start and the placeholder that an image is restored into. For that the pod gets a volume, an
init container that copies ``hold`` into it, and each chosen container its mount, two environment
variables and ``hold auto`` before its command. Nothing else of the pod is touched.

A pod of a JobSet that shall come back from an image (``model.intent``) is made to wait for it from
its first moment, on the node that was chosen for it if one was.

Promises: a pod without the label is left as it is; whatever cannot be held starts as an ordinary
pod or container, with a warning that names the reason (it can still be dumped, and restored into
a pod made for it); the patch of a patched pod is empty, also after other webhooks have added
containers; the pod's quality-of-service class stays.
Does not: reject anything, look anything up, or know the image's entrypoint: a container that
leaves ``command`` to its image is held only if the annotation says what the image runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent.admission.holdable import is_ours, place, unholdable, unsuitable, variables
from agent.admission.podfields import entries, mapping
from agent.model import affinity, jobset, optin
from agent.model.intent import Intent

Patch = list[dict[str, Any]]

_ANNOTATIONS = "/metadata/annotations"
_MIRROR = "kubernetes.io/config.mirror"
# Volumes that keep no node from being scaled down; to Cluster Autoscaler any other emptyDir does.
_SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
# An API server cuts warnings beyond 256 characters where there are several.
WARNING_CHARACTERS = 250
# For copying one small file. Requests equal limits, so that a Guaranteed pod stays one.
_INIT_RESOURCES = {"cpu": "100m", "memory": "64Mi"}
# Seen within a second; given up by whoever waits for the restore, not by the kubelet (68 years).
_STARTUP = {"periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 2**31 - 1}
# Nobody in particular: the number that images without users of their own commonly use.
_INIT_USER = 65532


@dataclasses.dataclass(frozen=True)
class Mutation:
    """``patch`` is a JSON patch (RFC 6902), empty if nothing is to be changed; ``warnings`` are
    for the person who made the pod.
    """

    patch: Patch
    warnings: tuple[str, ...] = ()


def mutate(pod: Mapping[str, Any], *, image: str, intent: Intent | None = None) -> Mutation:
    """Return what makes ``pod`` one whose chosen containers are held. ``image`` is the agent's
    image, which carries ``hold``; ``intent`` is what its JobSet shall come back as, if it shall.

    Raises:
        errors.InvalidInput: this is not a pod, or one of its annotations does not make sense.
    """
    metadata, spec = mapping(pod, "metadata"), mapping(pod, "spec")
    if mapping(metadata, "labels").get(optin.LABEL) != optin.ENABLED:
        return Mutation([])
    annotations = mapping(metadata, "annotations")
    if _MIRROR in annotations:
        # The kubelet's picture of a pod that it runs from a file: a change would not reach it.
        return Mutation([], ("ckpt-agent: a static pod starts as usual, nothing of it is held",))
    if reasons := unsuitable(spec):
        return _told(metadata, [], {"pod": ", ".join(reasons)})

    init, ordinary = entries(spec, "initContainers"), entries(spec, "containers")
    chosen = optin.chosen_containers(annotations)
    entrypoints = optin.entrypoints(annotations)
    not_held: dict[str, str] = {}
    held: list[tuple[str, int, Patch]] = []
    for field, containers in (("initContainers", init), ("containers", ordinary)):
        for index, container in enumerate(containers):
            name = str(container.get("name", ""))
            if not _meant(field, container, chosen):
                continue
            reason = unholdable(container, entrypoints)
            if reason:
                not_held[name] = reason
            else:
                held.append((field, index, _held(container, entrypoints.get(name))))
    not_held |= _absent(chosen, init, ordinary)

    patch: Patch = []
    if held:
        patch += _volume(metadata, spec)
        installs, shift = _install(spec, init, held, image)
        patch += installs
        for field, index, changes in held:
            at = shift(index) if field == "initContainers" else index
            patch += [
                change | {"path": f"/spec/{field}/{at}{change['path']}"} for change in changes
            ]
        patch += _waiting(pod, intent, patch)
    return _told(metadata, patch, not_held)


def _meant(field: str, container: Mapping[str, Any], chosen: Sequence[str] | None) -> bool:
    """Whether the container shall be held: by name, or all ordinary ones. An init container can
    be meant only as a sidecar, since others end before anybody could dump them.
    """
    if field == "containers":
        return chosen is None or container.get("name") in chosen
    return (
        chosen is not None
        and container.get("name") in chosen
        and container.get("restartPolicy") == "Always"
    )


def _held(container: Mapping[str, Any], entrypoint: list[str] | None) -> Patch:
    """The changes of one container, with paths below it."""
    patch: Patch = []
    command = entries(container, "command", str)
    if not command:
        # The kubelet expands $(NAME) in a command, which it does not in an image's entrypoint.
        words = [word.replace("$", "$$") for word in entrypoint or ()]
        patch += _add("/command", [*optin.HOLD_AUTO, *words])
    elif command[0] != optin.HOLD_AUTO[0]:
        patch += [
            {"op": "add", "path": f"/command/{index}", "value": word}
            for index, word in enumerate(optin.HOLD_AUTO)
        ]
    mounts = entries(container, "volumeMounts")
    if not any(is_ours(m) and place(m) == optin.DIRECTORY for m in mounts):
        patch += _append(
            "/volumeMounts", mounts, [{"name": optin.VOLUME, "mountPath": optin.DIRECTORY}]
        )
    env = entries(container, "env")
    present = {variable.get("name") for variable in env}
    missing = [v for v in variables(container) if v["name"] not in present]
    return [*patch, *_append("/env", env, missing), *_hooks(container), *_startup(container)]


def _hooks(container: Mapping[str, Any]) -> Patch:
    """The container's hooks are for its workload, and do nothing in a placeholder."""
    patch: Patch = []
    for name in ("postStart", "preStop"):
        program = mapping(mapping(mapping(container, "lifecycle"), name), "exec")
        command = entries(program, "command", str)
        if command and command[0] != optin.HOLD_HOOK[0]:
            patch += [
                {"op": "add", "path": f"/lifecycle/{name}/exec/command/{index}", "value": word}
                for index, word in enumerate(optin.HOLD_HOOK)
            ]
    return patch


def _startup(container: Mapping[str, Any]) -> Patch:
    """A liveness probe would end a placeholder, in the middle of a long restore as well: it has to
    begin when a workload runs. A sidecar has no startup probe, which would keep the others from
    starting, and one of its owner's is its owner's.
    """
    if (
        not container.get("livenessProbe")
        or container.get("startupProbe")
        or container.get("restartPolicy") == "Always"
    ):
        return []
    probe = {"exec": {"command": list(optin.HOLD_RUNNING)}, **_STARTUP}
    return _add("/startupProbe", probe)


def _volume(metadata: Mapping[str, Any], spec: Mapping[str, Any]) -> Patch:
    """The volume, and the note that the pod may be moved as before in spite of it."""
    patch: Patch = []
    annotations, volumes = mapping(metadata, "annotations"), entries(spec, "volumes")
    said = str(annotations.get(_SAFE_TO_EVICT) or "")
    if optin.VOLUME not in said.split(","):
        patch += _annotate(
            annotations, _SAFE_TO_EVICT, ",".join(filter(None, (said, optin.VOLUME)))
        )
    if not any(volume.get("name") == optin.VOLUME for volume in volumes):
        patch += _append("/spec/volumes", volumes, [{"name": optin.VOLUME, "emptyDir": {}}])
    return patch


def _waiting(pod: Mapping[str, Any], intent: Intent | None, before: Patch) -> Patch:
    """The mark of a placeholder, and the node that was chosen for it; ``before`` is the rest of the
    patch.
    """
    if intent is None:
        return []
    metadata, spec = mapping(pod, "metadata"), mapping(pod, "spec")
    annotations = mapping(metadata, "annotations")
    patch: Patch = []
    if annotations.get(optin.RESTORE) != intent.image:
        made = any(change["path"] == _ANNOTATIONS for change in before)
        patch += _annotate(annotations or made, optin.RESTORE, intent.image)
    node = intent.nodes.get(jobset.identity(pod))
    if node:
        wanted = affinity.pinned(spec, node)
        if wanted != spec.get("affinity"):
            patch += _add("/spec/affinity", wanted)
    return patch


def _install(
    spec: Mapping[str, Any],
    init: Sequence[Mapping[str, Any]],
    held: Sequence[tuple[str, int, Patch]],
    image: str,
) -> tuple[Patch, Callable[[int], int]]:
    """The init container, before every container that needs what it installs, and how that moves
    the numbers of the others.
    """
    ours = [i for i, container in enumerate(init) if container.get("name") == optin.INIT_CONTAINER]
    if not ours:
        installer = _installer(spec, image)
        if not init:
            return _add("/spec/initContainers", [installer]), lambda index: index
        return _add("/spec/initContainers/0", installer), lambda index: index + 1
    at = ours[0]
    if not any(field == "initContainers" and index < at for field, index, _ in held):
        return [], lambda index: index
    move = {"op": "move", "from": f"/spec/initContainers/{at}", "path": "/spec/initContainers/0"}
    return [move], lambda index: index + 1 if index < at else index


def _installer(spec: Mapping[str, Any], image: str) -> dict[str, Any]:
    """The container that copies ``hold``; it satisfies the Pod Security level "restricted"."""
    container: dict[str, Any] = {
        "name": optin.INIT_CONTAINER,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": [optin.HOLD_IN_IMAGE, "install", optin.DIRECTORY],
        "volumeMounts": [{"name": optin.VOLUME, "mountPath": optin.DIRECTORY}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsGroup": _INIT_USER,
            "runAsNonRoot": True,
            "runAsUser": _INIT_USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if _has_resources(spec):
        container["resources"] = {key: dict(_INIT_RESOURCES) for key in ("requests", "limits")}
    return container


def _has_resources(spec: Mapping[str, Any]) -> bool:
    """Whether anything of the pod asks for cpu or memory: one that does not is BestEffort, and
    would become Burstable by an init container that does.
    """
    return any(
        mapping(mapping(part, "resources"), kind).get(resource)
        for part in (spec, *entries(spec, "initContainers"), *entries(spec, "containers"))
        for kind in ("requests", "limits")
        for resource in ("cpu", "memory")
    )


def _absent(
    chosen: Sequence[str] | None,
    init: Sequence[Mapping[str, Any]],
    ordinary: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Names of the annotation that no container which could be held has."""
    present = {container.get("name") for container in ordinary}
    present |= {c.get("name") for c in init if c.get("restartPolicy") == "Always"}
    return {
        name: "the pod has no such container or sidecar"
        for name in chosen or ()
        if name not in present
    }


def _told(metadata: Mapping[str, Any], patch: Patch, not_held: Mapping[str, str]) -> Mutation:
    """Add to ``patch`` the annotation that tells what is not held; warn of the same."""
    annotations = mapping(metadata, "annotations")
    text = "; ".join(f"{name}: {reason}" for name, reason in not_held.items())
    if text and annotations.get(optin.NOT_HELD) != text:
        # Before the rest of the patch there may be no annotations at all.
        made = any(change["path"] == _ANNOTATIONS for change in patch)
        patch = [*patch, *_annotate(annotations or made, optin.NOT_HELD, text)]
    elif not text and optin.NOT_HELD in annotations:
        patch = [*patch, {"op": "remove", "path": _pointer(optin.NOT_HELD)}]
    warnings = tuple(
        f"ckpt-agent: {name} starts as usual, not held: {reason}"[:WARNING_CHARACTERS]
        for name, reason in not_held.items()
    )
    return Mutation(patch, warnings)


def _annotate(present: object, key: str, value: str) -> Patch:
    """Add an annotation; ``present`` is whether there are others."""
    if present:
        return _add(_pointer(key), value)
    return _add(_ANNOTATIONS, {key: value})


def _pointer(key: str) -> str:
    """A JSON pointer (RFC 6901) to an annotation."""
    return f"{_ANNOTATIONS}/{key.replace('~', '~0').replace('/', '~1')}"


def _add(path: str, value: object) -> Patch:
    return [{"op": "add", "path": path, "value": value}]


def _append(path: str, present: Sequence[object], values: Sequence[object]) -> Patch:
    """Add ``values`` at the end of a list that may not be there yet."""
    if not values:
        return []
    if not present:
        return _add(path, list(values))
    return [{"op": "add", "path": f"{path}/-", "value": value} for value in values]
