"""The ends of TCP connections in CRIU's images: addresses in files.img, sequence numbers in a
tcp-stream-INODE.img each.

Promises: what cannot be understood is ``errors.Corrupt``, naming the file.
Does not: look at the queued data behind the numbers.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from agent import errors
from agent.engines.criu import images
from agent.model.cut import End

_MAPPED = (0, 0, 0xFFFF0000)
# net/tcp_states.h: close-wait, last-ack and closing.
_PEER_CLOSED = (8, 9, 11)
# The record is a few numbers; what follows it are the queues, up to megabytes.
HEAD_BYTES = 4096


def read(folder: str) -> list[End]:
    """All ends in the images in ``folder``."""
    if not os.path.exists(os.path.join(folder, "files.img")):
        return []

    def head(name: str) -> bytes | None:
        try:
            with open(os.path.join(folder, name), "rb") as file:
                return file.read(HEAD_BYTES)
        except FileNotFoundError:
            return None

    return of(images.read(folder, "files", "files.img", images.messages.file_entry), head)


def of(entries: Iterable[Any], head: Callable[[str], bytes | None]) -> list[End]:
    """The ends among the ``entries`` of a files.img; ``head`` gives the first ``HEAD_BYTES`` of the
    image of a name, None if there is no such image.
    """
    return list(_ends(entries, head))


def _ends(entries: Iterable[Any], head: Callable[[str], bytes | None]) -> Iterator[End]:
    for entry in entries:
        if not entry.HasField("isk"):
            continue
        name = f"tcp-stream-{entry.isk.ino:x}.img"
        raw = head(name)
        if raw is None:
            continue
        stream = images.first("tcp-stream", name, raw, images.messages.tcp_stream_entry)
        yield End(
            _address(entry.isk.src_addr, name),
            entry.isk.src_port,
            _address(entry.isk.dst_addr, name),
            entry.isk.dst_port,
            written_seq=stream.outq_seq,
            unacknowledged_bytes=stream.outq_len,
            received_seq=stream.inq_seq,
            peer_closed=entry.isk.state in _PEER_CLOSED,
        )


def _address(words: Any, name: str) -> str:
    """As CRIU keeps an address: words in network order, read as if in this machine's."""
    kept = tuple(words)
    if len(kept) == 4 and kept[:3] == _MAPPED:
        kept = kept[3:]
    try:
        return str(ipaddress.ip_address(b"".join(struct.pack("<I", each) for each in kept)))
    except (ValueError, struct.error) as exc:
        raise errors.Corrupt(f"{name} is of an impossible address", part=name) from exc
