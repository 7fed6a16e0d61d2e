"""Epoch after epoch of a pod's containers (``node.watch``), for a caller who stays to hear of each.

Promises: each epoch is an operation of its own, let in and counted as any dump, so that between
two of them others may have the pod; a pod is watched once; containers that were started anew are
not taken for those that were watched; a watch ends when its caller may not make images any more.
Does not: go on without its caller, or remove old epochs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

from agent import errors
from agent.engines.base import CaptureOptions
from agent.model import ids
from agent.model.container import Container
from agent.model.pods import Pod
from agent.node import watch
from agent.node.dump import Cancel, DumpOutcome, Member
from agent.node.pods import Pods
from agent.node.podwork import DumpOrder, PodDump, PodWork

# Each epoch asks the runtime about the pod and writes files; whoever leaves days between two is as
# well off without what is kept.
SHORTEST_S, LONGEST_S = 1.0, 86400.0


class PodWatches:
    """Those of this node."""

    def __init__(self, pods: Pods, work: PodWork) -> None:
        self._pods, self._work = pods, work
        self._lock = threading.Lock()
        self._watched: set[tuple[str, str]] = set()

    def watch(
        self,
        order: DumpOrder,
        stop: watch.Stop,
        *,
        every_s: float | None,
        most: int | None,
        allowed: Callable[[], None],
        done: Callable[[PodDump], None],
        failed: Callable[[errors.CkptError], None],
        late: Callable[[float, float], None],
    ) -> watch.Watched:
        """Dump the pod as ``order`` says again and again; the rest as ``node.watch.watch``, whose
        errors this raises, and what finding the pod raises. ``allowed`` raises for a caller that
        may not do so any more.

        Raises also:
            errors.Forbidden: it may not any more.
            errors.TargetBusy: one of the containers is watched already.
            errors.Interrupted: it was asked to stop, by its caller's leaving or the agent's end.
        """
        pod = self._pods.find(order.namespace, order.pod, order.pod_uid)
        containers = self._pods.running(pod, order.containers)
        order = dataclasses.replace(
            order, pod_uid=pod.uid, containers=tuple(each.name for each in containers)
        )
        made: list[PodDump] = []
        refused: list[errors.Forbidden] = []

        def once(members: Sequence[Member], options: CaptureOptions, cancel: Cancel) -> DumpOutcome:
            del members  # found again when it was let in
            made[:] = [
                self._work.dump(
                    dataclasses.replace(order, options=options), cancel, lambda step: None
                )
            ]
            return made[0].outcome

        def members() -> list[Member]:
            try:
                # Who cannot be asked now has taken nothing away.
                with contextlib.suppress(errors.Unreachable):
                    allowed()
            except errors.Forbidden as exc:
                refused.append(exc)
                raise errors.Interrupted("the watch was ended") from exc
            now = self._pods.running(
                self._pods.find(order.namespace, order.pod, order.pod_uid), order.containers
            )
            _check_same(pod, containers, now)
            return [Member(ids.member_name(each.name), each.pid) for each in now]

        with self._alone(pod, containers):
            found = watch.watch(
                once,
                [each.pid for each in containers],
                members,
                order.options,
                stop,
                every_s=every_s,
                most=most,
                done=lambda outcome: done(made[0]),
                failed=failed,
                late=late,
            )
        if refused:
            raise errors.Forbidden(
                f"the watch of pod {pod} was ended after {found.epochs} dumps, the pod goes on:"
                f" {refused[0].message}",
                hint=refused[0].hint,
            )
        stop.check()
        return found

    @contextlib.contextmanager
    def _alone(self, pod: Pod, containers: Sequence[Container]) -> Iterator[None]:
        keys = {(pod.uid, each.name) for each in containers}
        with self._lock:
            if keys & self._watched:
                raise errors.TargetBusy(
                    f"pod {pod} is watched already",
                    hint="end the other watch, or dump the pod once",
                )
            self._watched |= keys
        try:
            yield
        finally:
            with self._lock:
                self._watched -= keys


def _check_same(pod: Pod, before: Sequence[Container], now: Sequence[Container]) -> None:
    ended = [each.name for each in before if not any(each.id == other.id for other in now)]
    if ended:
        raise errors.TargetExited(
            f"container {ended[0]} of pod {pod} was started anew", hint="watch the pod again"
        )
