"""What a node has that an operation could leave behind, to compare before with after.

Promises: names of pods, containers and processes are left out of the comparison, so that a pod that
was started anew is no difference; what comes and goes by itself is given time to go.
Does not: look into pods that still run; ``unharmed`` in test_faults does.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.cluster import Cluster, Node
from tests.cluster.machine import ClusterError, poll

SETTLE_S = 90
# Identifiers: of containers and sandboxes, of pods, of namespaces, of snapshots, of a pod's files,
# of its token.
_NAMES = re.compile(
    r"[0-9a-f]{64}|[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|cni-[0-9a-f-]+"
    r"|kube-api-access-[0-9a-z]{5}"
)
_KEPT = (
    *("run/ckpt-agent/ops", "run/ckpt-agent/locks", "run/ckpt-agent/pods"),
    *("run/ckpt-agent/tables", "run/ckpt-agent/strays", "var/lib/ckpt-agent/work"),
)
_ARCHIVES = "var/lib/kubelet/checkpoints"
# A call that nobody waits for may leave an archive later: its note stays for an hour.
_NOTE = ".ckpt-agent-call-"
# Helpers that the kubelet and the runtime start all the time; what runs for long is none of them.
_PASSING = {"runc", "nsenter", "nft", "iptables", "modprobe", "sh", "sleep"}


def of(node: Node) -> Counter[str]:
    """Processes, mounts, control groups, packet filters, archives and notes."""
    found: Counter[str] = Counter()
    found.update(f"process {name}" for name in _processes(node))
    found.update(f"mount {place}" for place in _mounts(node))
    found.update(f"group {group}" for group in _groups(node))
    tables = node.exec("nft", "list", "tables").stdout.splitlines()
    found.update(line for line in tables)
    for place in _KEPT:
        with contextlib.suppress(FileNotFoundError):
            found.update(f"file {place}/{name}" for name in os.listdir(node.root / place))
    with contextlib.suppress(FileNotFoundError):
        archives = os.listdir(node.root / _ARCHIVES)
        found.update(f"archive {name}" for name in archives if not name.startswith(_NOTE))
    return found


def of_all(cluster: Cluster) -> dict[str, Counter[str]]:
    """``of`` both nodes."""
    return {name: of(node) for name, node in cluster.nodes.items()}


def assert_none(cluster: Cluster, before: dict[str, Counter[str]]) -> None:
    """Return when neither node has more than ``before``."""
    more: dict[str, list[str]] = {}

    def clean() -> bool:
        now = of_all(cluster)
        more.clear()
        more.update({name: sorted(now[name] - before[name]) for name in now})
        return not any(more.values())

    try:
        poll(clean, "clean nodes", SETTLE_S, 0.5)
    except ClusterError as error:
        raise AssertionError(f"left on the nodes: {more}") from error


def crius(node: Node) -> list[int]:
    """The CRIU processes at work on the node, whoever started them, as this machine numbers
    them.
    """
    group = f"/{node.control_group}"
    found = []
    for entry in _entries():
        with contextlib.suppress(OSError):
            # It may run below a loader of its own.
            at_work = _name(entry).startswith(("criu", "ld-linux", "ld.so"))
            if at_work and (_own(entry, node) or group in (entry / "cgroup").read_text()):
                found.append(int(entry.name))
    return found


def _processes(node: Node) -> Iterator[str]:
    """Those in the node's own pid namespace, and every CRIU in a container of it: containers'
    other processes are gone with their control groups.
    """
    yield from ("criu" for _ in crius(node))
    for entry in _entries():
        with contextlib.suppress(OSError):
            if _own(entry, node) and _name(entry) not in _PASSING:
                yield _name(entry)


def _entries() -> Iterator[Path]:
    return Path("/proc").glob("[0-9]*")


def _name(entry: Path) -> str:
    return (entry / "comm").read_text().strip()


def _own(entry: Path, node: Node) -> bool:
    return (entry / "ns/pid").readlink() == Path(f"/proc/{node.pid}/ns/pid").readlink()


def _mounts(node: Node) -> Iterator[str]:
    for line in Path(f"/proc/{node.pid}/mountinfo").read_text().splitlines():
        yield _NAMES.sub("*", line.split()[4])


def _groups(node: Node) -> Iterator[str]:
    top = Path("/sys/fs/cgroup")
    for hierarchy in (top, *top.iterdir()):
        for directory, _, _ in os.walk(hierarchy / node.control_group):
            yield _NAMES.sub("*", directory)
