"""The ``kubelet`` engine: the kubelet checkpoints containers, and its archive is taken in.

It needs nothing but the right to ask: no namespaces are entered and no process is touched. In
return the container stands still until its runtime has written and packed everything, nothing is
incremental but what is stored, and there is no moment at which anything else could happen: no
ending of the processes, no volumes. With other containers there is a common cut only where the
network between them is held meanwhile (``holdfirst``).

Promises: the archive's name is gone from the kubelet's directory before its content is read, and
its content when the capture ends, whatever becomes of this program.
Does not: restore; images have the layout of the ``container`` engine, which does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
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
from agent.engines.criu import log as criu_log
from agent.engines.criu import preflight
from agent.engines.criu.facts import cpu_flags
from agent.engines.kubelet import client, holdfirst, ingest, leftovers, pause, reports, resume
from agent.engines.kubelet.archive import Archive
from agent.engines.kubelet.tarindex import corrupt
from agent.host import addresses, clock, layouts, proc, system
from agent.model.container import Container
from agent.model.cut import End
from agent.model.streams import MemberSink, MemberSource

# containerd names the bundle's criu-dump.log, CRI-O the dump.log of its user data.
_LOG_PATH = re.compile(r"(/[^\s\"']+/(?:criu-)?dump\.log)")


class KubeletEngine:
    """For one dump of containers of one pod of this node. ``directory`` is where this program sees
    the kubelet's directory of checkpoints.
    """

    name = "kubelet"
    promises = Promises(
        incremental=False,
        live_tcp=True,
        isolates=False,
        streams_memory=False,
        cuts=False,
        holds_first=True,
    )

    def __init__(
        self,
        kubelet: client.Kubelet,
        namespace: str,
        pod: str,
        containers: Sequence[Container],
        *,
        directory: str = leftovers.DIRECTORY,
    ) -> None:
        self._kubelet = kubelet
        self._namespace = namespace
        self._pod = pod
        self._containers = {each.pid: each for each in containers}
        self._directory = directory
        self._alone = len(self._containers) == 1

    def capture(
        self, pid: int, sink: MemberSink, cut: Cut, options: CaptureOptions
    ) -> CaptureReport:
        """Capture the container whose pid 1 is ``pid``; see ``agent.engines.base.Engine``. The
        cut is asked with ``hold_first`` only.

        Raises also:
            errors.Corrupt: what the runtime archived cannot be used.
            errors.ConnectionUnaccepted | errors.CutTorn: with ``hold_first``, a connection with
                another member began or ended.
        """
        container = self._containers.get(pid)
        if container is None:
            raise errors.NotFound(f"process {pid} is no container's first", pid=pid)
        _check_options(options)
        _check_clock(container)
        _check_processes(container)
        if options.hold_first:
            holdfirst.check(container, options, alone=self._alone)
        deadline = clock.Deadline.after(options.deadline_s)
        target = client.Target(self._namespace, self._pod, container.name)
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(leftovers.opened(self._directory))
            checkpoints.clean()
            with self._apart(checkpoints, target, container, cut, options) as part:
                began_s = clock.monotonic_s()
                until = part.deadline(deadline) if part else deadline
                allowed_s = until.remaining_s
                with checkpoints.call(target, allowed_s) as call, pause.watched(pid) as watch:
                    items = _checkpoint(self._kubelet, target, container, until, part)
                    fd = checkpoints.take(call, items[0])
                    stack.callback(os.close, fd)
                called_s = clock.monotonic_s() - began_s
                if part:
                    part.captured()
            taken, statistics = _take_in(Archive(fd), sink, container, target, deadline)
            ingested_s = clock.monotonic_s() - began_s - called_s
            if part:
                part.check_ends(End(**each) for each in taken.facts["tcp_ends"])
        frozen_s = statistics.get("frozen_time", 0) / 1e6
        return CaptureReport(
            # Without a sight of the freezer the call is what it cannot be longer than.
            stop_s=called_s if watch.stop_s is None else watch.stop_s,
            freeze_s=statistics.get("freezing_time", 0) / 1e6,
            raw_bytes=taken.memory_bytes + taken.metadata_bytes,
            pids=taken.pids,
            engine_facts={
                "memory_bytes": taken.memory_bytes,
                "metadata_bytes": taken.metadata_bytes,
                "call_s": called_s,
                "ingest_s": ingested_s,
                "criu_frozen_s": frozen_s,
                "stop_seen": watch.stop_s is not None,
                "skipped": taken.facts["skipped"] + _devices(taken.facts),
            },
        )

    @contextlib.contextmanager
    def _apart(
        self,
        checkpoints: leftovers.Checkpoints,
        target: client.Target,
        container: Container,
        cut: Cut,
        options: CaptureOptions,
    ) -> Iterator[holdfirst.Part | None]:
        if not options.hold_first:
            yield None
            return
        holdfirst.poise(cut)
        who = proc.identity(container.pid)
        with (
            checkpoints.hold(target, who) as table,
            holdfirst.apart(container, who, table, cut, options, alone=self._alone) as part,
        ):
            yield part

    def check_restore(self, source: MemberSource, options: RestoreOptions) -> None:
        """Refuse: a kubelet restores nothing."""
        del source, options
        raise _only_dumps()

    def restore(self, source: MemberSource, options: RestoreOptions, gate: Gate) -> RestoredTree:
        """Refuse likewise."""
        del source, options, gate
        raise _only_dumps()


def _only_dumps() -> errors.TargetUnsuitable:
    return errors.TargetUnsuitable(
        "the kubelet engine only dumps", hint="restore the image with the container engine"
    )


def recover(directory: str = leftovers.DIRECTORY) -> list[str]:
    """Remove the archives that calls of dead agents left; return their names.

    Raises:
        errors.EnvironmentUnfit: the kubelet's directory cannot be used.
    """
    with leftovers.opened(directory) as checkpoints:
        return checkpoints.clean()


def node_facts() -> dict[str, Any]:
    """What of this node a restore wants to compare."""
    return {
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "cpu_flags": sorted(cpu_flags()),
        "boot_id": system.boot_id(),
    }


def _devices(known: dict[str, Any]) -> list[list[str]]:
    rootfs = known["rootfs"] or {"skipped": []}
    return [[f"/{path}", "a device"] for path in rootfs["skipped"]]


def _checkpoint(
    kubelet: client.Kubelet,
    target: client.Target,
    container: Container,
    deadline: clock.Deadline,
    part: holdfirst.Part | None,
) -> list[str]:
    """Ask the kubelet; where that fails, the container runs, and hears what it is told."""
    with resume.guarded(container):
        try:
            return _asked(kubelet, target, container, deadline, part.check if part else None)
        except BaseException as exc:
            if part:
                # Before its runtime has let go of it, which can take long.
                part.failed(exc)
            raise


def _asked(
    kubelet: client.Kubelet,
    target: client.Target,
    container: Container,
    deadline: clock.Deadline,
    check: Callable[[], None] | None,
) -> list[str]:
    """Ask the kubelet; where CRIU failed, say what its log on this node says."""
    try:
        return client.checkpoint(kubelet, target, deadline, check)
    except errors.CriuFailed as exc:
        named = _LOG_PATH.search(exc.message)
        # The runtime names a file of this container's own directory, or none that is read.
        if named is None or not container.id or container.id not in named[1].split("/"):
            raise
        found = criu_log.read(named[1])
        if not found.cause:
            raise
        raise criu_log.failure(f"checkpoint {target}", found, kubelet=exc.message) from exc


def _check_options(options: CaptureOptions) -> None:
    if options.kill:
        raise errors.InvalidInput(
            "the kubelet engine cannot end the processes at the moment of the dump: they run on",
            hint="use the container engine, or dump without stopping",
        )
    if options.include:
        raise errors.InvalidInput(
            "the kubelet's archive holds no files besides the container's own root file system",
            hint="use the container engine",
        )


def _check_clock(container: Container) -> None:
    own = proc.namespaces(container.pid)["time"]
    for pid in proc.tree(container.pid):
        with contextlib.suppress(errors.NotFound):
            if proc.namespaces(pid)["time"] != own:
                # CRIU, asked for a whole container, takes no time namespace but the first one's.
                raise errors.TargetUnsuitable(
                    f"container {container.name} was restored, and its monotonic clock goes on as "
                    "before by a time namespace below its first process: a kubelet cannot "
                    "checkpoint that",
                    hint="use the container engine",
                    pid=pid,
                )


def _check_processes(container: Container) -> None:
    """Refuse a container with a process that somebody stopped (SIGSTOP): runc 1.3 then never ends
    its checkpoint, and the container is held all the while. One that uses a GPU, RDMA still, or a
    userfaultfd, whose memory somebody else fills, or whose threads do not share its descriptors
    would be held in vain.
    """
    for pid in proc.tree(container.pid):
        with contextlib.suppress(errors.NotFound):
            preflight.refuse_gpus(pid)
            preflight.refuse_rdma(pid)
            preflight.refuse_userfaultfds(pid)
            preflight.refuse_apart(pid)
            preflight.refuse_filled(pid, layouts.flags(pid))
            if proc.stat(pid).state == "T":
                raise errors.TargetUnsuitable(
                    f"process {pid} ({proc.stat(pid).comm}) is stopped, which a kubelet's"
                    " checkpoint would wait for without end",
                    hint="let it go on (kill -CONT), or use the container engine",
                    pid=pid,
                )


def _take_in(
    source: Archive,
    sink: MemberSink,
    container: Container,
    target: client.Target,
    deadline: clock.Deadline,
) -> tuple[ingest.Taken, dict[str, int]]:
    statistics = reports.statistics(source)
    known: dict[str, Any] = {**reports.of_log(source), **node_facts(), "engine": "kubelet"}
    checked = _OneContainer(sink, target, container)
    taken = ingest.ingest(source, checked, known, lambda: deadline.check("the capture"))
    return dataclasses.replace(taken, facts=checked.known), statistics


class _OneContainer:
    """The sink, told of one container and no other."""

    def __init__(self, sink: MemberSink, target: client.Target, container: Container) -> None:
        self._target = target
        self._container = container
        self._sink = sink
        self.known: dict[str, Any] = {}
        self.pages = sink.pages
        self.draft = sink.draft
        self.recall = sink.recall
        self.settle = sink.settle
        self.metadata = sink.metadata
        self.file = sink.file

    def facts(self, facts: dict[str, Any]) -> None:
        """Pass the facts on if they are of this container."""
        found = facts["container"]
        named = (found["namespace"], found["pod"], found["name"])
        wanted = (self._target.namespace, self._target.pod, self._target.container)
        if any(name and name != want for name, want in zip(named, wanted, strict=True)):
            raise corrupt(f"it is of the container {'/'.join(named)}, not of {self._target}")
        digest = self._container.image_digest or found["image_digest"]
        lost = [
            [path, "a volume, which a kubelet does not archive"] for path in self._container.volumes
        ]
        self.known = {
            **facts,
            "container": {
                **found,
                "name": self._container.name,
                "image_digest": digest,
                # The archive has them only as a dump of the network's configuration.
                "addresses": addresses.of(self._container.pid),
            },
            "skipped": lost,
        }
        self._sink.facts(self.known)
