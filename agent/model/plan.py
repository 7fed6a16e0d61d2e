"""What a dump of a process tree would take and what stands in its way, decided from facts.

Promises: pure; each finding names its subject, the reason and a way out; the estimate names the
rates it assumes.
Does not: read anything. A plan without blockers is no guarantee: the tree may change, and CRIU
knows objects that /proc does not show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from agent.model import gpus


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """An open file of a process. ``device`` is (major, minor) of a character or block device.
    ``socket`` is the inode of a socket, else 0, and ``protocol`` the kernel's name for what it
    speaks, "" if unknown; ``unlinked``: no name leads to it any more.
    """

    number: int
    link: str
    writable: bool = False
    regular: bool = False
    device: tuple[int, int] | None = None
    socket: int = 0
    protocol: str = ""
    size_bytes: int = 0
    unlinked: bool = False


@dataclasses.dataclass(frozen=True)
class Process:
    """A process as /proc shows it; sizes in bytes. ``mappings`` are the paths it maps."""

    pid: int
    parent: int
    program: str
    state: str
    threads: int
    session: int
    anonymous_bytes: int
    shared_bytes: int
    file_bytes: int
    swapped_bytes: int
    kernel_thread: bool = False
    tracer: int = 0
    namespaces: Mapping[str, int] = dataclasses.field(default_factory=dict)
    descriptors: tuple[Descriptor, ...] = ()
    mappings: tuple[str, ...] = ()
    # Threads that do not share its descriptors, or its working directory, root and umask.
    threads_apart: tuple[int, ...] = ()
    threads_elsewhere: tuple[int, ...] = ()

    @property
    def captured_bytes(self) -> int:
        """Memory that goes into an image: what no file holds."""
        return self.anonymous_bytes + self.shared_bytes + self.swapped_bytes


@dataclasses.dataclass(frozen=True)
class Connection:
    """A socket that a process of the tree holds. ``peer_inode`` is 0 for none, None if unknown."""

    inode: int
    kind: str
    state: str
    local: str
    peer: str
    peer_inode: int | None


@dataclasses.dataclass(frozen=True)
class Observer:
    """Who would dump: its own pid, its ancestors, namespaces and capabilities."""

    pid: int
    ancestors: tuple[int, ...]
    namespaces: Mapping[str, int]
    capabilities: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the estimate assumes, measured on a machine with 2 cores and warm memory."""

    capture_bytes_per_s: float = 0.35e9
    """Memory of a first dump, all of it new: compressing it holds the tree up. What later dumps
    find unchanged passes about three times as fast."""

    fixed_s: float = 0.04
    """Start CRIU, seize, freeze and thaw."""

    process_s: float = 0.005
    """Collect and write one process's state."""

    held_bytes_per_s: float = 1e9
    """Read what was written last into memory, to be stored when the tree runs again."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What a running tree wrote: ``look_bytes`` within the time that a capture lets pages rest
    before it copies them ahead, ``span_bytes`` in ``span_s`` after that, of ``followed_bytes``.
    ``apart_bytes`` of its memory could not be followed, for these ``reasons``.
    """

    followed_bytes: int
    apart_bytes: int
    look_bytes: int
    span_bytes: int
    span_s: float
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something in the way of a dump, or worth knowing before it."""

    code: str
    subject: str
    reason: str
    cure: str


@dataclasses.dataclass(frozen=True)
class File:
    """An open or mapped object; ``travels``: its content goes into the image."""

    kind: str
    path: str
    size_bytes: int
    travels: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole answer; ``stop_s`` is the expected stop time: of a plain dump, or if it is known
    what was ``written``, of one that copies memory ahead.
    """

    roots: tuple[int, ...]
    processes: tuple[Process, ...]
    files: tuple[File, ...]
    sockets: tuple[Connection, ...]
    raw_bytes: int
    stop_s: float
    rates: Rates
    blockers: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    written: Written | None = None

    @property
    def anonymous_bytes(self) -> int:
        """Private memory of all processes; pages shared since a fork count for each."""
        return sum(process.anonymous_bytes for process in self.processes)

    @property
    def shared_bytes(self) -> int:
        """Shared memory, counted for each process that maps it."""
        return sum(process.shared_bytes for process in self.processes)

    @property
    def swapped_bytes(self) -> int:
        """Private memory that is swapped out; a capture reads it back."""
        return sum(process.swapped_bytes for process in self.processes)

    @property
    def file_bytes(self) -> int:
        """Memory whose content is in files; not captured."""
        return sum(process.file_bytes for process in self.processes)


def measured(found: Plan, written: Written) -> Plan:
    """``found`` with what the tree was seen to write."""
    rates = found.rates
    # What is small, shared or in files goes through CRIU while the tree stands still.
    plain_bytes = max(0, found.raw_bytes - written.followed_bytes - written.apart_bytes)
    read_bytes = written.look_bytes + written.apart_bytes
    stop_s = (
        rates.fixed_s
        + rates.process_s * len(found.processes)
        + plain_bytes / rates.capture_bytes_per_s
        + read_bytes / rates.held_bytes_per_s
    )
    return dataclasses.replace(found, stop_s=min(stop_s, found.stop_s), written=written)


# Majors of Documentation/admin-guide/devices.txt that CRIU opens again by name: memory devices
# (null, zero, random), terminals and pseudo-terminals.
_PLAIN_MAJORS = frozenset((1, 4, 5, *range(128, 144)))
# Anonymous inodes and protocols that CRIU 4.2 can capture outside of a network namespace; each was
# tried, and others were seen to fail.
_KNOWN_ANONYMOUS = frozenset(
    ("eventfd", "eventpoll", "signalfd", "timerfd", "inotify", "fanotify", "pidfd")
)
_KNOWN_PROTOCOLS = frozenset(
    (
        *("TCP", "TCPv6", "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6"),
        *("UNIX", "UNIX-STREAM", "NETLINK", "PACKET"),
    )
)
_ANONYMOUS = re.compile(r"anon_inode:\[?([A-Za-z0-9_:-]+)\]?")
# Without these nothing can be captured; CAP_CHECKPOINT_RESTORE alone is CRIU's experimental mode.
_NEEDED = ("CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_NET_ADMIN")
_MAPPED_DEVICE = re.compile(r"/dev/(?!shm/|zero$|mqueue/|hugepages/)")


def decide(
    roots: Sequence[int],
    processes: Sequence[Process],
    sockets: Sequence[Connection],
    observer: Observer,
    *,
    ghost_limit_bytes: int,
    rates: Rates | None = None,
) -> Plan:
    """Put the answer together from what was read; ``processes`` are all of the roots' trees."""
    rates = rates or Rates()
    files = tuple(_files(processes))
    raw_bytes = sum(process.captured_bytes for process in processes)
    travelling_bytes = sum(file.size_bytes for file in files if file.travels)
    blockers = [
        *_of_observer(processes, observer),
        *(finding for process in processes for finding in _of_process(process, roots, observer)),
        *(
            finding
            for process in processes
            for descriptor in process.descriptors
            for finding in _of_descriptor(process, descriptor, ghost_limit_bytes)
        ),
        *_of_unix_sockets(sockets),
    ]
    return Plan(
        roots=tuple(roots),
        processes=tuple(processes),
        files=files,
        sockets=tuple(sockets),
        raw_bytes=raw_bytes + travelling_bytes,
        stop_s=rates.fixed_s
        + rates.process_s * len(processes)
        + (raw_bytes + travelling_bytes) / rates.capture_bytes_per_s,
        rates=rates,
        blockers=tuple(dict.fromkeys(blockers)),
        warnings=tuple(dict.fromkeys(_warnings(processes, sockets))),
    )


def _label(process: Process) -> str:
    return f"process {process.pid} ({process.program})"


def _files(processes: Iterable[Process]) -> Iterator[File]:
    seen = set()
    for process in processes:
        for one in process.descriptors:
            if one.socket or (one.link, one.unlinked) in seen or not one.regular:
                continue
            seen.add((one.link, one.unlinked))
            if one.unlinked:
                yield File("unlinked", one.link, one.size_bytes, travels=True)
            elif one.writable:
                yield File("open for writing", one.link, one.size_bytes, travels=True)
            else:
                yield File("open for reading", one.link, one.size_bytes, travels=False)


def _of_observer(processes: Sequence[Process], observer: Observer) -> Iterator[Finding]:
    for name in _NEEDED:
        if name not in observer.capabilities:
            yield Finding(
                "privilege-missing",
                name,
                "this program lacks the capability, without which processes cannot be captured",
                f"run as root, or in a container with {name} added",
            )
    for process in processes:
        if process.pid == observer.pid or process.pid in observer.ancestors:
            yield Finding(
                "own-ancestor",
                _label(process),
                "this program runs below it and would stop itself",
                "run the dump from another session: a terminal of its own, or a service",
            )


def _of_threads(process: Process, label: str) -> Iterator[Finding]:
    for threads, own, flag in (
        (process.threads_apart, "descriptors", "CLONE_FILES"),
        (process.threads_elsewhere, "a working directory and umask", "CLONE_FS"),
    ):
        if threads:
            yield Finding(
                "threads-apart",
                label,
                f"thread {', '.join(map(str, threads[:3]))} has {own} of its own, which CRIU does"
                " not capture",
                f"let it share those of its process (no unshare({flag}) in a thread)",
            )


def _of_process(process: Process, roots: Sequence[int], observer: Observer) -> Iterator[Finding]:
    label = _label(process)
    if process.kernel_thread:
        yield Finding(
            "kernel-thread", label, "it is part of the kernel", "name a process of a program"
        )
        return
    if process.state in "ZX":
        # A zombie below a root is captured as such; as a root there is nothing to capture.
        if process.pid in roots:
            yield Finding("exited", label, "it has ended", "name a process that runs")
        return
    if process.tracer:
        yield Finding(
            "traced",
            label,
            f"process {process.tracer} traces it, and only one tracer is possible",
            "end the debugger or strace",
        )
    yield from _of_threads(process, label)
    for kind in ("pid", "mnt"):
        if process.namespaces.get(kind) != observer.namespaces.get(kind):
            yield Finding(
                "other-container",
                label,
                f"it lives in another {kind} namespace, so it belongs to a container",
                "this engine dumps processes of the host; use one for containers",
            )
    devices = gpus.used((*process.mappings, *(one.link for one in process.descriptors)))
    if devices:
        yield Finding("gpu", label, f"it {gpus.reason(devices)}", gpus.CURE)
    for path in process.mappings:
        if path not in devices:
            yield from _of_mapping(label, path)


def _of_mapping(label: str, path: str) -> Iterator[Finding]:
    if path.startswith("/SYSV"):
        yield Finding(
            "sysv-shared-memory",
            label,
            "it uses System V shared memory outside of an ipc namespace of its own",
            "start the job with: unshare --ipc",
        )
    elif _MAPPED_DEVICE.match(path) or path == "anon_inode:[io_uring]":
        yield Finding(
            "device",
            label,
            f"it maps {path}, whose state is in the kernel or a device",
            "let the job close it before the dump",
        )


def _of_descriptor(
    process: Process, descriptor: Descriptor, ghost_limit_bytes: int
) -> Iterator[Finding]:
    subject = f"{_label(process)} descriptor {descriptor.number}"
    anonymous = _ANONYMOUS.match(descriptor.link)
    if anonymous and anonymous[1] not in _KNOWN_ANONYMOUS:
        what = anonymous[1]
        yield Finding(
            "io-uring" if what == "io_uring" else "kernel-object",
            subject,
            f"it is an {what} object, which CRIU cannot capture",
            "switch io_uring off in the job (UV_USE_IO_URING=0 for libuv)"
            if what == "io_uring"
            else "let the job close it before the dump",
        )
    device = descriptor.device
    if device and device[0] not in _PLAIN_MAJORS and not gpus.used([descriptor.link]):
        yield Finding(
            "device",
            subject,
            f"it is the device {descriptor.link} ({device[0]}:{device[1]}), whose state is outside"
            " of the process",
            "let the job close it before the dump",
        )
    if descriptor.protocol and descriptor.protocol not in _KNOWN_PROTOCOLS:
        yield Finding(
            "socket-protocol",
            subject,
            f"it is a socket of the protocol {descriptor.protocol}, which CRIU cannot capture",
            "let the job use plain TCP (GODEBUG=multipathtcp=0 for Go programs)"
            if descriptor.protocol.startswith("MPTCP")
            else "let the job close it before the dump",
        )
    if descriptor.unlinked and descriptor.regular and descriptor.size_bytes > ghost_limit_bytes:
        yield Finding(
            "unlinked-too-large",
            subject,
            f"it is an unlinked file of {descriptor.size_bytes} bytes; the limit is"
            f" {ghost_limit_bytes}",
            "raise ghost_limit in the configuration (CKPT_AGENT_GHOST_LIMIT)",
        )


def _of_unix_sockets(sockets: Sequence[Connection]) -> Iterator[Finding]:
    inside = {one.inode for one in sockets}
    for one in sockets:
        stream = one.kind in ("unix-stream", "unix-seqpacket")
        if stream and one.peer_inode and one.peer_inode not in inside:
            yield Finding(
                "external-unix-socket",
                f"{one.kind} socket {one.inode} {one.local}".rstrip(),
                "it is connected to a process outside of the tree",
                "dump from a root that holds both, or let the job close it before the dump",
            )


def _outside_streams(processes: Sequence[Process]) -> Iterator[Finding]:
    """Standard streams whose other end is outside: pipes with one end in the tree, terminals."""
    ends: dict[str, set[bool]] = {}
    for process in processes:
        for one in process.descriptors:
            if one.link.startswith("pipe:"):
                ends.setdefault(one.link, set()).add(one.writable)
    for process in processes:
        for one in process.descriptors:
            terminal = one.device is not None and 136 <= one.device[0] < 144
            if one.number <= 2 and (terminal or len(ends.get(one.link, ())) == 1):
                name = ("stdin", "stdout", "stderr")[one.number]
                yield Finding(
                    "outside-stream",
                    f"{_label(process)} {name}",
                    f"its other end, {one.link}, is outside of the tree and does not travel",
                    f"restore with --{name} PATH",
                )


def _warnings(processes: Sequence[Process], sockets: Sequence[Connection]) -> Iterator[Finding]:
    locals_inside = {one.local for one in sockets if one.kind.startswith("tcp")}
    for one in sockets:
        outward = one.kind.startswith("tcp") and one.state == "established"
        if outward and one.peer not in locals_inside:
            yield Finding(
                "outward-connection",
                f"{one.kind} {one.local} -> {one.peer}",
                "after a restore it lives on only if the peer still waits and the address is ours",
                "dump the peer in the same epoch, or let the job reconnect",
            )
    yield from _outside_streams(processes)
    for process in processes:
        if process.state == "D":
            yield Finding(
                "uninterruptible",
                _label(process),
                "it waits in the kernel and may not freeze within the deadline",
                "find the slow device or file system it waits for",
            )
        if process.state == "T":
            yield Finding(
                "stopped",
                _label(process),
                "it is stopped, and will be stopped after the dump and after a restore",
                "none is needed; SIGCONT lets it run",
            )
