"""The ``criu`` engine: process trees on this host, without Kubernetes."""

from __future__ import annotations

from agent.engines.base import (
    CaptureOptions,
    CaptureReport,
    Cut,
    Gate,
    Promises,
    RestoredTree,
    RestoreOptions,
)
from agent.engines.criu import journal, preflight, probe, recovery, restore
from agent.model.streams import MemberSink, MemberSource


class CriuEngine:
    """Dumps and restores trees of this host's own pid and mount namespaces.

    ``criu`` is the path of CRIU, or None to find it. ``work_dir`` is for scratch files and should
    be on a real disk; ``runtime_dir`` for locks, emptied at boot.
    """

    name = "criu"
    promises = Promises(incremental=False, live_tcp=True, isolates=True, streams_memory=True)

    def __init__(
        self,
        criu: str | None = None,
        *,
        work_dir: str = journal.WORK_DIR,
        runtime_dir: str = journal.RUNTIME_DIR,
    ) -> None:
        self._criu = criu
        self._places = journal.Places(runtime_dir, work_dir)

    def recover(self) -> recovery.Findings:
        """Undo what agents that were killed left on this host; every dump and restore begins
        with it. Say what it was.
        """
        preflight.privileges()
        self._places.prepare()
        return recovery.recover(self._places)

    def capture(
        self, pid: int, sink: MemberSink, cut: Cut, options: CaptureOptions
    ) -> CaptureReport:
        """Capture the tree below ``pid``; see ``agent.engines.base.Engine``."""
        # Only here: a restore, which somebody waits for, needs none of it.
        from agent.engines.criu import dump

        # First: without them, not even CRIU might be found.
        preflight.privileges()
        return dump.capture(probe.probe(self._criu), self._places, pid, sink, cut, options)

    def check_restore(self, source: MemberSource, options: RestoreOptions) -> None:
        """Look at what a tree finds here; see ``agent.engines.base.Engine``."""
        preflight.privileges()
        restore.check(self._places, source, options)

    def restore(self, source: MemberSource, options: RestoreOptions, gate: Gate) -> RestoredTree:
        """Bring a tree back; see ``agent.engines.base.Engine``."""
        preflight.privileges()
        return restore.restore(probe.known(self._criu), self._places, source, options, gate)
