"""CRIU's image files: read and written as CRIU does, and refused when they are broken."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pycriu.images
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import errors
from agent.engines.criu import images, mend, stdio
from agent.model.streams import AddressSpace, PageRun

REG, PIPE, TIMERFD = images.messages.REG, images.messages.PIPE, images.messages.TIMERFD


def fown(message: Any) -> None:
    for field in ("uid", "euid", "signum", "pid_type", "pid"):
        setattr(message.fown, field, 0)


def reg(number: int, name: str) -> Any:
    entry = images.messages.file_entry(type=REG, id=number)
    entry.reg.id, entry.reg.flags, entry.reg.pos, entry.reg.name = number, 0, 5, name
    entry.reg.size = 77
    fown(entry.reg)
    return entry


def pipe(number: int) -> Any:
    entry = images.messages.file_entry(type=PIPE, id=number)
    entry.pipe.id, entry.pipe.pipe_id, entry.pipe.flags = number, 1234, 1
    fown(entry.pipe)
    return entry


def timer(number: int, ticks: int, value: int, interval: int) -> Any:
    entry = images.messages.file_entry(type=TIMERFD, id=number)
    tfd = entry.tfd
    tfd.id, tfd.flags, tfd.clockid, tfd.ticks, tfd.settime_flags = number, 2, 1, ticks, 0
    tfd.vsec, tfd.vnsec, tfd.isec, tfd.insec = 0, value, 0, interval
    fown(tfd)
    return entry


def table(*pairs: tuple[int, int]) -> bytes:
    return images.dump(
        "fdinfo",
        [images.messages.fdinfo_entry(id=i, flags=0, type=REG, fd=fd) for fd, i in pairs],
    )


def ids(files_id: int) -> bytes:
    return images.dump(
        "ids",
        [images.messages.task_kobj_ids_entry(vm_id=1, files_id=files_id, fs_id=1, sighand_id=1)],
    )


def test_a_page_map_is_read_by_criu_as_it_was_meant(tmp_path: Path) -> None:
    space = AddressSpace("process", 7)
    runs = [PageRun(0x1000, 2, 4), PageRun(0x10000, 1 << 33, 6)]
    images.write_pagemap(str(tmp_path), space, 3, runs)
    with (tmp_path / "pagemap-7.img").open("rb") as file:
        found = pycriu.images.load(file)
    assert found["magic"] == "PAGEMAP"
    assert found["entries"][0] == {"pages_id": 3}
    assert [(e["vaddr"], e["nr_pages"], e["flags"]) for e in found["entries"][1:]] == [
        (run.address, run.pages, run.flags) for run in runs
    ]
    assert images.pagemap_name(AddressSpace("shmem", 9)) == "pagemap-shmem-9.img"


def test_where_there_is_no_folder_to_write_to_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.RestoreFailed, match=r"cannot write pagemap-7\.img"):
        images.write_pagemap(str(tmp_path / "gone"), AddressSpace("process", 7), 3, [])


def test_what_is_written_is_read_again_and_by_criu() -> None:
    raw = images.dump("files", [reg(1, "/a"), pipe(2)])
    assert images.load("files", "files.img", raw, images.messages.file_entry) == [
        reg(1, "/a"),
        pipe(2),
    ]
    assert len(pycriu.images.load(io.BytesIO(raw))["entries"]) == 2


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_an_image_or_corrupt(raw: bytes, framed: bool) -> None:
    if framed:
        raw = images.dump("files", []) + raw
    with contextlib.suppress(errors.Corrupt):
        images.load("files", "files.img", raw, images.messages.file_entry)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_an_image_with_a_changed_byte_is_an_image_or_corrupt(data: st.DataObject) -> None:
    raw = bytearray(images.dump("files", [reg(1, "/a"), timer(2, 1, 2, 3)]))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(errors.Corrupt):
        images.load("files", "files.img", bytes(raw), images.messages.file_entry)


def entries(folder: Path, name: str, kind: str, make: Any) -> list[Any]:
    return images.read(str(folder), kind, name, make)


def test_streams_are_repointed_with_all_that_share_them(tmp_path: Path) -> None:
    """fd 1 and 2 of the root are one pipe, which a child holds as 1 and 5; 0 stays."""
    (tmp_path / "files.img").write_bytes(
        images.dump("files", [reg(1, "/in"), pipe(2), reg(3, "/other")])
    )
    (tmp_path / "ids-7.img").write_bytes(ids(1))
    (tmp_path / "fdinfo-1.img").write_bytes(table((0, 1), (1, 2), (2, 2), (3, 3)))
    (tmp_path / "fdinfo-2.img").write_bytes(table((1, 2), (5, 2), (2, 3)))
    assert stdio.redirect(str(tmp_path), 7, {1, 2}) == {1, 2}
    files = {e.id: e for e in entries(tmp_path, "files.img", "files", images.messages.file_entry)}
    root, child = (
        {
            e.fd: e
            for e in entries(tmp_path, f"fdinfo-{n}.img", "fdinfo", images.messages.fdinfo_entry)
        }
        for n in (1, 2)
    )
    assert 2 not in files  # nobody refers to the pipe any more
    assert files[root[1].id].reg.name == "/" + stdio.key(1)
    assert files[root[2].id].reg.name == "/" + stdio.key(2)
    assert child[1].id == child[5].id == root[1].id
    assert child[2].id == 3
    assert root[0].id == 1


def test_a_stream_that_the_root_has_closed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "files.img").write_bytes(images.dump("files", [reg(1, "/in")]))
    (tmp_path / "ids-7.img").write_bytes(ids(1))
    (tmp_path / "fdinfo-1.img").write_bytes(table((0, 1)))
    assert stdio.redirect(str(tmp_path), 7, {0, 1}) == {0}


def test_an_image_without_the_roots_table_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "files.img").write_bytes(images.dump("files", []))
    (tmp_path / "ids-7.img").write_bytes(ids(1))
    with pytest.raises(errors.Corrupt, match="root's descriptors"):
        stdio.redirect(str(tmp_path), 7, {1})


def test_a_periodic_timer_with_an_unread_expiry_gets_its_next_one(tmp_path: Path) -> None:
    path = tmp_path / "files.img"
    path.write_bytes(
        images.dump("files", [timer(1, 1, 0, 50), timer(2, 1, 0, 0), timer(3, 0, 0, 50)])
    )
    mend.mend(str(tmp_path), accept_changed=False)
    found = entries(tmp_path, "files.img", "files", images.messages.file_entry)
    assert [entry.tfd.vnsec for entry in found] == [50, 0, 0]


def test_an_image_without_such_a_timer_stays_byte_for_byte(tmp_path: Path) -> None:
    raw = images.dump("files", [reg(1, "/a"), timer(2, 1, 9, 50)])
    (tmp_path / "files.img").write_bytes(raw)
    mend.mend(str(tmp_path), accept_changed=False)
    assert (tmp_path / "files.img").read_bytes() == raw


def test_accepted_changes_take_the_size_off(tmp_path: Path) -> None:
    (tmp_path / "files.img").write_bytes(images.dump("files", [reg(1, "/a")]))
    mend.mend(str(tmp_path), accept_changed=True)
    (entry,) = entries(tmp_path, "files.img", "files", images.messages.file_entry)
    assert not entry.reg.HasField("size")
