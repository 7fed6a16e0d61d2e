"""Whether a host can dump and restore: facts in, lines of a check-up out.

Promises: pure; every line that is not ``ok`` says what follows from it and what cures it;
``missing`` means that dumps or restores cannot work, ``degraded`` that some cannot, or slower.
Does not: probe anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from agent import errors

Status = Literal["ok", "degraded", "missing"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel offers. ``ptrace_scope`` is None where Yama is not built in; ``cgroup`` is
    ``v1``, ``v2``, ``hybrid`` or ``none``; ``set_pid``: new processes can be given a number.
    """

    release: str
    userfaultfd: bool
    wp_async: bool
    pagemap_scan: bool
    soft_dirty_unusable: str
    nf_tables: bool
    ptrace_scope: int | None
    time_namespaces: bool
    pidfd: bool
    kcmp: bool
    set_pid: bool
    cgroup: str
    capabilities: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Criu:
    """A CRIU that can be used, and what it found this kernel to support."""

    path: str
    version: str
    lazy_pages: bool


@dataclasses.dataclass(frozen=True)
class Folder:
    """The scratch directory: ``problem`` is "" if it can be used."""

    path: str
    problem: str
    free_bytes: int


@dataclasses.dataclass(frozen=True)
class StoreState:
    """A store: ``problem`` is None if it opens; ``exists`` is False before the first dump.
    ``free_bytes`` is None where it cannot be told, ``images`` where each namespace has a store of
    its own. ``name`` is "" for the one that is used where nothing is said.
    """

    url: str
    exists: bool
    images: int | None
    damaged: int
    free_bytes: int | None
    problem: errors.CkptError | None
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Host:
    """Everything that is looked at. ``criu`` is the error where none can be used."""

    kernel: Kernel
    criu: Criu | errors.CkptError
    root: bool
    work_dir: Folder
    stores: tuple[StoreState, ...]
    leftovers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Check:
    """One line."""

    name: str
    status: Status
    found: str
    consequence: str = ""
    cure: str = ""


# CRIU's own files of a dump: metadata of a large tree and a verbose log fit many times.
_WORK_BYTES = 256 << 20
# Below this the next image of a usual training rank may not fit.
_STORE_BYTES = 2 << 30
_NEWER_KERNEL = "use a kernel >= 6.7 with the feature built in"

# Capability -> (what its absence means, what does not work then).
_CAPABILITIES: dict[str, tuple[Status, str]] = {
    "CAP_SYS_ADMIN": ("missing", "CRIU cannot read or rebuild processes"),
    "CAP_SYS_PTRACE": ("missing", "no process can be stopped and read"),
    "CAP_CHECKPOINT_RESTORE": ("degraded", "pids and /proc/PID/map_files need CAP_SYS_ADMIN"),
    "CAP_NET_ADMIN": ("missing", "connections cannot be held still during a dump or restore"),
    "CAP_DAC_OVERRIDE": ("missing", "files and processes of other users cannot be read"),
    "CAP_SYS_RESOURCE": (
        "degraded",
        "restoring a workload of another user with raised limits fails, and so does moving a"
        " process's memory layout past its limits",
    ),
    "CAP_SETUID": ("degraded", "workloads of other users cannot be restored"),
    "CAP_SETGID": ("degraded", "workloads of other groups cannot be restored"),
    "CAP_CHOWN": ("degraded", "files of other users come back with the wrong owner"),
    "CAP_FOWNER": ("degraded", "modes and times of other users' files cannot be put back"),
    "CAP_KILL": ("degraded", "processes of other users cannot be ended by --stop"),
    "CAP_SYS_CHROOT": ("degraded", "--isolate and processes in a chroot cannot be restored"),
}


def judge(host: Host) -> tuple[Check, ...]:
    """Return the lines in the order a person would mend things."""
    return (
        *_criu(host),
        *_kernel(host.kernel, host.root),
        *_privileges(host.kernel, host.root),
        *_places(host),
        *_leftovers(host),
    )


def _check(name: str, good: bool, found: str, bad: Status, consequence: str, cure: str) -> Check:
    if good:
        return Check(name, "ok", found)
    return Check(name, bad, found, consequence, cure)


def _present(good: bool) -> str:
    return "present" if good else "not there"


def _seen(good: bool, root: bool) -> str:
    """As ``_present``, of something that the kernel may hide from others than root."""
    return _present(good) if good or root else "not there, or hidden without root"


def _criu(host: Host) -> Iterator[Check]:
    if isinstance(host.criu, errors.CkptError):
        yield Check(
            "criu",
            "missing",
            host.criu.message,
            "nothing can be dumped or restored",
            host.criu.hint or "run scripts/setup",
        )
        return
    yield Check("criu", "ok", f"{host.criu.version} at {host.criu.path}")
    yield _check(
        "criu-lazy-pages",
        host.criu.lazy_pages,
        _present(host.criu.lazy_pages),
        "degraded",
        "a restored tree cannot run before all of its memory is read",
        "allow userfaultfd: set vm.unprivileged_userfaultfd or run with CAP_SYS_PTRACE",
    )


def _kernel(kernel: Kernel, root: bool) -> Iterator[Check]:
    yield Check("kernel", "ok", kernel.release)
    yield _check(
        "kernel-kcmp",
        kernel.kcmp,
        _seen(kernel.kcmp, root),
        "missing",
        "shared descriptors cannot be told apart: no tree can be dumped",
        "use a kernel with CONFIG_KCMP and CONFIG_CHECKPOINT_RESTORE",
    )
    yield _check(
        "kernel-set-pid",
        kernel.set_pid,
        _seen(kernel.set_pid, root),
        "missing",
        "processes cannot get their numbers back",
        "run as root or with CAP_CHECKPOINT_RESTORE; use a kernel with CONFIG_CHECKPOINT_RESTORE",
    )
    yield _check(
        "kernel-userfaultfd",
        kernel.userfaultfd and kernel.wp_async,
        f"userfaultfd {_seen(kernel.userfaultfd, root)}, WP_ASYNC {_seen(kernel.wp_async, root)}",
        "degraded",
        "what is written while memory is copied ahead is all read in the stop"
        if not kernel.soft_dirty_unusable
        else "memory cannot be tracked while a job runs: each dump reads all of it",
        _NEWER_KERNEL,
    )
    yield _check(
        "kernel-pagemap-scan",
        kernel.pagemap_scan,
        _seen(kernel.pagemap_scan, root),
        "degraded",
        "finding a process's pages takes longer, and so does the stop",
        _NEWER_KERNEL,
    )
    better = kernel.wp_async and kernel.pagemap_scan
    unusable = kernel.soft_dirty_unusable
    if unusable and not root:
        unusable += ", or hidden without root"
    yield _check(
        "kernel-soft-dirty",
        better or not unusable,
        f"{unusable}; not needed beside WP_ASYNC and PAGEMAP_SCAN"
        if better and unusable
        else unusable or "usable",
        "degraded",
        "neither way of tracking written pages is there: each dump reads all memory",
        "use a kernel with CONFIG_MEM_SOFT_DIRTY, or >= 6.7",
    )
    yield _check(
        "kernel-nf-tables",
        kernel.nf_tables,
        _seen(kernel.nf_tables, root),
        "degraded",
        "trees with live TCP connections cannot be dumped or restored",
        "load the module nf_tables, and give CAP_NET_ADMIN",
    )
    scope = kernel.ptrace_scope
    yield _check(
        "kernel-ptrace-scope",
        scope != 3,
        "not restricted" if scope is None else str(scope),
        "missing",
        "no process can be stopped and read, not even by root",
        "boot with kernel.yama.ptrace_scope below 3; it cannot be lowered while running",
    )
    yield _check(
        "kernel-time-namespaces",
        kernel.time_namespaces,
        _present(kernel.time_namespaces),
        "degraded",
        "clocks since boot jump in a process restored after a reboot or on another host",
        "use a kernel with CONFIG_TIME_NS",
    )
    yield _check(
        "kernel-pidfd",
        kernel.pidfd,
        _seen(kernel.pidfd, root),
        "degraded",
        "processes that hold pidfds cannot be dumped",
        "use a kernel >= 5.6 and allow pidfd_getfd",
    )
    yield _check(
        "cgroup",
        kernel.cgroup != "none",
        kernel.cgroup,
        "degraded",
        "restored processes join the agent's own group and its limits",
        "mount cgroup2 on /sys/fs/cgroup",
    )


def _privileges(kernel: Kernel, root: bool) -> Iterator[Check]:
    yield _check(
        "root",
        root,
        "yes" if root else "no",
        "missing",
        "nothing can be dumped or restored",
        "run with sudo, or as a privileged container's root",
    )
    for name, (bad, consequence) in _CAPABILITIES.items():
        held = name in kernel.capabilities
        yield _check(
            name,
            held,
            "held" if held else "not held",
            bad,
            consequence,
            f"run as root; in a container, add {name}",
        )


def _places(host: Host) -> Iterator[Check]:
    folder = host.work_dir
    if folder.problem:
        yield Check(
            "work-dir",
            "missing",
            f"{folder.path}: {folder.problem}",
            "CRIU has no place for its files: nothing can be dumped or restored",
            "name a directory on a local disk with --work-dir",
        )
    else:
        yield _check(
            "work-dir",
            folder.free_bytes >= _WORK_BYTES,
            f"{folder.path}, {folder.free_bytes >> 20} MiB free",
            "degraded",
            "CRIU's files of a large tree may not fit: the dump would fail, the job go on",
            "free space, or name another directory with --work-dir",
        )
    for store in host.stores:
        yield from _store(store)


def _store(store: StoreState) -> Iterator[Check]:
    of = f" {store.name}" if store.name else ""
    if store.problem is not None:
        yield Check(
            f"store{of}",
            "degraded" if store.name else "missing",
            f"{store.url}: {store.problem.message}",
            "pods whose images go there cannot be dumped, and its images cannot be restored"
            if store.name
            else "nothing can be dumped or restored",
            store.problem.hint or "name another store with --store",
        )
        return
    if not store.exists:
        images = "not there yet, the first dump makes it"
    else:
        images = "one store a namespace" if store.images is None else f"{store.images} images"
    yield _check(
        f"store{of}",
        store.damaged == 0,
        f"{store.url}, {images}" + (f", {store.damaged} damaged" if store.damaged else ""),
        "degraded",
        "the damaged images cannot be restored; the others can",
        "see which: ckpt-agent list -o wide; then ckpt-agent delete IMAGE",
    )
    if store.free_bytes is not None:
        yield _check(
            f"store-space{of}",
            store.free_bytes >= _STORE_BYTES,
            f"{store.free_bytes >> 20} MiB free",
            "degraded",
            "the next dump may not fit: it would fail, the job go on",
            "ckpt-agent prune --keep-last 3, or a larger volume",
        )


def _leftovers(host: Host) -> Iterator[Check]:
    yield _check(
        "leftovers",
        not host.leftovers,
        ", ".join(host.leftovers) or "none",
        "degraded",
        "if an operation was killed, what it left takes space or blocks traffic",
        "the next dump or restore clears it away",
    )
