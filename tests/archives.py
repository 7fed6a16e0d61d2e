"""Checkpoint archives to take apart: small, made of real CRIU messages, and damaged at will."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

from agent.engines.criu import images
from agent.model.streams import PAGE_BYTES
from tests.images import page

pb = images.messages

# Runs of an address space: (first page, flags, pages by number).
Runs = tuple[tuple[int, int, tuple[int, ...]], ...]

PRESENT = 4
LAZY = 2


@dataclasses.dataclass(frozen=True)
class Entry:
    """One member of a tar file, as raw as a test wants it."""

    name: str
    content: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""


def pagemap(pages_id: int, runs: Runs) -> bytes:
    records = [pb.pagemap_head(pages_id=pages_id)]
    for first, flags, numbers in runs:
        records.append(
            pb.pagemap_entry(
                vaddr=first * PAGE_BYTES, compat_nr_pages=0, nr_pages=len(numbers), flags=flags
            )
        )
    return images.dump("pagemap", records)


def pages(runs: Runs) -> bytes:
    return b"".join(page(number) for _, _, numbers in runs for number in numbers)


def process(pid: int, *, comm: str, runs: Runs, pages_id: int) -> dict[str, bytes]:
    """The images of one process with a pipe as its output and a file as its input."""
    creds = pb.creds_entry(
        uid=1000,
        gid=100,
        euid=1000,
        egid=100,
        suid=1000,
        sgid=100,
        fsuid=1000,
        fsgid=100,
        secbits=0,
        cap_prm=[1 << 21],
        cap_eff=[0, 1 << 8],
    )
    core = pb.core_entry(mtype=1)
    core.tc.task_state = 1
    core.tc.exit_code = 0
    core.tc.personality = 0
    core.tc.flags = 0
    core.tc.blk_sigset = 0
    core.tc.comm = comm
    core.thread_core.futex_rla = 0
    core.thread_core.futex_rla_len = 0
    core.thread_core.sched_nice = 0
    core.thread_core.sched_policy = 0
    core.thread_core.creds.CopyFrom(creds)
    mm = pb.mm_entry(
        **dict.fromkeys(
            (
                *("mm_start_code", "mm_end_code", "mm_start_data", "mm_end_data"),
                *("mm_start_stack", "mm_start_brk", "mm_brk", "mm_arg_start", "mm_arg_end"),
                *("mm_env_start", "mm_env_end"),
            ),
            0,
        ),
        exe_file_id=1,
    )
    mm.vmas.add(start=4096, end=8192, pgoff=0, shmid=1, prot=5, flags=2, status=1 | 1 << 6, fd=-1)
    ids = pb.task_kobj_ids_entry(
        vm_id=pid, files_id=pid, fs_id=pid, sighand_id=pid, net_ns_id=10, mnt_ns_id=12
    )
    fds = [
        pb.fdinfo_entry(id=2, flags=0, type=1, fd=0),
        pb.fdinfo_entry(id=3, flags=0, type=2, fd=1),
        pb.fdinfo_entry(id=4, flags=0, type=4, fd=5),
    ]
    return {
        f"core-{pid}.img": images.dump("core", [core]),
        f"ids-{pid}.img": images.dump("ids", [ids]),
        f"mm-{pid}.img": images.dump("mm", [mm]),
        f"fs-{pid}.img": images.dump("fs", [pb.fs_entry(cwd_id=5, root_id=5)]),
        f"fdinfo-{pid}.img": images.dump("fdinfo", fds),
        f"pagemap-{pid}.img": pagemap(pages_id, runs),
        f"pages-{pages_id}.img": pages(runs),
    }


def files() -> bytes:
    fown = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)

    def regular(number: int, name: str, flags: int) -> object:
        entry = pb.file_entry(type=1, id=number)
        entry.reg.CopyFrom(
            pb.reg_file_entry(id=number, flags=flags, pos=0, fown=fown, name=name, size=123)
        )
        return entry

    pipe = pb.file_entry(type=2, id=3)
    pipe.pipe.CopyFrom(pb.pipe_entry(id=3, pipe_id=4711, flags=1, fown=fown))
    inet = pb.file_entry(type=4, id=4)
    inet.isk.CopyFrom(
        pb.inet_sk_entry(
            id=4, ino=9, family=2, type=1, proto=6, state=1, src_port=8080, dst_port=40000,
            flags=2, backlog=0, fown=fown,
            src_addr=[struct.unpack("<I", bytes([10, 0, 0, 1]))[0]],
            dst_addr=[struct.unpack("<I", bytes([10, 0, 0, 2]))[0]],
            opts=pb.sk_opts_entry(so_sndbuf=1, so_rcvbuf=1, so_snd_tmo_sec=0, so_snd_tmo_usec=0,
                                  so_rcv_tmo_sec=0, so_rcv_tmo_usec=0),
        )
    )  # fmt: skip
    return images.dump(
        "files",
        [
            regular(1, "/usr/bin/job", 0),
            regular(2, "/data/input", 0),
            pipe,
            inet,
            regular(5, "/work", 0),
        ],
    )


FIRST: Runs = ((16, PRESENT, (1, 2, 3, 0, 0)), (1 << 20, PRESENT | LAZY, tuple(range(10, 30))))
SECOND: Runs = ((32, PRESENT, (2, 3, 40)),)
SHARED: Runs = ((0, PRESENT, (7, 8)),)


def layer(entries: tuple[Entry, ...] = (Entry("tmp/new", b"made by the job"),)) -> bytes:
    return gzip.compress(tar(entries))


def parts(rootfs_diff: bytes | None = None) -> dict[str, bytes]:
    """What a runtime puts beside CRIU's images; as containerd does it."""
    spec = {
        "ociVersion": "1.2.0",
        "annotations": {
            "io.kubernetes.cri.container-name": "c",
            "io.kubernetes.cri.sandbox-name": "pod-1",
            "io.kubernetes.cri.sandbox-namespace": "team",
            "io.kubernetes.cri.sandbox-uid": "11111111-2222-3333-4444-555555555555",
        },
        "linux": {"resources": {"memory": {"limit": 1 << 30}}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    }
    config = {
        "id": "f" * 64,
        "name": "c",
        "rootfsImageName": "example.com/job:1",
        "rootfsImageRef": "example.com/job@sha256:" + "ab" * 32,
        "runtime": "io.containerd.runc.v2",
    }
    return {
        "spec.dump": json.dumps(spec).encode(),
        "config.dump": json.dumps(config).encode(),
        "status.dump": json.dumps({"id": "f" * 64, "labels": {}}).encode(),
        "status": b'{"Pid": 1}',
        "rootfs-diff.tar": layer() if rootfs_diff is None else rootfs_diff,
        "stats-dump": stats(frozen_us=230_000),
        "dump.log": b"nothing to see\n",
        "container.log": b"2026-01-01T00:00:00Z stdout F line\n",
    }


def stats(frozen_us: int) -> bytes:
    message = pb.stats_entry()
    message.dump.freezing_time = 1000
    message.dump.frozen_time = frozen_us
    message.dump.memdump_time = message.dump.memwrite_time = 0
    message.dump.pages_scanned = message.dump.pages_skipped_parent = message.dump.pages_written = 0
    message.dump.pages_lazy = message.dump.irmap_resolve = 0
    raw = bytes(message.SerializeToString())
    return struct.pack("<III", 0x55105940, 0x57093306, len(raw)) + raw


def criu_images() -> dict[str, bytes]:
    tree = [
        pb.pstree_entry(pid=1, ppid=0, pgid=1, sid=1, threads=[1]),
        pb.pstree_entry(pid=7, ppid=1, pgid=1, sid=1, threads=[7]),
    ]
    inventory = pb.inventory_entry(img_version=2)
    inventory.root_ids.CopyFrom(
        pb.task_kobj_ids_entry(vm_id=1, files_id=1, fs_id=1, sighand_id=1, net_ns_id=2, mnt_ns_id=3)
    )
    raw = inventory.SerializeToString()
    return {
        "inventory.img": struct.pack("<II", 0x58313116, len(raw)) + raw,
        "pstree.img": images.dump("pstree", tree),
        "files.img": files(),
        **process(1, comm="job", runs=FIRST, pages_id=1),
        **process(7, comm="worker", runs=SECOND, pages_id=2),
        "pagemap-shmem-99.img": pagemap(3, SHARED),
        "pages-3.img": pages(SHARED),
        "descriptors.json": b'["/dev/null","pipe:[4711]","pipe:[4711]"]',
    }


def tar(entries: tuple[Entry, ...], format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type = entry.type
            info.size = len(entry.content)
            info.linkname = entry.link
            archive.addfile(info, io.BytesIO(entry.content))
    return out.getvalue()


def entries(
    images_of: Mapping[str, bytes] | None = None, parts_of: Mapping[str, bytes] | None = None
) -> tuple[Entry, ...]:
    """The members of a good archive, in the order in which containerd writes them."""
    found = criu_images() if images_of is None else images_of
    beside = parts() if parts_of is None else parts_of
    return (
        Entry("checkpoint/", type=tarfile.DIRTYPE),
        *(Entry(f"checkpoint/{name}", content) for name, content in sorted(found.items())),
        *(Entry(name, content) for name, content in sorted(beside.items())),
    )


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return os.fspath(path)
