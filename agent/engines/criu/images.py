"""CRIU's image files: the frame around their records, and the memory images that a restore needs.

A file is u32 0x54564319, u32 type, then records of u32 length and a protobuf message (little
endian). ``pagemap-ID.img`` lists the runs of an address space after a head that names
``pages-N.img``, which holds their pages one after the other without any frame.

Promises: content that breaks the frame or a message is ``errors.Corrupt``, naming the file;
zero pages become holes, so that a mostly empty memory costs no disk.
Does not: interpret what CRIU stored beyond the few messages edited here.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import pycriu.images
from google.protobuf.message import DecodeError, Message

from agent import errors
from agent.engines.criu import pour, robust
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun

_FRAME = struct.Struct("<II")
# The inventory has no common head, only its own.
_INVENTORY_MAGIC = 0x58313116
_LENGTH = struct.Struct("<I")
# criu/include/magic.h
_COMMON = 0x54564319
_MAGIC = {
    "files": 0x56303138,
    "fdinfo": 0x56213732,
    "filelocks": 0x54323616,
    "ids": 0x54432030,
    "pagemap": 0x56084025,
    "mm": 0x57492820,
    "pstree": 0x50273030,
    "remap-fpath": 0x59133954,
    "core": 0x55053847,
    "fs": 0x51403912,
    "tcp-stream": 0x51465506,
}
_COUNT_LIMIT = (1 << 32) - 1
# One record holds a file's or a mapping's description; the limit only bounds damage.
_RECORD_BYTES = 16 << 20

messages = pycriu.images.pb

_M = TypeVar("_M", bound=Message)


def load(kind: str, name: str, raw: bytes, make: Callable[[], _M]) -> list[_M]:
    """The records of an image of ``kind`` as messages.

    Raises:
        errors.Corrupt: it is not such an image.
    """
    return [_parsed(record, name, make) for record in _records(kind, name, raw)]


def first(kind: str, name: str, raw: bytes, make: Callable[[], _M]) -> _M:
    """The first record of an image of ``kind``, whatever follows it.

    Raises:
        errors.Corrupt: it is not such an image, or has no record.
    """
    for record in _records(kind, name, raw):
        return _parsed(record, name, make)
    raise _corrupt(name)


def _parsed(record: bytes, name: str, make: Callable[[], _M]) -> _M:
    message = make()
    try:
        message.ParseFromString(record)
    except DecodeError as exc:
        raise _corrupt(name) from exc
    if not message.IsInitialized():
        raise _corrupt(name)
    return message


def load_inventory(raw: bytes) -> Any:
    """The one record of inventory.img.

    Raises:
        errors.Corrupt: it is no inventory, or lacks the numbers of CRIU's own namespaces.
    """
    inventory = messages.inventory_entry()
    try:
        magic, length = _FRAME.unpack_from(raw)
        inventory.ParseFromString(raw[_FRAME.size : _FRAME.size + length])
    except (struct.error, DecodeError) as exc:
        raise _corrupt("inventory.img") from exc
    whole = inventory.IsInitialized() and inventory.HasField("root_ids")
    if magic != _INVENTORY_MAGIC or not whole:
        raise _corrupt("inventory.img")
    return inventory


def dump_inventory(inventory: Any) -> bytes:
    """An inventory.img of this record."""
    content = inventory.SerializeToString()
    return _FRAME.pack(_INVENTORY_MAGIC, len(content)) + bytes(content)


def dump(kind: str, records: Iterable[Any]) -> bytes:
    """An image of ``kind`` with these messages."""
    out = io.BytesIO()
    out.write(_FRAME.pack(_COMMON, _MAGIC[kind]))
    for message in records:
        _write_record(out, message)
    return out.getvalue()


def _records(kind: str, name: str, raw: bytes) -> Iterator[bytes]:
    if len(raw) < _FRAME.size or _FRAME.unpack_from(raw) != (_COMMON, _MAGIC[kind]):
        raise _corrupt(name)
    at = _FRAME.size
    while at < len(raw):
        if len(raw) - at < _LENGTH.size:
            raise _corrupt(name)
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if length > _RECORD_BYTES or length > len(raw) - at:
            raise _corrupt(name)
        yield raw[at : at + length]
        at += length


def _write_record(out: BinaryIO, message: Any) -> None:
    raw = message.SerializeToString()
    out.write(_LENGTH.pack(len(raw)))
    out.write(raw)


def pagemap_name(space: AddressSpace) -> str:
    """What CRIU calls the page map of ``space``."""
    return f"pagemap-{space.id}.img" if space.kind == "process" else f"pagemap-shmem-{space.id}.img"


def pagemap(pages_id: int, runs: Iterable[PageRun]) -> bytes:
    """The page map of an address space whose pages lie in ``pages-{pages_id}.img``."""
    return dump("pagemap", _pagemap_records(pages_id, runs))


def _pagemap_records(pages_id: int, runs: Iterable[PageRun]) -> Iterator[Any]:
    yield messages.pagemap_head(pages_id=pages_id)
    for run in runs:
        # Readers before 4.2 know only the 32-bit count.
        short = run.pages if run.pages <= _COUNT_LIMIT else 0
        yield messages.pagemap_entry(
            vaddr=run.address, compat_nr_pages=short, nr_pages=run.pages, flags=run.flags
        )


def write_pagemap(folder: str, space: AddressSpace, pages_id: int, runs: Iterable[PageRun]) -> None:
    """Write the page map of ``space``, pointing to ``pages-{pages_id}.img``.

    Raises:
        errors.RestoreFailed: no room in ``folder``.
    """
    with (
        _written_to(folder, pagemap_name(space)),
        open(os.path.join(folder, pagemap_name(space)), "wb") as out,
    ):
        out.write(pagemap(pages_id, runs))


def write_pages(
    folder: str,
    space: AddressSpace,
    pages_id: int,
    source: MemberSource,
    runs: Sequence[PageRun],
) -> None:
    """Write these runs of ``space`` as ``pages-{pages_id}.img``, zero pages as holes.

    Raises:
        errors.Corrupt | errors.Missing: the source cannot give them.
        errors.RestoreFailed: no room in ``folder``.
    """
    path = os.path.join(folder, f"pages-{pages_id}.img")
    with _written_to(folder, "the memory of the tree"):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            at = 0
            for _, data, pages in source.read(space, runs) if runs else ():
                if data is not None:
                    _write_all(fd, data, at)
                at += pages * PAGE_BYTES
            os.ftruncate(fd, at)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _written_to(folder: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise errors.RestoreFailed(
            f"cannot write {what} to {folder}: {exc.strerror}",
            hint="free space there, or choose another work directory",
            path=folder,
        ) from exc


def family(folder: str) -> dict[int, pour.ProcessMemory]:
    """What decides about each process's memory, by pid, from the images in ``folder``.

    Raises:
        errors.Corrupt: the images cannot be understood.
    """
    found = {}
    for entry in read(folder, "pstree", "pstree.img", messages.pstree_entry):
        name = f"mm-{entry.pid}.img"
        if not os.path.exists(os.path.join(folder, name)):
            continue  # a zombie
        areas = tuple(
            pour.Area(vma.start, vma.end, vma.status, vma.flags, vma.pgoff, vma.shmid, vma.madv)
            for mm in read(folder, "mm", name, messages.mm_entry)
            for vma in mm.vmas
        )
        cores = [
            core
            for tid in entry.threads
            for core in read(folder, "core", f"core-{tid}.img", messages.core_entry)
        ]
        rseq = tuple(
            core.thread_core.rseq_entry.rseq_abi_pointer
            for core in cores
            if core.thread_core.HasField("rseq_entry")
        )
        # The list of robust futexes, and what is set to zero for whoever waits for the thread.
        early = [core.thread_core.futex_rla for core in cores]
        early += [core.thread_info.clear_tid_addr for core in cores]
        lists = [
            core.thread_core.futex_rla
            for core in cores
            if core.thread_core.futex_rla_len == robust.HEAD.size
        ]
        found[entry.pid] = pour.ProcessMemory(
            entry.pid, entry.ppid, areas, rseq, tuple(early), tuple(lists)
        )
    return found


def read(folder: str, kind: str, name: str, make: Callable[[], _M]) -> list[_M]:
    """The records of one image file in ``folder``; as ``load``, and it must be there."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return load(kind, name, file.read(), make)
    except FileNotFoundError as exc:
        raise errors.Corrupt(f"the image has no {name}", part=name) from exc


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data = data[written:]
        at += written


def _corrupt(name: str) -> errors.Corrupt:
    return errors.Corrupt(
        f"{name} of the image is not what CRIU writes", hint="use another image", part=name
    )
