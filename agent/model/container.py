"""A container as its runtime describes it: what an engine must be told, since /proc does not say.

Promises: values only; what can be read from /proc by ``pid`` (namespaces, cgroups, standard
streams, limits) is not repeated here.
Does not: know a runtime, Kubernetes or CRIU.
"""

from __future__ import annotations

import dataclasses

# Where the volume of the opted-in container lies; its content (the pid 1, the stamps) belongs to
# the pod, not to the job.
AGENT_DIRECTORY = "/.ckpt-agent"
HOLD = f"{AGENT_DIRECTORY}/hold"
# What hold shows as its arguments while a workload runs below it; a number follows.
HOLD_FOLLOWS = b"hold: following "

# The layout of an image's facts and files, whichever engine made it; besides CRIU's own images:
LAYOUT = "container-1"
# an ephemeral file of the image (``MemberSink.file``): a tar of what the container changed in its
# root file system, whiteouts as character devices 0:0, opaque directories by their extended
# attribute ``trusted.overlay.opaque``.
ROOTFS_DIFF = "/rootfs-diff.tar"
# the program that was the container's pid 1, and is the root of the tree;
HOLD_FILE = "/hold"


def volume_tar(number: int) -> str:
    """Likewise a tar of the volume ``facts["volumes"][number]``, a mount's destination."""
    return f"/volume-{number}.tar"


# The kubelet's directory for volumes of this kind, as a part of a mount's source.
_EMPTY_DIR = "/volumes/kubernetes.io~empty-dir/"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the container's mount, not a scratch file of ours


@dataclasses.dataclass(frozen=True)
class Mount:
    """One entry of ``mounts`` of the runtime's OCI configuration, as it is there. ``source`` is a
    path on the node for a bind mount; ``type`` may be empty for one.
    """

    destination: str
    source: str = ""
    type: str = ""
    options: tuple[str, ...] = ()

    @property
    def read_only(self) -> bool:
        """Whether nothing of the container can write through it."""
        return "ro" in self.options

    @property
    def travels(self) -> bool:
        """Whether its content lives and dies with the pod, and so belongs into an image: an
        emptyDir, or the shared memory of the container.
        """
        if self.destination == AGENT_DIRECTORY:
            return False
        return self.destination == _SHARED_MEMORY or _EMPTY_DIR in self.source


@dataclasses.dataclass(frozen=True)
class Container:
    """A running container of this node.

    ``name`` is the container's name in its pod, which is also its member's name in an image.
    ``pid`` is the container's pid 1 as the caller's /proc numbers it. ``rootfs`` is the root file
    system where the caller sees it, without the container's own mounts in it (containerd:
    ``/run/containerd/io.containerd.runtime.v2.task/k8s.io/ID/rootfs``). ``image_digest`` is what
    the runtime resolved the image to (``sha256:...``), or "" if it does not say. ``terminal`` and
    ``args`` are ``process.terminal`` and ``process.args`` of the OCI configuration. ``hooks`` are
    the names of what its pod does before it is stopped.
    """

    id: str
    name: str
    pid: int
    rootfs: str
    mounts: tuple[Mount, ...] = ()
    image_digest: str = ""
    terminal: bool = False
    args: tuple[str, ...] = ()
    hooks: frozenset[str] = frozenset()

    @property
    def volumes(self) -> tuple[str, ...]:
        """The destinations of the mounts whose content travels, in order."""
        return tuple(sorted({mount.destination for mount in self.mounts if mount.travels}))
