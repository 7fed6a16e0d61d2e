"""What this host says of itself: its boot, its free memory, its idle processors, its
numbers for processes.

Promises: each answer is the kernel's own, read when asked.
Does not: look at processes (``proc``), or try what the kernel can do (``kernel``).
"""

from __future__ import annotations

import os
from collections.abc import Collection

from agent import errors


def boot_id() -> str:
    """Names this boot of this kernel."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def memory_available_bytes() -> int:
    """How much memory new processes can take without swapping, by the kernel's estimate.

    Raises:
        errors.EnvironmentUnfit: the kernel does not tell.
    """
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise errors.EnvironmentUnfit("/proc/meminfo has no MemAvailable")


def idle_s(processors: Collection[int]) -> float:
    """For how long nothing ran on these processors since the machine was started, added up."""
    names = {f"cpu{number}" for number in processors}
    lines = [line.split() for line in _read("/proc/stat").splitlines() if line.startswith("cpu")]
    # Documentation/filesystems/proc.rst: the fourth number, and the fifth, for want of a disk.
    ticks = sum(int(n) for each in lines if each[0] in names for n in each[4:6])
    return ticks / os.sysconf("SC_CLK_TCK")


def last_pid_max() -> int:
    """The number after which pids start again from the beginning."""
    return int(_read("/proc/sys/kernel/pid_max"))


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
