"""Where a container's own files are: the difference of its root file system, and its volumes.

Promises: what is opened is what the runtime mounted, not what the workload put in its place.
Does not: read or write files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence

from agent import errors
from agent.host import confine, mounts, proc
from agent.model.container import Container

# Below these the runtime and the kernel mount things of their own (masked paths, controllers).
_KERNELS = ("/proc", "/sys", "/dev")


@dataclasses.dataclass(frozen=True)
class Mounted:
    """A container's mounts at one moment. ``upper`` is the directory that holds what it changed in
    its root file system ("": nothing), ``volumes`` the mounts whose content travels, by
    destination, and ``points`` where anything is mounted, relative to its root.
    """

    upper: str
    volumes: Mapping[str, mounts.Mount]
    points: frozenset[str]


def look(container: Container) -> Mounted:
    """What is mounted in the container now: some milliseconds on a busy node.

    Raises:
        errors.TargetUnsuitable: the directory cannot be read, a volume is missing, or the workload
            mounted something by itself.
        errors.NotFound: it has ended.
    """
    table = mounts.of(container.pid)
    points = frozenset(mount.point.strip("/") for mount in table if mount.point != "/")
    return Mounted(_upper(container, table), _volumes(container, table), points)


def _upper(container: Container, table: Sequence[mounts.Mount]) -> str:
    root = _root(container, table)
    found = root.option("upperdir")
    if root.read_only and not found:
        return ""
    if root.kind != "overlay" or not found:
        raise errors.TargetUnsuitable(
            f"the root file system of container {container.name} is {root.kind}, not an overlay",
            hint="let the runtime use its overlayfs snapshotter",
        )
    if not os.path.isdir(found):
        raise errors.TargetUnsuitable(
            f"the agent does not see {found}, where container {container.name} keeps its files",
            hint="mount the runtime's directory (/var/lib/containerd) into the agent",
            path=found,
        )
    return found


def _volumes(container: Container, table: Sequence[mounts.Mount]) -> dict[str, mounts.Mount]:
    # The last one at a point covers the others.
    by_point = {mount.point: mount for mount in table}
    named = _named(container)
    known = set(named.values())
    for point in by_point:
        if point == "/" or point in known or point.startswith(tuple(f"{k}/" for k in _KERNELS)):
            continue
        raise errors.TargetUnsuitable(
            f"container {container.name} has mounted something at {point} by itself",
            hint="unmount it, or give the pod a volume there",
            path=point,
        )
    proc_mount = by_point.get("/proc")
    if proc_mount is None or proc_mount.kind != "proc" or proc_mount.root != "/":
        # CRIU finds its own program and its images by it.
        raise errors.TargetUnsuitable(
            f"container {container.name} has no /proc of its own",
            hint="let the runtime mount one, as it does by default",
            path="/proc",
        )
    missing = [path for path in container.volumes if named[path] not in by_point]
    if missing:
        raise errors.TargetUnsuitable(
            f"container {container.name} has unmounted its volume {missing[0]}",
            hint="start the pod anew",
            path=missing[0],
        )
    return {path: by_point[named[path]] for path in container.volumes}


def _named(container: Container) -> dict[str, str]:
    """The mount point that each destination of the runtime's stands for: links of the image on
    the way to it, such as ``/var/run`` to ``/run``, were followed when it was mounted.
    """
    found = {}
    with confine.root_of(proc.identity(container.pid)) as root:
        for mount in container.mounts:
            point = posixpath.normpath(mount.destination)
            try:
                fd = confine.open_inside(root, mount.destination, os.O_PATH)
            except OSError:
                found[mount.destination] = point  # hidden by another mount, or gone
                continue
            try:
                # From another mount namespace's root on, as its own table of mounts tells it.
                found[mount.destination] = os.readlink(f"/proc/self/fd/{fd}")
            finally:
                os.close(fd)
    return found


def _root(container: Container, table: Sequence[mounts.Mount]) -> mounts.Mount:
    roots = [mount for mount in table if mount.point == "/"]
    if not roots:
        raise errors.NotFound(f"container {container.name} has ended", pid=container.pid)
    return roots[-1]


@contextlib.contextmanager
def opened_volume(
    container: Container, init: proc.Identity, path: str, mount: mounts.Mount
) -> Iterator[int]:
    """A descriptor of the volume at ``path`` in the container, which is ``mount``.

    Raises:
        errors.TargetUnsuitable: something else is there.
        errors.NotFound: the container has ended.
    """
    with confine.root_of(init) as root:
        try:
            fd = confine.open_inside(root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as exc:
            raise _elsewhere(container, path) from exc
    try:
        if _mount_id(fd) != mount.id:
            raise _elsewhere(container, path)
        yield fd
    finally:
        os.close(fd)


def _elsewhere(container: Container, path: str) -> errors.TargetUnsuitable:
    return errors.TargetUnsuitable(
        f"the volume {path} of container {container.name} cannot be reached by that name",
        hint="the workload has moved a directory above it; move it back",
        path=path,
    )


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key == "mnt_id":
                return int(value)
    return -1
