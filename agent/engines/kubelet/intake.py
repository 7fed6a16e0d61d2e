"""An archive that a person brings: whose it is, and all of it into a sink.

Promises: as ``ingest``; what the archive does not tell of the node it comes from is left empty.
Does not: believe that it comes from this node.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator

from agent.engines.kubelet import archive, imagefacts, ingest, reports
from agent.model.archives import Whose
from agent.model.streams import MemberSink


class Intake:
    """An archive that was opened and found to be one."""

    def __init__(self, source: archive.Archive) -> None:
        self._source = source

    def whose(self) -> Whose:
        """What it says of itself.

        Raises:
            errors.Corrupt: its description cannot be understood.
        """
        config = self._source.json(archive.CONFIG)
        known = imagefacts.of_container(
            self._source.json(archive.SPEC), config, self._source.json(archive.STATUS), ()
        )
        name = known["name"] or str(config.get("name") or "")
        moment = config.get("checkpointedTime")
        return Whose(known["namespace"], known["pod"], name, _seconds(moment))

    def take_in(self, sink: MemberSink, check: Callable[[], None] = lambda: None) -> None:
        """Give all of it to ``sink``; ``check`` is called often and gives up by raising.

        Raises:
            errors.Corrupt: it cannot be used.
            errors.VolumeError: from the sink.
        """
        reports.statistics(self._source)
        known = {"engine": "import", "cpu_flags": [], "boot_id": "", **reports.of_log(self._source)}
        ingest.ingest(self._source, sink, known, check)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Intake]:
    """The archive at ``path``; raises as ``archive.opened``."""
    with archive.opened(path) as source:
        yield Intake(source)


def of(fd: int) -> Intake:
    """The archive on an open descriptor, which stays the caller's; raises ``errors.Corrupt`` if it
    is none.
    """
    return Intake(archive.Archive(fd))


def _seconds(moment: object) -> float:
    try:
        return datetime.datetime.fromisoformat(str(moment)).timestamp()
    except (ValueError, OverflowError):
        return 0.0
