"""The engines for containers of pods, made of the settings for each operation.

Promises: what needs CRIU is loaded when it is used.
Does not: decide what is dumped or restored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from agent import errors
from agent.engines.base import Engine
from agent.settings import Settings

if TYPE_CHECKING:
    from agent.engines.container.engine import ContainerEngine
    from agent.model import plan as model_plan
    from agent.model.container import Container
    from agent.model.pods import Pod
    from agent.model.streams import MemberSource
    from agent.node.pods import State

log = logging.getLogger(__name__)


class PodEngines:
    """The engines that dump and restore the containers of pods."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @contextlib.contextmanager
    def prepared(self) -> Iterator[PodEngines]:
        """The node is told, within the context, what CRIU needs under a kubelet's checkpoint."""
        if self._settings.kubelet_address is None:
            yield self
            return
        with needing_pycriu():
            from agent.engines.kubelet import runcconf
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(runcconf.installed(self._settings.runc_conf))
            except errors.EnvironmentUnfit as exc:
                # Containers without open connections can be checkpointed all the same.
                log.warning("%s; %s", exc.message, exc.hint)
            yield self

    def for_dump(self, wanted: str, pod: Pod, containers: Sequence[Container]) -> Engine:
        """The engine that is wanted, else the container engine where it can, as it always must for
        a pod that was opted in.
        """
        if wanted == "kubelet" or (not wanted and self._prefers_kubelet(containers)):
            return self._kubelet(pod, containers)
        return self._containers(containers)

    def for_restore(self, pod: Pod, containers: Sequence[Container]) -> Engine:
        """The container engine, for images that a kubelet's archive was taken into as well."""
        with needing_pycriu():
            from agent.engines.kubelet import inner
        return inner.RestoresInner(self._containers(containers))

    def check_image(self, source: MemberSource) -> None:
        """See whether the image has what a restore takes; raises if not."""
        with needing_pycriu():
            from agent.engines.kubelet import inner
        inner.of(source)

    def plan(self, containers: Sequence[Container]) -> model_plan.Plan:
        """What a dump of the containers would take."""
        from agent.node import plan as node_plan

        engine = self._containers(containers)
        by_kubelet = self._prefers_kubelet(containers)
        return node_plan.plan_containers(
            containers,
            lambda each: () if by_kubelet else engine.examine(each),
            ghost_limit_bytes=self._settings.ghost_limit_bytes,
        )

    def recover(self) -> list[str]:
        """Undo what killed agents left on this node; what that was, a line each."""
        found = dataclasses.asdict(self._containers(()).recover())
        lines = [f"{name}: {value}" for name, value in found.items() if value]
        if self._settings.kubelet_address:
            from agent.engines.kubelet import engine

            archives = engine.recover(self._settings.kubelet_checkpoints)
            lines += [f"archive: {name}" for name in archives]
        return lines

    def _prefers_kubelet(self, containers: Sequence[Container]) -> bool:
        ordinary = [each for each in containers if hold_state(each.pid) == "other"]
        if self._settings.kubelet_address is None:
            return False
        engine = self._containers(containers)
        return any(engine.examine(each) for each in ordinary)

    def _containers(self, containers: Sequence[Container]) -> ContainerEngine:
        with needing_pycriu():
            from agent.engines.container.engine import ContainerEngine
        return ContainerEngine(
            containers, bundle=self._settings.criu_bundle, work_dir=self._settings.work_dir
        )

    def _kubelet(self, pod: Pod, containers: Sequence[Container]) -> Engine:
        if self._settings.kubelet_address is None:
            raise errors.EnvironmentUnfit(
                "this agent was not told how to reach the node's kubelet",
                hint="set kubelet_address and kubelet_trust (CKPT_AGENT_KUBELET_ADDRESS, ...)",
            )
        with needing_pycriu():
            from agent.engines.kubelet import client, engine
        kubelet = client.Kubelet(
            self._settings.kubelet_address, client.Trust.parse(self._settings.kubelet_trust)
        )
        return engine.KubeletEngine(
            kubelet,
            pod.namespace,
            pod.name,
            containers,
            directory=self._settings.kubelet_checkpoints,
        )


def hold_state(pid: int) -> State:
    """What a container's first process is."""
    from agent.engines.container import holding

    if holding.waits(pid):
        return "waits"
    # A hold that has just been started says nothing yet.
    return "runs" if holding.follows(pid) else "other"


@contextlib.contextmanager
def needing_pycriu() -> Iterator[None]:
    """Around imports of the engine: pycriu comes with CRIU, not with this package, and what does
    not need CRIU works without.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "pycriu":
            raise
        raise errors.CriuMissing(
            "CRIU's Python messages (pycriu) are not installed for this Python",
            hint="run scripts/setup as this user, or install python3-pycriu 4.2",
        ) from exc
