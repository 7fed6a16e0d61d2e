"""What CRIU says of a dump beside its images: its statistics and the head of its log.

Promises: statistics that cannot be understood are ``errors.Corrupt``; a log is only looked at.
Does not: need either.
"""

from __future__ import annotations

import re
import struct

from google.protobuf.message import DecodeError

from agent.engines.criu import images
from agent.engines.kubelet.archive import LOG, STATS, Archive
from agent.engines.kubelet.tarindex import corrupt

# criu/include/magic.h: IMG_SERVICE_MAGIC, STATS_MAGIC, then the length of the only record.
_FRAME = struct.Struct("<III")
_MAGIC = (0x55105940, 0x57093306)
_STATISTICS_BYTES = 64 << 10
_LOG_HEAD_BYTES = 64 << 10
_VERSION = re.compile(rb"Version: ([0-9]+(?:\.[0-9]+)+)")
# "Running on NODE Linux RELEASE #1 SMP ... MACHINE"
_KERNEL = re.compile(rb"Running on \S+ Linux (\S{1,128}) [^\n]* (\w{1,32})\n")


def of_log(source: Archive) -> dict[str, str]:
    """CRIU's version, and the kernel and machine it ran on; "" where the log does not say."""
    member = source.parts.get(LOG)
    head = source.stream(member).read(_LOG_HEAD_BYTES) if member else b""
    version, kernel = _VERSION.search(head), _KERNEL.search(head)
    return {
        "criu": version[1].decode() if version else "",
        "kernel": kernel[1].decode(errors="replace") if kernel else "",
        "machine": kernel[2].decode(errors="replace") if kernel else "",
    }


def statistics(source: Archive) -> dict[str, int]:
    """CRIU's own figures of the dump, times in microseconds; empty if there are none.

    Raises:
        errors.Corrupt: they are not what CRIU writes.
    """
    member = source.parts.get(STATS)
    if member is None or not member.size_bytes:
        return {}
    raw = source.read(member, _STATISTICS_BYTES)
    head = raw[: _FRAME.size]
    if len(head) < _FRAME.size or _FRAME.unpack(head)[:2] != _MAGIC:
        raise corrupt(f"{STATS} is not what CRIU writes")
    message = images.messages.stats_entry()
    try:
        message.ParseFromString(raw[_FRAME.size :])
    except DecodeError as exc:
        raise corrupt(f"{STATS} is not what CRIU writes") from exc
    return {field.name: int(value) for field, value in message.dump.ListFields()}
