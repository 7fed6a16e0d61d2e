"""What this host says of itself: its boot, its free memory, its numbers for processes.

Promises: each answer is the kernel's own, read when asked.
Does not: look at processes (``proc``), or try what the kernel can do (``kernel``).
"""

from __future__ import annotations

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


def last_pid_max() -> int:
    """The number after which pids start again from the beginning."""
    return int(_read("/proc/sys/kernel/pid_max"))


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
