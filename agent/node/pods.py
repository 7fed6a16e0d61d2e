"""What runs on this node: pods as the API server tells, containers as the runtime does.

Promises: a container is found by its pod's uid, so that a pod that was replaced under the same
name is never taken for the one that was meant; a placeholder is known by its first process, not by
what its pod says of itself.
Does not: start or stop anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from agent import errors
from agent.cri.runtime import Listed, Version
from agent.host import clock
from agent.model import hooks, ids, optin
from agent.model.container import Container
from agent.model.pods import Pod

# A container that was just started is looked at this often until it holds.
_LOOK_S = 0.1
# The watch may be behind the scheduler by this much; then a pod is not on this node.
_KNOWN_S = 2.0
# A container's first process is the runtime's own program before it becomes the pod's.
_START_S = 10.0
_OVER = ("Succeeded", "Failed")

State = Literal["waits", "runs", "other"]
"""What a container's first process is: hold that waits for a restore, hold with a workload below
it, or anything else."""


class Watch(Protocol):
    """This node's pods (agent.kube.pods)."""

    def wait_for(
        self,
        namespace: str,
        name: str,
        good: Callable[[Pod | None], bool],
        deadline: clock.Deadline,
    ) -> Pod | None:
        """One of them, when it is good or when no time is left."""


class Runtime(Protocol):
    """This node's containers (agent.cri.runtime)."""

    def ready(self) -> Version:
        """Which runtime answers, and is ready."""

    def running(self, pod_uid: str = "") -> list[Listed]:
        """What runs."""

    def container(self, listed: Listed) -> Container:
        """What one of them is made of."""


class Pods:
    """Finds pods and containers of this node."""

    def __init__(
        self, watch: Watch, runtime: Runtime, state: Callable[[int], State], node: str
    ) -> None:
        """``state`` looks at a container's first process, by its pid."""
        self._watch = watch
        self._runtime = runtime
        self._state = state
        self._node = node

    def find(self, namespace: str, name: str, uid: str = "") -> Pod:
        """The pod of that name, and of that uid if one is given.

        Raises:
            errors.InvalidInput: no pod can have that name.
            errors.NotFound: it does not run here.
            errors.Conflict: one of another uid has the name.
        """
        checked = ids.namespace_name(namespace), ids.group_name(name)
        pod = self._watch.wait_for(
            *checked, lambda found: found is not None, clock.Deadline.after(_KNOWN_S)
        )
        return self._same(pod, namespace, name, uid)

    def running(self, pod: Pod, names: Sequence[str] = ()) -> list[Container]:
        """The running containers of ``pod`` that are meant: ``names``, else those that its owner
        chose, else all; in the order of its specification.

        Raises:
            errors.NotFound: one that is named is none of its containers, or does not run.
            errors.TargetUnsuitable: none runs.
            errors.InvalidInput: its owner's choice, or hooks, make no sense.
        """
        chosen = tuple(dict.fromkeys(names)) or optin.chosen_containers(pod.annotations)
        for name in chosen or ():
            if name not in pod.containers:
                raise errors.NotFound(
                    f"pod {pod} has no container {name!r}",
                    hint=f"it has {', '.join(pod.containers)}",
                )
        here = self._listed(pod)
        missing = [name for name in chosen or () if name not in here]
        if missing:
            raise errors.NotFound(
                f"container {missing[0]} of pod {pod} does not run",
                hint="wait until it does, or name the containers that run",
            )
        wanted = [name for name in pod.containers if name in (chosen or pod.containers)]
        before = hooks.read(pod.annotations, pod.containers).names
        found = [
            dataclasses.replace(self._runtime.container(here[name]), hooks=before)
            for name in wanted
            if name in here
        ]
        if not found:
            raise errors.TargetUnsuitable(
                f"no container of pod {pod} runs", hint="wait until the pod is running"
            )
        return found

    def with_containers(self, namespace: str, name: str, uid: str) -> tuple[Pod, list[Container]]:
        """``find`` and ``running`` in one."""
        pod = self.find(namespace, name, uid)
        return pod, self.running(pod)

    def holding(
        self,
        namespace: str,
        name: str,
        uid: str,
        members: Sequence[str],
        deadline: clock.Deadline,
        check: Callable[[], None],
    ) -> tuple[Pod, list[Container]]:
        """Wait until every container of ``members`` holds; ``check`` is called meanwhile and may
        raise.

        Raises:
            errors.InvalidInput: no pod can have that name.
            errors.TargetUnsuitable: the pod is no placeholder for these members, or has ended.
            errors.Conflict: a pod of another uid has the name.
            errors.DeadlineExceeded: it does not hold in time.
        """
        checked = ids.namespace_name(namespace), ids.group_name(name)
        ordinary_since: dict[str, float] = {}
        while True:
            check()
            if deadline.expired:
                raise errors.DeadlineExceeded(
                    f"pod {namespace}/{name} did not become a placeholder on node {self._node} in"
                    " time",
                    hint="look at the pod's events: was it scheduled to this node, does it start?",
                )
            pod = self._watch.wait_for(
                *checked, lambda found: found is not None, deadline.sooner(_LOOK_S)
            )
            if pod is not None:
                found = self._held(self._same(pod, namespace, name, uid), members, ordinary_since)
                if found is not None:
                    return pod, found
                clock.wait_until(lambda: False, deadline.sooner(_LOOK_S), every_s=_LOOK_S)

    def _held(
        self, pod: Pod, members: Sequence[str], ordinary_since: dict[str, float]
    ) -> list[Container] | None:
        """The containers of ``members`` if all of them hold, None if some may still come to."""
        if pod.ending or pod.phase in _OVER:
            raise errors.TargetUnsuitable(
                f"pod {pod} has ended or is being deleted", hint="create the placeholder again"
            )
        unknown = [name for name in members if name not in pod.containers]
        if unknown:
            raise errors.TargetUnsuitable(
                f"pod {pod} has no container {', '.join(unknown)}, which the image has",
                hint="create the placeholder from the image's own pod template",
            )
        here = self._listed(pod)
        found = []
        for name in members:
            if name not in here:
                continue
            try:
                each = self._runtime.container(here[name])
            except errors.NotFound:  # it has just ended; its successor may hold
                continue
            how = self._state(each.pid)
            if how == "waits":
                found.append(each)
                continue
            began_s = ordinary_since.setdefault(each.id, clock.monotonic_s())
            if how == "runs" or clock.monotonic_s() - began_s > _START_S:
                raise errors.TargetUnsuitable(
                    f"container {name} of pod {pod} runs an ordinary process: it is no placeholder",
                    hint=f"opt the pod in (label {optin.LABEL}={optin.ENABLED}) and create it with"
                    f" the annotation {optin.RESTORE}",
                )
        return found if len(found) == len(members) else None

    def _listed(self, pod: Pod) -> dict[str, Listed]:
        """The pod's running containers by name, of several attempts the last."""
        found = sorted(self._runtime.running(pod.uid), key=lambda each: each.attempt)
        return {each.name: each for each in found if each.pod_uid == pod.uid}

    def _same(self, pod: Pod | None, namespace: str, name: str, uid: str) -> Pod:
        if pod is None:
            raise errors.NotFound(
                f"there is no pod {namespace}/{name} on node {self._node}",
                hint="check the name, the namespace, and on which node the pod runs",
            )
        if uid and pod.uid != uid:
            raise errors.Conflict(
                f"pod {pod} is another one now: its uid is {pod.uid}",
                hint="look at it again: somebody replaced it",
            )
        return pod
