"""What a person or a later restore wants to know of a container, read from CRIU's images.

The ``criu`` engine reads the same from /proc while the tree stands still; here the tree was read
by somebody else, and its images are all there is.

Promises: JSON values only; no memory, environments or arguments; images that cannot be understood
are ``errors.Corrupt``. Pids are those of the container's own pid namespace.
Does not: say what the node is (kernel, CPU): an archive does not tell.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from google.protobuf.message import Message

from agent.engines.criu import images
from agent.engines.kubelet.tarindex import corrupt
from agent.host import sockets

# images/core.proto: TASK_ALIVE, TASK_DEAD (a zombie), TASK_STOPPED; as letters of the kernel's.
_STATES = {1: "S", 2: "Z", 3: "T"}
_FAMILIES = {2: "", 10: "6"}
_PROTOCOLS = {6: "tcp", 17: "udp", 136: "udplite"}
_UNIX_TYPES = {1: "stream", 2: "dgram", 5: "seqpacket"}
# What runc puts into CRIU's folder: where the first process's standard streams led.
DESCRIPTORS = "descriptors.json"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_M = TypeVar("_M", bound=Message)

pb = images.messages


class Source(Protocol):
    """Where images are read from."""

    def image(self, name: str) -> bytes:
        """The image file ``name``; raises ``errors.Corrupt`` if there is none."""


def of_tree(source: Source) -> dict[str, Any]:
    """The facts of the processes, as the ``criu`` engine gives them.

    Raises:
        errors.Corrupt: an image is missing or cannot be understood.
    """
    tree = _Tree(source)
    entries = tree.load("pstree", "pstree.img", pb.pstree_entry)
    if not entries:
        raise corrupt("it has no processes")
    for entry in entries:
        tree.add(entry)
    return tree.facts()


def of_container(
    spec: Mapping[str, Any],
    config: Mapping[str, Any],
    status: Mapping[str, Any],
    stdio: Sequence[str],
) -> dict[str, Any]:
    """Which container it was, from the runtime's own parts; what they do not tell is "".

    ``image_digest`` is what the runtime resolved the image to, ``image`` what the pod asked for.
    ``stdio`` are the links of the first process's standard streams.
    """
    notes = _mapping(spec.get("annotations"))
    labels = _mapping(status.get("labels"))

    def first(*keys: str) -> str:
        values = (found.get(key) for key in keys for found in (notes, labels))
        return next((value for value in values if isinstance(value, str) and value), "")

    # The id first: it names the image itself, a reference only what a registry called it.
    references = (
        *(status.get("image_id"), status.get("imageId"), status.get("image_ref")),
        *(status.get("imageRef"), config.get("rootfsImageRef")),
    )
    digests = (_DIGEST.search(each) for each in references if isinstance(each, str))
    return {
        "name": first("io.kubernetes.cri.container-name", "io.kubernetes.container.name"),
        "pod": first("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"),
        "namespace": first("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"),
        "pod_uid": first("io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"),
        "id": _string(config.get("id")),
        "runtime": _string(config.get("runtime")),
        "image": _string(config.get("rootfsImageName")),
        "image_digest": next((found[0] for found in digests if found), ""),
        "mounts": sorted(_destinations(spec)),
        "memory_limit_bytes": _memory_limit_bytes(spec),
        "stdio": list(stdio),
        "addresses": [],
    }


def streams(raw: bytes) -> list[str]:
    """The links of the standard streams, as runc notes them beside CRIU's images.

    Raises:
        errors.Corrupt: it is no list of them.
    """
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise corrupt(f"{DESCRIPTORS} is not JSON") from exc
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise corrupt(f"{DESCRIPTORS} is not a list of names")
    return found[:3]


def _destinations(spec: Mapping[str, Any]) -> set[str]:
    found = spec.get("mounts")
    mounts = found if isinstance(found, list) else []
    return {_string(_mapping(each).get("destination")) for each in mounts} - {""}


def _memory_limit_bytes(spec: Mapping[str, Any]) -> int | None:
    resources = _mapping(_mapping(spec.get("linux")).get("resources"))
    limit = _mapping(resources.get("memory")).get("limit")
    return limit if isinstance(limit, int) and 0 < limit < 1 << 62 else None


class _Tree:
    """What is known of the processes seen so far."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files = {entry.id: entry for entry in self.load("files", "files.img", pb.file_entry)}
        self._processes: list[dict[str, Any]] = []
        self._capabilities = 0
        self._sockets: list[dict[str, Any]] = []

    def load(self, kind: str, name: str, make: Callable[[], _M]) -> list[_M]:
        return images.load(kind, name, self._source.image(name), make)

    def _one(self, kind: str, name: str, make: Callable[[], _M]) -> _M:
        records = self.load(kind, name, make)
        if not records:
            raise corrupt(f"{name} is empty")
        return records[0]

    def add(self, entry: Any) -> None:
        """Look at one process of pstree.img."""
        core = self._one("core", f"core-{entry.pid}.img", pb.core_entry)
        state = _STATES.get(core.tc.task_state, "?")
        process: dict[str, Any] = {
            "pid": entry.pid,
            "comm": core.tc.comm,
            "state": state,
            "ppid": entry.ppid,
            "pgid": entry.pgid,
            "session": entry.sid,
            "threads": list(entry.threads),
            "uid": core.thread_core.creds.uid,
            "gid": core.thread_core.creds.gid,
            "cwd": "",
            "exe": "",
        }
        self._processes.append(process)
        self._capabilities |= _capabilities(core.thread_core.creds)
        if state == "Z":
            return  # it has nothing any more but its exit status
        ids = core.ids
        if not core.HasField("ids"):
            ids = self._one("ids", f"ids-{entry.pid}.img", pb.task_kobj_ids_entry)
        mm = self._one("mm", f"mm-{entry.pid}.img", pb.mm_entry)
        folders = self._one("fs", f"fs-{entry.pid}.img", pb.fs_entry)
        process["cwd"] = self._path(folders.cwd_id)
        process["exe"] = self._path(mm.exe_file_id)
        opened = self.load("fdinfo", f"fdinfo-{ids.files_id}.img", pb.fdinfo_entry)
        for each in opened:
            self._add_open(entry.pid, each)

    def _path(self, number: int) -> str:
        found = self._files.get(number)
        return str(found.reg.name) if found is not None and found.HasField("reg") else ""

    def _add_open(self, pid: int, opened: Any) -> None:
        found = self._files.get(opened.id)
        if found is None:
            raise corrupt(f"file {opened.id} of process {pid} is not in files.img")
        if found.HasField("isk") or found.HasField("usk"):
            self._sockets.append(_socket(pid, opened.fd, found))

    def facts(self) -> dict[str, Any]:
        """What was found, as JSON values."""
        return {
            "root": self._processes[0]["pid"],
            "threads": [[each["pid"], each["threads"]] for each in self._processes],
            "capabilities": self._capabilities,
            "processes": self._processes,
            "sockets": self._sockets,
            "directories": sorted({each["cwd"] for each in self._processes if each["cwd"]}),
        }


def _capabilities(creds: Any) -> int:
    """The capabilities that a process has in any of its sets but the bounding one, a bit each."""
    held = 0
    for words in (creds.cap_prm, creds.cap_eff, creds.cap_inh, creds.cap_amb):
        for number, word in enumerate(words[:2]):
            held |= word << (32 * number)
    return held


def _socket(pid: int, number: int, found: Any) -> dict[str, Any]:
    common = {"pid": pid, "fd": number}
    if found.HasField("usk"):
        name = bytes(found.usk.name)
        shown = ("@" if name[:1] == b"\0" else "") + os.fsdecode(name.strip(b"\0"))
        return common | {
            "kind": f"unix-{_UNIX_TYPES.get(found.usk.type, found.usk.type)}",
            "local": shown,
            "remote": f"inode {found.usk.peer}" if found.usk.peer else "",
            "state": _state(found.usk.state),
        }
    inet = found.isk
    protocol = _PROTOCOLS.get(inet.proto, f"protocol-{inet.proto}")
    return common | {
        "kind": protocol + _FAMILIES.get(inet.family, f"-{inet.family}"),
        "local": _address(inet.src_addr, inet.src_port),
        "remote": _address(inet.dst_addr, inet.dst_port),
        "state": _state(inet.state),
    }


def _state(number: int) -> str:
    return sockets.STATES[number] if number < len(sockets.STATES) else str(number)


def _address(words: Any, port: int) -> str:
    """From words that hold the address's bytes in network order, read as little endian."""
    packed = b"".join(int(word).to_bytes(4, "little") for word in words)
    if len(packed) not in (4, 16):
        raise corrupt("a socket has an impossible address")
    address = ipaddress.ip_address(packed)
    shown = f"[{address}]" if address.version == 6 else str(address)
    return f"{shown}:{port}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""
