"""The addresses of a network namespace, by a process in it.

Promises: what others can reach it by, IPv4 and IPv6, as text.
Does not: know which of them a cluster calls a pod's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re

_LOCAL = re.compile(r"\|-- ([0-9.]+)\s+/32 host LOCAL")


def of(pid: int) -> list[str]:
    """The addresses that others can reach, ascending; none if the process is gone."""
    found: set[str] = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/net/fib_trie", encoding="ascii") as file:
        found.update(match[1] for match in _LOCAL.finditer(file.read()))
    with contextlib.suppress(OSError), open(f"/proc/{pid}/net/if_inet6", encoding="ascii") as file:
        for line in file:
            packed = bytes.fromhex(line.split()[0])
            found.add(str(ipaddress.ip_address(packed)))
    return sorted(each for each in found if not _local_only(each))


def _local_only(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local
