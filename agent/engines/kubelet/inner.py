"""An image of a container with its namespaces, seen as the image of the processes in it.

A kubelet's archive holds the container as its runtime knows it: its first process, and namespaces
of its own, all of which a placeholder has already. So the same images, less the namespaces, and
with the tree's own namespaces called CRIU's own, are what the ``container`` engine would have
captured, and that engine restores them. Where the first process is ``hold`` (the pod was opted
in), the placeholder has that one as well, and the job is the tree below it.

Promises: nothing stored is changed; an image without namespaces is given back as it is; one that
holds more than a placeholder can take is refused with every reason, before anything is touched.
Does not: restore; volumes, which a kubelet does not archive, stay as they are in the new pod.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from agent import errors
from agent.engines.base import Engine, Gate, RestoredTree, RestoreOptions
from agent.engines.criu import images
from agent.model.container import HOLD
from agent.model.streams import AddressSpace, FileEntry, MemberSource, PageRun

# What CRIU writes of the namespaces that it takes along.
_OF_NAMESPACES = re.compile(
    r"(mountpoints|netns|utsns|userns|pidns|ipcns-(var|shm|msg|sem)|netdev|ifaddr|route6?|rule"
    r"|iptables|ip6tables|nftables|tmpfs|tmpfs-dev|autofs|binfmt-misc)-[0-9]+(\.tar\.gz)?\.img"
)
_SYSTEM_V = re.compile(r"ipcns-(shm|msg|sem)-[0-9]+\.img")
# The head of an image that holds no record.
_HEAD_BYTES = 8
_NAMESPACES = (
    *("pid_ns_id", "net_ns_id", "ipc_ns_id", "uts_ns_id", "mnt_ns_id"),
    *("user_ns_id", "cgroup_ns_id", "time_ns_id"),
)

pb = images.messages


def of(source: MemberSource) -> MemberSource:
    """The job in ``source`` if that is a container with its namespaces, else ``source``.

    Raises:
        errors.Corrupt | errors.Missing: the image is damaged.
        errors.RestoreConflict: it holds what a placeholder cannot take.
    """
    known = source.facts()
    processes = known.get("processes")
    if known.get("root") != 1 or not isinstance(processes, list) or not processes:
        return source
    held = processes[0].get("exe") == HOLD
    # The container engine's own has none: CRIU was in them.
    if not held and not any(_OF_NAMESPACES.fullmatch(name) for name, _ in source.metadata()):
        return source
    return Inner(source, known, held=held)


class RestoresInner:
    """The engine ``engine``, for images with namespaces too."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self.promises = engine.promises
        self.capture = engine.capture
        self._engine = engine

    def check_restore(self, source: MemberSource, options: RestoreOptions) -> None:
        """As the engine's own; raises also what ``of`` does."""
        self._engine.check_restore(of(source), options)

    def restore(self, source: MemberSource, options: RestoreOptions, gate: Gate) -> RestoredTree:
        """As the engine's own; raises also what ``of`` does."""
        return self._engine.restore(of(source), options, gate)


class Inner:
    """The view; see ``model.streams.MemberSource``. ``held``: without the first process."""

    def __init__(self, source: MemberSource, known: dict[str, Any], *, held: bool) -> None:
        self._source = source
        self._root = _only_child(known) if held else 1
        self._dropped = self._of_the_first() if held else set()
        self._changed = {"inventory.img": self._inventory(), "files.img": self._files()}
        self._known = {key: value for key, value in known.items() if key != "archive_parts"}
        if held:
            self._changed["pstree.img"] = self._pstree()
            self._known |= self._facts(known)
        reasons = list(self._reasons())
        if reasons:
            raise errors.RestoreConflict(
                f"this image of a whole container cannot be restored: {'; '.join(reasons)}",
                hint="dump with the container engine",
                reasons=reasons,
            )

    def facts(self) -> dict[str, Any]:
        """Those of the job."""
        return self._known

    def metadata(self) -> Iterator[tuple[str, bytes]]:
        """CRIU's images of the job."""
        for name, content in self._source.metadata():
            if self._holds(name):
                yield name, self._changed.get(name, content)

    def metadata_file(self, name: str) -> bytes:
        """One of them."""
        if not self._holds(name):
            raise errors.Missing(f"the image has no {name!r}", part=name)
        changed = self._changed.get(name)
        return self._source.metadata_file(name) if changed is None else changed

    def files(self) -> Iterator[FileEntry]:
        """All of the image's."""
        return self._source.files()

    def file_content(self, path: str) -> Iterator[bytes]:
        """Of one of them."""
        return self._source.file_content(path)

    def spaces(self) -> list[AddressSpace]:
        """Those of the job."""
        without = AddressSpace("process", 1) if self._root != 1 else None
        return [space for space in self._source.spaces() if space != without]

    def runs(self, space: AddressSpace) -> list[PageRun]:
        """The runs of one of them."""
        return self._source.runs(space)

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        """The pages of one of them."""
        return self._source.read(space, runs)

    def check(self) -> None:
        """Read the whole image."""
        self._source.check()

    def present(self) -> None:
        """Look for all of the image."""
        self._source.present()

    def beside(self) -> MemberSource:
        """As this one; of memory nothing is changed."""
        return self._source.beside()

    def _holds(self, name: str) -> bool:
        return name not in self._dropped and not _OF_NAMESPACES.fullmatch(name)

    def _load(self, kind: str, name: str, make: Any) -> list[Any]:
        found = images.load(kind, name, self._source.metadata_file(name), make)
        if not found:
            raise _damaged(name)
        return found

    def _of_the_first(self) -> set[str]:
        """The images of the first process alone."""
        (ids, *_) = self._load("ids", "ids-1.img", pb.task_kobj_ids_entry)
        own = {f"{kind}-1.img" for kind in ("core", "ids", "mm", "fs", "sigacts")}
        return own | {f"fdinfo-{ids.files_id}.img"}

    def _pstree(self) -> bytes:
        kept = []
        for entry in self._load("pstree", "pstree.img", pb.pstree_entry):
            if entry.pid == 1:
                continue
            if entry.pid == self._root:
                entry.ppid = 0
            kept.append(entry)
        return images.dump("pstree", kept)

    def _inventory(self) -> bytes:
        """With the tree's namespaces as CRIU's own, so that it makes none."""
        inventory = images.load_inventory(self._source.metadata_file("inventory.img"))
        (ids, *_) = self._load("ids", f"ids-{self._root}.img", pb.task_kobj_ids_entry)
        for name in _NAMESPACES:
            if ids.HasField(name):
                setattr(inventory.root_ids, name, getattr(ids, name))
            else:
                inventory.root_ids.ClearField(name)
        return images.dump_inventory(inventory)

    def _files(self) -> bytes:
        """Without the mounts that files were found in: there is one view of mounts only."""
        entries = self._load("files", "files.img", pb.file_entry)
        for entry in entries:
            for kind in ("reg", "usk"):
                if entry.HasField(kind):
                    getattr(entry, kind).ClearField("mnt_id")
        return images.dump("files", entries)

    def _facts(self, known: dict[str, Any]) -> dict[str, Any]:
        processes = [dict(each) for each in known["processes"] if each["pid"] != 1]
        for each in processes:
            each["ppid"] = 0 if each["pid"] == self._root else each["ppid"]
        return {
            "root": self._root,
            "processes": processes,
            "threads": [each for each in known["threads"] if each[0] != 1],
            "sockets": [each for each in known["sockets"] if each["pid"] != 1],
            "spaces": [each for each in known["spaces"] if each != ["process", 1]],
        }

    def _reasons(self) -> Iterator[str]:
        for name, content in self._source.metadata():
            if _SYSTEM_V.fullmatch(name) and len(content) > _HEAD_BYTES:
                yield "it holds System V shared memory, queues or semaphores"
        volumes = self._known.get("skipped", [])
        lost = tuple(str(path).rstrip("/") + "/" for path, _ in volumes)
        opened = images.load("files", "files.img", self._changed["files.img"], pb.file_entry)
        for entry in opened:
            if lost and entry.HasField("reg") and entry.reg.name.startswith(lost):
                yield f"{entry.reg.name} is open and lies in a volume, which it does not hold"


def _only_child(known: dict[str, Any]) -> int:
    children = [each["pid"] for each in known["processes"] if each["ppid"] == 1]
    if len(children) != 1:
        raise errors.RestoreConflict(
            f"the image holds {len(children)} trees below hold, a placeholder takes one",
            hint="dump when no process of the container is left without a parent",
            reasons=["several trees"],
        )
    return int(children[0])


def _damaged(name: str) -> errors.Corrupt:
    return errors.Corrupt(
        f"{name} of the image is not what CRIU writes", hint="use another image", part=name
    )
