"""What this kernel can do, found out by trying it on our own process.

Promises: every probe answers within milliseconds, changes nothing that outlives it, and says
"no" rather than raise where a feature is missing or forbidden.
Does not: judge what a missing feature means (model/checkup.py does), or look at other processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import socket
import struct
import tempfile
from collections.abc import Iterator

from agent.host import softdirty
from agent.host.descriptors import KCMP_FILES, NR_KCMP
from agent.model import checkup

# asm/unistd.h; pidfd_getfd and clone3 have the same number on every architecture.
_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_NR_PIDFD_GETFD = 438
_NR_CLONE3 = 435

# linux/userfaultfd.h: UFFDIO_API is _IOWR(0xAA, 0x3F, struct uffdio_api of 24 bytes).
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
_UFFD_FEATURE_WP_ASYNC = 1 << 15

# linux/fs.h: PAGEMAP_SCAN is _IOWR('f', 16, struct pm_scan_arg of 96 bytes).
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_PRESENT = 1 << 3

# linux/netlink.h, linux/netfilter/nf_tables.h: ask for the generation of the rule set.
_NETLINK_NETFILTER = 12
_NFT_MSG_GETGEN = (10 << 8) | 16
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_PROBE_TIMEOUT_S = 1.0

# linux/capability.h, by bit.
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_CHECKPOINT_RESTORE": 40,
}

_libc = ctypes.CDLL(None, use_errno=True)


def probe() -> checkup.Kernel:
    """Try everything once."""
    features = _userfaultfd_features()
    return checkup.Kernel(
        release=platform.release(),
        userfaultfd=features is not None,
        wp_async=bool((features or 0) & _UFFD_FEATURE_WP_ASYNC),
        pagemap_scan=_pagemap_scan(),
        soft_dirty_unusable=softdirty.unusable(),
        nf_tables=_nf_tables(),
        ptrace_scope=_ptrace_scope(),
        time_namespaces=os.path.exists("/proc/self/ns/time"),
        pidfd=_pidfd(),
        kcmp=_kcmp(),
        set_pid=_set_pid(),
        cgroup=_cgroup(),
        capabilities=capabilities(),
    )


def _userfaultfd_features() -> int | None:
    """The feature bits that userfaultfd offers, or None if there is none for us."""
    number = _NR_USERFAULTFD.get(platform.machine())
    if number is None:
        return None
    fd = _libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return None
    try:
        answer = bytearray(struct.pack("=QQQ", _UFFD_API, 0, 0))
        fcntl.ioctl(fd, _UFFDIO_API, answer, True)
    except OSError:
        return None
    else:
        return int(struct.unpack("=QQQ", answer)[1])
    finally:
        os.close(fd)


@contextlib.contextmanager
def _touched_page() -> Iterator[int]:
    """One page of our own that has content; yields its address."""
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        handle = (ctypes.c_char * mmap.PAGESIZE).from_buffer(page)
        try:
            yield ctypes.addressof(handle)
        finally:
            del handle


def _pagemap_scan() -> bool:
    with _touched_page() as address:
        regions = (ctypes.c_uint64 * 3)()
        argument = struct.pack(
            "=12Q",
            96,  # size
            0,  # flags
            address,
            address + mmap.PAGESIZE,
            0,  # walk_end, out
            ctypes.addressof(regions),
            1,  # vec_len
            0,  # max_pages
            0,  # category_inverted
            _PAGE_IS_PRESENT,  # category_mask
            0,  # category_anyof_mask
            _PAGE_IS_PRESENT,  # return_mask
        )
        try:
            fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            found: int = fcntl.ioctl(fd, _PAGEMAP_SCAN, bytearray(argument), True)
        except OSError:
            return False
        finally:
            os.close(fd)
        return found == 1 and regions[0] == address


def _nf_tables() -> bool:
    """Whether the kernel answers a read-only question about its nf_tables rules."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as link:
            link.settimeout(_PROBE_TIMEOUT_S)
            link.bind((0, 0))
            # nlmsghdr of 16 bytes, nfgenmsg of 4.
            link.send(struct.pack("=IHHIIBBH", 20, _NFT_MSG_GETGEN, _NLM_F_REQUEST, 1, 0, 0, 0, 0))
            answer = link.recv(4096)
    except OSError:
        return False
    kind = struct.unpack_from("=IH", answer)[1]
    return bool(kind != _NLMSG_ERROR)


def _ptrace_scope() -> int | None:
    text = _read("/proc/sys/kernel/yama/ptrace_scope").strip()
    return int(text) if text.isdigit() else None


def _pidfd() -> bool:
    """Whether descriptors can be taken out of a process: pidfd_open and pidfd_getfd."""
    with tempfile.TemporaryFile() as own:
        try:
            pidfd = os.pidfd_open(os.getpid())
        except OSError:
            return False
        try:
            copy = _libc.syscall(_NR_PIDFD_GETFD, pidfd, own.fileno(), 0)
            if copy < 0:
                return False
            os.close(copy)
            return True
        finally:
            os.close(pidfd)


def _kcmp() -> bool:
    """Whether descriptors can be compared across processes (CONFIG_KCMP)."""
    number = NR_KCMP.get(platform.machine())
    if number is None:
        return False
    ctypes.set_errno(0)
    pid = os.getpid()
    result = _libc.syscall(number, pid, pid, KCMP_FILES, 0, 0)
    return result == 0 or ctypes.get_errno() not in (errno.ENOSYS, 0)


def _set_pid() -> bool:
    """Whether a new process can be given its number (clone3 with set_tid, Linux 5.5): asked for one
    that is taken, the kernel says so only to those who may.
    """
    taken = ctypes.c_int32(os.getpid())
    # struct clone_args (linux/sched.h): all zero but set_tid and set_tid_size.
    arguments = struct.pack("=11Q", 0, 0, 0, 0, 0, 0, 0, 0, ctypes.addressof(taken), 1, 0)
    ctypes.set_errno(0)
    result = _libc.syscall(_NR_CLONE3, arguments, len(arguments))
    return result < 0 and ctypes.get_errno() == errno.EEXIST


def _cgroup() -> str:
    kinds = {line.split()[2] for line in _read("/proc/self/mounts").splitlines()}
    if "cgroup" in kinds:
        return "hybrid" if "cgroup2" in kinds else "v1"
    return "v2" if "cgroup2" in kinds else "none"


def capabilities() -> frozenset[str]:
    """The effective ones of ``CAPABILITIES``."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            bits = int(line.split()[1], 16)
            return frozenset(name for name, bit in CAPABILITIES.items() if bits >> bit & 1)
    return frozenset()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""
