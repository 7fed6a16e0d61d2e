"""Other standard streams for a restored tree.

The descriptors 0, 1 and 2 of the root, and every descriptor in the tree that shares an open file
with them, are made to refer to an entry of their own in ``files.img``, a file that CRIU is told to
take from a descriptor of ours instead of opening it. That treats files, pipes, sockets and
terminals alike.

Promises: only descriptors that share an open file with a redirected stream change.
Does not: keep a terminal as controlling terminal; job control belongs to the new owner.
"""

from __future__ import annotations

import os
from typing import Any

from agent import errors
from agent.engines.criu import images

# A name that no file has; CRIU compares it, without the slash, to the keys of ``inherit_fd``.
_NAME = "/.ckpt-agent/stream-{}"


def key(number: int) -> str:
    """CRIU's key for the redirected stream."""
    return _NAME.format(number).lstrip("/")


def redirect(folder: str, root_pid: int, streams: set[int]) -> set[int]:
    """Edit the images in ``folder`` so that ``streams`` (of 0, 1, 2) of the root come from
    outside; return those that the root has open at all.

    Raises:
        errors.Corrupt: the images cannot be understood.
    """
    if not streams:
        return set()
    entries = images.read(folder, "files", "files.img", images.messages.file_entry)
    tables = {
        name: images.read(folder, "fdinfo", name, images.messages.fdinfo_entry)
        for name in sorted(os.listdir(folder))
        if name.startswith("fdinfo-")
    }
    ids = images.read(folder, "ids", f"ids-{root_pid}.img", images.messages.task_kobj_ids_entry)
    root_table = tables.get(f"fdinfo-{ids[0].files_id}.img") if ids else None
    if root_table is None:
        raise errors.Corrupt(
            "the image does not list the root's descriptors", part=f"ids-{root_pid}.img"
        )
    old = {fd.fd: fd.id for fd in root_table if fd.fd in streams}
    next_id = max((entry.id for entry in entries), default=0) + 1
    new = {number: next_id + number for number in old}
    _repoint(tables.values(), old, new)
    used = {fd.id for table in tables.values() for fd in table}
    kept = [entry for entry in entries if entry.id in used or entry.id not in old.values()]
    kept.extend(_stream_entry(number, new[number]) for number in sorted(old))
    for name, table in tables.items():
        _store(os.path.join(folder, name), "fdinfo", table)
    _store(os.path.join(folder, "files.img"), "files", kept)
    return set(old)


def _repoint(tables: Any, old: dict[int, int], new: dict[int, int]) -> None:
    """Let every descriptor that shares an open file with a stream follow it: number 0, 1 and 2
    their own stream, any other the lowest stream of that file.
    """
    lowest: dict[int, int] = {}
    for number in sorted(old):
        lowest.setdefault(old[number], number)
    for table in tables:
        for fd in table:
            if fd.id in lowest:
                number = fd.fd if old.get(fd.fd) == fd.id else lowest[fd.id]
                fd.id = new[number]
                fd.type = images.messages.REG


def _stream_entry(number: int, entry_id: int) -> Any:
    entry = images.messages.file_entry(type=images.messages.REG, id=entry_id)
    entry.reg.id = entry_id
    entry.reg.flags = os.O_RDONLY if number == 0 else os.O_WRONLY
    entry.reg.pos = 0
    entry.reg.name = _NAME.format(number)
    entry.reg.fown.uid = 0
    entry.reg.fown.euid = 0
    entry.reg.fown.signum = 0
    entry.reg.fown.pid_type = 0
    entry.reg.fown.pid = 0
    return entry


def _store(path: str, kind: str, records: list[Any]) -> None:
    with open(path, "wb") as file:
        file.write(images.dump(kind, records))
