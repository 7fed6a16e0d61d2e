"""Whether a pod or a container can be held, with every reason that speaks against it.

Promises: what is refused here would not start, or not restore, under ``hold``; what is not known to
hinder is not refused.
Does not: know what an engine can capture; the agent's plan tells that of a running pod.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from agent.admission.podfields import entries, mapping
from agent.model import optin

# Programs that refuse to be anything but a container's first process.
_INIT_SYSTEMS = ("init", "systemd")
_NO_COMMAND = (
    f"it leaves its command to the image; set command, or annotate {optin.ENTRYPOINT} with what the"
    " image runs"
)


def unsuitable(spec: Mapping[str, Any]) -> list[str]:
    """Why no container of the pod can be held, every reason."""
    windows = (
        mapping(spec, "os").get("name") == "windows"
        or mapping(spec, "nodeSelector").get("kubernetes.io/os") == "windows"
    )
    volumes = [v for v in entries(spec, "volumes") if v.get("name") == optin.VOLUME]
    rows = (
        (windows, "it is for Windows"),
        (spec.get("hostPID") is True, "hostPID: hold must be pid 1"),
        (spec.get("shareProcessNamespace") is True, "shareProcessNamespace: hold must be pid 1"),
        (spec.get("hostNetwork") is True, "hostNetwork: its sockets are the node's"),
        (spec.get("hostIPC") is True, "hostIPC: its shared memory is the node's"),
        (spec.get("hostUsers") is False, "hostUsers: false, a user namespace of its own"),
        (any("emptyDir" not in v for v in volumes), f"its volume {optin.VOLUME} is no emptyDir"),
    )
    return [reason for holds, reason in rows if holds]


def unholdable(container: Mapping[str, Any], entrypoints: Mapping[str, list[str]]) -> str:
    """Why this container cannot be held, or nothing."""
    if not entries(container, "command", str) and container.get("name") not in entrypoints:
        return _NO_COMMAND
    command = entries(container, "command", str) or entrypoints[str(container.get("name"))]
    if posixpath.basename(command[0]) in _INIT_SYSTEMS:
        return "it runs an init system, which must be pid 1"
    if reason := _unanswered(container):
        return reason
    if container.get("tty") is True or container.get("stdin") is True:
        return "it has a terminal or standard input (tty, stdin)"
    for mount in entries(container, "volumeMounts"):
        if place(mount) == optin.DIRECTORY and not is_ours(mount):
            return f"something else is mounted at {optin.DIRECTORY}"
    wanted = {variable["name"]: variable for variable in variables(container)}
    for variable in entries(container, "env"):
        ours = wanted.get(variable.get("name"))
        if ours is not None and not _says(variable, ours):
            return f"it sets {variable['name']} itself"
    return ""


def _unanswered(container: Mapping[str, Any]) -> str:
    """What its kubelet would ask of a placeholder, and get no answer to; or nothing."""
    if container.get("restartPolicy") == "Always" and container.get("startupProbe"):
        return "it is a sidecar with a startupProbe, which a placeholder could not pass"
    hook = mapping(mapping(container, "lifecycle"), "postStart")
    for way in ("httpGet", "tcpSocket"):
        if hook.get(way):
            return f"it has a postStart hook by {way}, which nobody answers in a placeholder"
    return ""


def place(mount: Mapping[str, Any]) -> str:
    """Where a volume is mounted, in one spelling."""
    return posixpath.normpath("/" + str(mount.get("mountPath", "")).lstrip("/"))


def is_ours(mount: Mapping[str, Any]) -> bool:
    """Whether all of our volume is mounted, writable."""
    return mount.get("name") == optin.VOLUME and not any(
        mount.get(key) for key in ("readOnly", "subPath", "subPathExpr")
    )


def variables(container: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The variables by which ``hold`` knows what to do."""
    path = f"metadata.annotations['{optin.RESTORE}']"
    return [
        {"name": optin.RESTORE_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": path}}},
        {"name": optin.CONTAINER_VARIABLE, "value": str(container.get("name", ""))},
    ]


def _says(variable: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether a variable is ours; the API server adds ``apiVersion`` to a field reference."""
    if "value" in ours:
        return variable.get("value") == ours["value"] and not variable.get("valueFrom")
    reference = mapping(mapping(variable, "valueFrom"), "fieldRef")
    return bool(reference.get("fieldPath") == ours["valueFrom"]["fieldRef"]["fieldPath"])
