"""What the kernel says about processes: /proc, read once and turned into small values.

Promises: every function raises ``errors.NotFound`` (fact ``pid``) if the process is gone, whether
before or in the middle of reading, and ``errors.PrivilegeMissing`` if the caller may not
look; a zombie is reported as such and has no memory, no descriptors
and no current directory. ``Identity`` names a process also after its number was given to another.
Does not: read memory, environments or arguments; keep anything open; stop or signal anybody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator

from agent import errors

# include/linux/sched.h: the flag of a kernel thread in the 9th field of /proc/PID/stat.
_PF_KTHREAD = 0x00200000
# The kernel counts start times in ticks of USER_HZ.
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


@dataclasses.dataclass(frozen=True, order=True)
class Identity:
    """A process for good: its number and when it started, in ticks since boot."""

    pid: int
    start_ticks: int


@dataclasses.dataclass(frozen=True)
class Stat:
    """/proc/PID/stat. ``state`` is the kernel's letter: R S D T (stopped) t (traced) Z X I.
    ``terminal`` is the device number of its controlling terminal, 0 if it has none. ``cpu_s`` is
    what all of its threads took of processors so far.
    """

    pid: int
    comm: str
    state: str
    ppid: int
    pgid: int
    session: int
    terminal: int
    flags: int
    cpu_s: float
    threads: int
    start_ticks: int

    @property
    def kernel_thread(self) -> bool:
        """Whether it lives in the kernel only."""
        return bool(self.flags & _PF_KTHREAD)

    @property
    def identity(self) -> Identity:
        """Number and start."""
        return Identity(self.pid, self.start_ticks)


@dataclasses.dataclass(frozen=True)
class Status:
    """/proc/PID/status. ``ns_pids`` are its numbers from the reader's pid namespace inwards.
    ``seccomp`` is 0 none, 1 strict, 2 filter. ``caps_held`` are those it has in any of its sets but
    the bounding one.
    """

    tracer_pid: int
    uid: int
    gid: int
    ns_pids: tuple[int, ...]
    seccomp: int
    caps_effective: int
    caps_held: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Rights:
    """What decides whether a process may do something: who it is as it acts, and its effective
    capabilities.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: int


@dataclasses.dataclass(frozen=True)
class Mapping:
    """One line of /proc/PID/maps. ``path`` is "" for anonymous memory; ``deleted`` says that the
    file has no name any more.
    """

    start: int
    end: int
    perms: str
    offset: int
    dev: tuple[int, int]
    inode: int
    path: str
    deleted: bool

    @property
    def shared(self) -> bool:
        """Whether writes are seen by other mappings of the same object."""
        return self.perms[3] == "s"


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """One descriptor. ``link`` is what /proc shows (a path, ``pipe:[N]``, ``socket:[N]``,
    ``anon_inode:...``). ``mode``, ``dev``, ``inode``, ``rdev``, ``size_bytes``, ``mtime_ns`` and
    ``nlink`` are of the object behind it.
    """

    number: int
    link: str
    flags: int
    position: int
    dev: int
    inode: int
    mode: int
    rdev: int
    size_bytes: int
    mtime_ns: int
    nlink: int

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclasses.dataclass(frozen=True)
class DescriptorInfo:
    """How a descriptor was opened (the flags of open(2)), and through which mount."""

    flags: int
    mount_id: int


@contextlib.contextmanager
def _process(pid: int) -> Iterator[None]:
    """Turn what the kernel says of a vanished process into one error."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise errors.NotFound(
            f"there is no process {pid}", hint="it has ended, or the number is wrong", pid=pid
        ) from exc
    except PermissionError as exc:
        raise errors.PrivilegeMissing(
            f"not allowed to look into process {pid}",
            hint="run as root with at least the capabilities of the target",
            pid=pid,
        ) from exc


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def _parse_stat(raw: bytes) -> Stat:
    # The name may hold spaces and brackets: it ends at the last one.
    left, right = raw.index(b"("), raw.rindex(b")")
    rest = raw[right + 2 :].split()
    return Stat(
        pid=int(raw[:left]),
        comm=raw[left + 1 : right].decode(errors="replace"),
        state=rest[0].decode(),
        ppid=int(rest[1]),
        pgid=int(rest[2]),
        session=int(rest[3]),
        terminal=int(rest[4]),
        flags=int(rest[6]),
        cpu_s=(int(rest[11]) + int(rest[12])) / TICKS_PER_S,
        threads=int(rest[17]),
        start_ticks=int(rest[19]),
    )


def stat(pid: int) -> Stat:
    """The process's line of /proc/PID/stat."""
    with _process(pid):
        return _parse_stat(_read(f"/proc/{pid}/stat"))


def thread_stat(pid: int, tid: int) -> Stat:
    """As ``stat``, of one thread alone: of a process, the kernel counts all of its threads each
    time.

    Raises:
        errors.NotFound: it has ended.
    """
    with _process(tid):
        return _parse_stat(_read(f"/proc/{pid}/task/{tid}/stat"))


def identity(pid: int) -> Identity:
    """Number and start of a process that exists now."""
    return stat(pid).identity


def alive(who: Identity) -> bool:
    """Whether exactly this process still exists and has not ended (a zombie has)."""
    try:
        now = stat(who.pid)
    except errors.NotFound:
        return False
    return now.start_ticks == who.start_ticks and now.state not in "ZX"


def exists(pid: int) -> bool:
    """Whether the number is taken by a process or thread, a zombie included."""
    return os.path.exists(f"/proc/{pid}")


def _status_fields(pid: int) -> dict[str, str]:
    with _process(pid):
        lines = _read(f"/proc/{pid}/status").decode(errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def status(pid: int) -> Status:
    """The part of /proc/PID/status that decides whether a process can be dumped."""
    fields = _status_fields(pid)
    return Status(
        tracer_pid=int(fields["TracerPid"]),
        uid=int(fields["Uid"].split()[0]),
        gid=int(fields["Gid"].split()[0]),
        ns_pids=tuple(int(n) for n in fields["NSpid"].split()),
        seccomp=int(fields.get("Seccomp", "0")),
        caps_effective=int(fields["CapEff"], 16),
        caps_held=int(fields["CapEff"], 16)
        | int(fields["CapPrm"], 16)
        | int(fields["CapInh"], 16)
        | int(fields.get("CapAmb", "0"), 16),
        threads=int(fields["Threads"]),
    )


def rights(pid: int) -> Rights:
    """The part of /proc/PID/status that decides what a process, or a thread, may do."""
    fields = _status_fields(pid)
    return Rights(
        uid=int(fields["Uid"].split()[1]),
        gid=int(fields["Gid"].split()[1]),
        groups=tuple(int(each) for each in fields["Groups"].split()),
        capabilities=int(fields["CapEff"], 16),
    )


def threads(pid: int) -> list[int]:
    """The thread numbers of a process, ascending."""
    with _process(pid):
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def children(pid: int) -> list[int]:
    """The children of all of a process's threads, ascending."""
    found: set[int] = set()
    for tid in threads(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update(int(n) for n in _read(f"/proc/{pid}/task/{tid}/children").split())
    return sorted(found)


def tree(pid: int) -> list[int]:
    """``pid`` and all its descendants, each after its parent. Processes that end meanwhile are
    left out, but the root must exist.
    """
    found = [pid]
    queue = children(pid)
    while queue:
        child = queue.pop(0)
        found.append(child)
        with contextlib.suppress(errors.NotFound):
            queue.extend(children(child))
    return found


def ancestors(pid: int) -> list[int]:
    """The parents of ``pid`` up to pid 1, nearest first."""
    found = []
    while (pid := stat(pid).ppid) > 0:
        found.append(pid)
    return found


def pids() -> list[int]:
    """Every process that this /proc shows, ascending."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def namespaces(pid: int) -> dict[str, int]:
    """The inode number of each namespace, by the names in ``NAMESPACES``."""
    with _process(pid):
        return {kind: os.stat(f"/proc/{pid}/ns/{kind}").st_ino for kind in NAMESPACES}


def namespace(pid: int, kind: str) -> int:
    """The inode number of the namespace of that ``kind``."""
    with _process(pid):
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


_MAPS_LINE = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)"
)
_DELETED = " (deleted)"


def maps(pid: int) -> list[Mapping]:
    """The mappings in order of address; none for a zombie or a kernel thread."""
    return mappings(pid, text(pid, "maps"))


def text(pid: int, name: str) -> bytes:
    """/proc/PID/NAME. Of "smaps": walks the page tables, as ``memory``."""
    with _process(pid):
        return _read(f"/proc/{pid}/{name}")


def lines(pid: int, name: str) -> Iterator[bytes]:
    """The lines of /proc/PID/NAME; the kernel makes little more of it than is asked for."""
    with _process(pid), open(f"/proc/{pid}/{name}", "rb") as file:
        yield from file


def mappings(pid: int, raw: bytes) -> list[Mapping]:
    """What ``raw``, which was in /proc/PID/maps, says."""
    found = []
    for line in raw.splitlines():
        match = _MAPS_LINE.fullmatch(line)
        if match is None:
            raise errors.EnvironmentUnfit(f"cannot read the mappings of process {pid}", pid=pid)
        start, end, perms, offset, major, minor, inode, path = match.groups()
        # Octal escapes: the kernel writes a newline in a name as \012.
        name = os.fsdecode(path).replace("\\012", "\n")
        found.append(
            Mapping(
                start=int(start, 16),
                end=int(end, 16),
                perms=perms.decode(),
                offset=int(offset, 16),
                dev=(int(major, 16), int(minor, 16)),
                inode=int(inode),
                path=name.removesuffix(_DELETED),
                deleted=name.endswith(_DELETED),
            )
        )
    return found


def open_files(pid: int) -> list[OpenFile]:
    """The descriptors in order; ones that are closed meanwhile are left out."""
    with _process(pid):
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    found = []
    for number in numbers:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(_open_file(pid, number))
    return found


def _open_file(pid: int, number: int) -> OpenFile:
    path = f"/proc/{pid}/fd/{number}"
    link = os.readlink(path)
    info = os.stat(path)
    fields = dict(
        line.split(":", 1)
        for line in _read(f"/proc/{pid}/fdinfo/{number}").decode(errors="replace").splitlines()[:2]
    )
    return OpenFile(
        number=number,
        link=link,
        flags=int(fields["flags"], 8),
        position=int(fields["pos"]),
        dev=info.st_dev,
        inode=info.st_ino,
        mode=info.st_mode,
        rdev=info.st_rdev,
        size_bytes=info.st_size,
        mtime_ns=info.st_mtime_ns,
        nlink=info.st_nlink,
    )


def descriptors(pid: int) -> list[int]:
    """The numbers of its descriptors, ascending."""
    with _process(pid):
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def descriptor_info(pid: int, number: int) -> DescriptorInfo:
    """How a descriptor was opened; raises ``FileNotFoundError`` if it has been closed."""
    found = {b"flags": b"0", b"mnt_id": b"0"}
    for line in _read(f"/proc/{pid}/fdinfo/{number}").splitlines()[:3]:
        key, _, value = line.partition(b":")
        found[key] = value
    return DescriptorInfo(int(found[b"flags"], 8), int(found[b"mnt_id"]))


def descriptor_link(pid: int, number: int) -> str:
    """What /proc shows a descriptor to be; raises ``FileNotFoundError`` if it has been closed."""
    return os.readlink(f"/proc/{pid}/fd/{number}")


def pinned_bytes(pid: int) -> int:
    """Memory that devices hold on to; 0 for a zombie."""
    return int(_status_fields(pid).get("VmPin", "0").split()[0]) << 10


def cwd(pid: int) -> str:
    """The current directory as the kernel shows it (``... (deleted)`` if it was removed); "" for
    a zombie.
    """
    with _process(pid):
        try:
            return os.readlink(f"/proc/{pid}/cwd")
        except FileNotFoundError:
            stat(pid)
            return ""


def root(pid: int) -> str:
    """The root directory of the process; "" for a zombie."""
    with _process(pid):
        try:
            return os.readlink(f"/proc/{pid}/root")
        except FileNotFoundError:
            stat(pid)
            return ""


def exe(pid: int) -> str:
    """The program's file; "" for a zombie or a kernel thread."""
    with _process(pid):
        try:
            return os.readlink(f"/proc/{pid}/exe")
        except FileNotFoundError:
            stat(pid)
            return ""


@dataclasses.dataclass(frozen=True)
class Resident:
    """What a process holds in memory by kind, in bytes, from the cheap counters of its status."""

    anon: int
    file: int
    shmem: int
    swap: int


def resident(pid: int) -> Resident:
    """Memory by kind without walking the page tables; all zero for a zombie."""
    fields = _status_fields(pid)

    def value(key: str) -> int:
        return int(fields.get(key, "0").split()[0]) << 10

    return Resident(value("RssAnon"), value("RssFile"), value("RssShmem"), value("VmSwap"))


def tty_index(pid: int, number: int) -> int:
    """The number of the pseudo terminal whose master this descriptor is; -1 if it is none."""
    with _process(pid):
        lines = _read(f"/proc/{pid}/fdinfo/{number}").decode(errors="replace").splitlines()
    for line in lines:
        key, _, value = line.partition(":")
        if key == "tty-index":
            return int(value)
    return -1
