"""What the agent must be allowed to do to restore a workload: asked before anything stops.

CRIU gives each process back the capabilities that it had, and can give only what the agent has
itself; another user's resource limits need one more.

Promises: every missing capability is named.
Does not: ask what CRIU needs for any dump at all; ``preflight.privileges`` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from agent.host import proc

_CAP_SYS_RESOURCE = 24
# include/uapi/linux/capability.h, by number.
_NAMES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"),
    *("SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW"),
    *("IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT"),
    *("SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD"),
    *("LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG"),
    *("WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
)


def missing(users: Iterable[int], capabilities: int) -> list[str]:
    """The capabilities that the agent lacks to restore processes of these users that held these
    capabilities, a bit each.
    """
    needed = capabilities
    if any(users):
        needed |= 1 << _CAP_SYS_RESOURCE
    lacking = needed & ~proc.status(os.getpid()).caps_effective
    return [
        f"CAP_{_NAMES[bit]}" if bit < len(_NAMES) else f"capability {bit}"
        for bit in range(lacking.bit_length())
        if lacking >> bit & 1
    ]
