"""The established TCP connections of a pod's containers, as their own ends see them.

Promises: reads /proc, nothing else; no process is stopped.
Does not: know whom they lead to.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Sequence

from agent import errors
from agent.host import proc, sockets
from agent.model.container import Container


def of(containers: Sequence[Container]) -> list[tuple[str, str]]:
    """Both ends of each, ADDRESS:PORT, the pod's own first; IPv4 as IPv4."""
    found: set[tuple[str, str]] = set()
    for container in containers:
        known = sockets.table(container.pid)
        for pid in proc.tree(container.pid):
            with contextlib.suppress(errors.NotFound):  # it has ended
                for file in proc.open_files(pid):
                    one = known.get(file.inode) if stat.S_ISSOCK(file.mode) else None
                    if one is not None and one.connection is not None:
                        found.add(one.connection)
    return sorted(found)
