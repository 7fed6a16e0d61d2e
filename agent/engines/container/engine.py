"""The ``container`` engine: the processes of containers on this node, from outside of them.

It is made for one operation on the containers that it is given: ``capture`` finds its container by
the number of its pid 1, ``restore`` finds its placeholder by the container's name in the image.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from typing import Any

from agent import errors
from agent.engines.base import (
    CaptureOptions,
    CaptureReport,
    Cut,
    Gate,
    Promises,
    RestoredTree,
    RestoreOptions,
)
from agent.engines.container import conflicts, files, target
from agent.engines.container.bundle import BUNDLE_DIR, Bundle
from agent.engines.container.nested import NestedPlaceholder
from agent.engines.container.placeholder import Placeholder
from agent.engines.container.tree import ContainerTree
from agent.engines.criu import dump, feed, journal, preflight, recovery, restore
from agent.host import clock, proc
from agent.model.container import Container
from agent.model.streams import MemberSink, MemberSource


class ContainerEngine:
    """Dumps containers whose pid 1 is ``hold``, and restores them into placeholders.

    ``bundle`` is the directory of the CRIU bundle. ``work_dir`` is for scratch files and should be
    on a real disk; ``runtime_dir`` for locks, emptied at boot; both are the node's, so that what a
    killed agent left is found by the next.
    """

    name = "container"
    promises = Promises(incremental=False, live_tcp=False, isolates=True, streams_memory=True)

    def __init__(
        self,
        containers: Iterable[Container] = (),
        *,
        bundle: str = BUNDLE_DIR,
        work_dir: str = journal.WORK_DIR,
        runtime_dir: str = journal.RUNTIME_DIR,
    ) -> None:
        self._containers = tuple(containers)
        self._bundle = bundle
        self._places = journal.Places(runtime_dir, work_dir)
        self._filling = threading.Lock()
        self._filled: set[files.Place] = set()

    def recover(self) -> recovery.Findings:
        """Undo what agents that were killed left on this node; every dump and restore begins with
        it. Say what it was.
        """
        preflight.privileges()
        self._places.prepare()
        return recovery.recover(self._places)

    def examine(self, container: Container) -> list[str]:
        """Why this container cannot be dumped as it is; empty if it can. Touches nothing."""
        try:
            preflight.privileges()
            Bundle(self._bundle)
            target.find(container)
        except (errors.Refused, errors.EnvironmentUnfit) as exc:
            return [f"{exc.message}: {exc.hint}" if exc.hint else exc.message]
        return []

    def capture(
        self, pid: int, sink: MemberSink, cut: Cut, options: CaptureOptions
    ) -> CaptureReport:
        """Capture the container whose pid 1 is ``pid``; see ``agent.engines.base.Engine``."""
        preflight.privileges()
        bundle = Bundle(self._bundle)
        deadline = clock.Deadline.after(options.deadline_s)
        self._places.prepare()
        recovery.recover(self._places)
        container = next((each for each in self._containers if each.pid == pid), None)
        if container is None:
            raise errors.NotFound(f"no container of this operation has pid 1 at {pid}", pid=pid)
        subject = ContainerTree(bundle, target.find(container), deadline, options.within)
        with contextlib.closing(subject):
            return dump.run(self._places, subject, sink, cut, options)

    def check_restore(self, source: MemberSource, options: RestoreOptions) -> None:
        """Look at what a container's processes find in the placeholder; see
        ``agent.engines.base.Engine``.
        """
        preflight.privileges()
        self._places.prepare()
        recovery.recover(self._places)
        known = source.facts()
        conflicts.numbers(known)
        self._refuse_conflicts(source, known, self._placeholder(known), options)

    def restore(self, source: MemberSource, options: RestoreOptions, gate: Gate) -> RestoredTree:
        """Bring a container's processes back in its placeholder; see
        ``agent.engines.base.Engine``.
        """
        preflight.privileges()
        bundle = Bundle(self._bundle)
        deadline = clock.Deadline.after(options.deadline_s)
        self._places.prepare()
        recovery.recover(self._places)
        known = source.facts()
        conflicts.numbers(known)
        container = self._placeholder(known)
        init = proc.identity(container.pid)
        with self._places.locked([init]):
            self._refuse_conflicts(source, known, container, options)
            files.inspect(source, known)
            self._places.note_filled(init, files.fingerprint(known))
            # Containers of a pod share volumes: each is filled once, and before anything opens
            # what lies in it.
            with self._filling:
                files.put_back(container, init, source, known, deadline, self._filled)
            gate.filled()
            kind = NestedPlaceholder if conflicts.whole(known) else Placeholder
            site = kind(bundle, container, init, known, deadline, options.moved, options.halves)
            return restore.run(self._places, site, [], source, known, options, gate, deadline)

    def _refuse_conflicts(
        self,
        source: MemberSource,
        known: dict[str, Any],
        container: Container,
        options: RestoreOptions,
    ) -> None:
        reasons = conflicts.find(known, feed.memory_bytes(source), container, options.moved)
        there = self._places.filled(proc.identity(container.pid))
        if there not in ("", files.fingerprint(known)):
            reasons.append(
                f"container {container.name} holds the files of another image already (delete "
                "its pod and start another placeholder)"
            )
        if reasons:
            raise errors.RestoreConflict(
                f"cannot restore into {container.name}: {'; '.join(reasons[:3])}"
                + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""),
                hint="start a pod that fits the image, with the annotation "
                "ckpt-agent.dev/restore, on a node that fits it",
                reasons=reasons,
            )

    def _placeholder(self, known: dict[str, object]) -> Container:
        about = known.get("container")
        name = about.get("name") if isinstance(about, dict) else None
        if name is None:
            raise conflicts.incomplete()
        for each in self._containers:
            if each.name == name:
                return each
        raise errors.NotFound(
            f"the pod has no container {name}, which the image is of",
            hint="restore into a pod with the same containers",
        )
