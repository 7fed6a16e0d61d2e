"""The ends of TCP connections in CRIU's images: addresses in files.img, sequence numbers in a
tcp-stream-INODE.img each.

Promises: what cannot be understood is ``errors.Corrupt``, naming the file.
Does not: look at the queued data behind the numbers.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Iterator
from typing import Any

from agent import errors
from agent.engines.criu import images
from agent.model.cut import End

_MAPPED = (0, 0, 0xFFFF0000)
# The record is a few numbers; what follows it are the queues, up to megabytes.
_HEAD_BYTES = 4096


def read(folder: str) -> list[End]:
    """All ends in the images in ``folder``."""
    return list(_ends(folder))


def _ends(folder: str) -> Iterator[End]:
    if not os.path.exists(os.path.join(folder, "files.img")):
        return
    for entry in images.read(folder, "files", "files.img", images.messages.file_entry):
        if not entry.HasField("isk"):
            continue
        name = f"tcp-stream-{entry.isk.ino:x}.img"
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        stream = _stream(path, name)
        yield End(
            _address(entry.isk.src_addr, name),
            entry.isk.src_port,
            _address(entry.isk.dst_addr, name),
            entry.isk.dst_port,
            written_seq=stream.outq_seq,
            unacknowledged_bytes=stream.outq_len,
            received_seq=stream.inq_seq,
        )


def _stream(path: str, name: str) -> Any:
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    return images.first("tcp-stream", name, head, images.messages.tcp_stream_entry)


def _address(words: Any, name: str) -> str:
    """As CRIU keeps an address: words in network order, read as if in this machine's."""
    kept = tuple(words)
    if len(kept) == 4 and kept[:3] == _MAPPED:
        kept = kept[3:]
    try:
        return str(ipaddress.ip_address(b"".join(struct.pack("<I", each) for each in kept)))
    except (ValueError, struct.error) as exc:
        raise errors.Corrupt(f"{name} is of an impossible address", part=name) from exc
