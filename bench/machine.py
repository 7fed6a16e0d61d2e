"""The machine that measures: what it is, and how it is made ready for a fair figure.

Promises: ``evict`` says how much of what it should have dropped is still in the page cache.
Does not: change any setting of the machine.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from bench import figures


@dataclass(frozen=True)
class Context:
    """What every experiment gets: an empty folder on the volume, sizes, and whom to tell."""

    work: str
    size_bytes: int
    memory_size_bytes: int
    pairs: int
    say: Callable[[str], None]


def facts(work: str) -> dict[str, str]:
    """What a reader must know of this machine."""
    where = os.statvfs(work)
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {figures.mib(_memory_bytes())} memory",
        "system": f"{_system()}, Linux {platform.release()}, Python {platform.python_version()}",
        "volume": f"{_mount(work)}, {figures.mib(where.f_bavail * where.f_frsize)} free",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def warm(size_bytes: int) -> None:
    """Touch so much memory once, in a process that then ends: the first touch of a virtual
    machine's memory is several times slower than later ones and would fall on whoever is first.
    """
    touch = f"b = bytearray({size_bytes}); b[::4096] = b'x' * len(b[::4096])"
    subprocess.run([sys.executable, "-c", touch], check=True)


def evict(directory: str) -> float:
    """Drop the files below ``directory`` from the page cache; return the share of them whose
    first page is cached still. Programs and libraries stay cached, for everybody.
    """
    os.sync()
    cached = total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                total += 1
                cached += _is_cached(fd)
            finally:
                os.close(fd)
    return cached / total if total else 0.0


def _is_cached(fd: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def _cpu() -> str:
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _system() -> str:
    return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown system")


def _mount(path: str) -> str:
    """The file system type and device that hold ``path``."""
    best = ("", "unknown", "")
    with open("/proc/mounts") as mounts:
        for line in mounts:
            device, at, kind, *_ = line.split()
            inside = at == "/" or os.path.realpath(path).startswith(at + "/")
            if inside and len(at) >= len(best[0]):
                best = (at, kind, device)
    return f"{best[1]} on {best[2]}"
