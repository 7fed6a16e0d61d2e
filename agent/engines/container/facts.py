"""What a later restore wants to know of a container's tree: as of a tree of the host, but by the
numbers inside, and with what surrounded it.

Promises: JSON values only; no memory, environments or arguments.
Does not: decide what is needed at restore; ``conflicts`` does, from these facts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from agent import errors
from agent.engines.container import inside
from agent.engines.container.target import Target
from agent.engines.criu import facts, images
from agent.engines.criu.probe import Criu
from agent.host import addresses, cgroups, proc
from agent.model.container import LAYOUT


def gather(
    target: Target,
    pids: Iterable[int],
    states: Mapping[int, str],
    criu: Criu,
    maps: facts.Maps,
) -> dict[str, Any]:
    """The facts of the tree ``pids``, which stands still; ``maps`` tells mappings."""
    pids = list(pids)
    known = facts.gather(pids, states, criu, maps)
    numbers = {0: 0}
    for pid in pids:
        with contextlib.suppress(errors.NotFound):
            numbers[pid] = inside.number(pid)
    for process in known["processes"]:
        for key in ("pid", "ppid", "pgid", "session"):
            # What lies outside of the tree has no number in the image.
            process[key] = numbers.get(process[key], 0)
    for each in known["sockets"]:
        each["pid"] = numbers.get(each["pid"], 0)
    container = target.container
    capabilities = 0
    for pid in pids:
        with contextlib.suppress(errors.NotFound):
            capabilities |= proc.status(pid).caps_held
    return {
        **{key: known[key] for key in _KEPT},
        "layout": LAYOUT,
        "root": inside.number(target.tree[0].pid),
        "container": {
            "name": container.name,
            "image_digest": container.image_digest,
            "mounts": sorted(mount.destination for mount in container.mounts),
            "memory_limit_bytes": cgroups.memory_limit_bytes(target.groups),
            "stdio": [_link(target.init.pid, number) for number in range(3)],
            "addresses": addresses.of(target.init.pid),
            "capabilities": capabilities,
        },
    }


# ``files`` are left out: those of the image are the same by its digest, the others travel or are
# checked by CRIU.
_KEPT = ("criu", "kernel", "machine", "cpu_flags", "boot_id", "processes", "sockets", "directories")


def threads(folder: str) -> dict[int, list[int]]:
    """The threads of each process by the numbers inside, from CRIU's images in ``folder``."""
    entries = images.read(folder, "pstree", "pstree.img", images.messages.pstree_entry)
    return {int(entry.pid): [int(tid) for tid in entry.threads] for entry in entries}


def _link(pid: int, number: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")
    except FileNotFoundError:
        return ""
