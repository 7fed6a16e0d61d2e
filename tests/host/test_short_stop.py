"""The short stop: memory copied while the job runs, and the image as if it had all been read at the
freeze.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import errors
from agent.engines.base import CaptureOptions, FilePolicy, Kept, RestoreOptions
from agent.engines.criu import hiding, shortstop
from agent.engines.tracking import precopy, protected
from agent.host import layouts, proc
from agent.model import ids
from agent.model.streams import PAGE_BYTES, AddressSpace
from agent.node import dump as node_dump
from agent.node import restore as node_restore
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests.host.conftest import TARGETS, Cut, Host
from tests.host.image import MemoryImage
from tests.host.test_short_stop_shared import objects, stored

OPTIONS = CaptureOptions(precopy=True)
_ZEROS = bytes(PAGE_BYTES)
# So many, but after a minute only the fewest.
CYCLES = int(os.environ.get("TORTURE_CYCLES", "24"))
FEWEST, ENOUGH_S = 6, float(os.environ.get("TORTURE_S", "45"))
MEMORY_MIB, THREADS = "48", "3"


@pytest.fixture(scope="session")
def torture(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = str(tmp_path_factory.mktemp("torture") / "torture")
    source = str(TARGETS / "torture.c")
    subprocess.run(["gcc", "-O2", "-pthread", "-Wall", "-o", program, source], check=True)
    return program


# The kernel writes a thread's number into its rseq area whenever it goes on: that is the one thing
# that differs between two looks at a tree that stands still.
NO_RSEQ = "glibc.pthread.rseq=0"


class Frozen:
    """The private memory of a tree that stands still, read by nothing of the agent's; its processes
    have to have been started with ``NO_RSEQ``.
    """

    def __init__(self, root: int) -> None:
        self.pages: dict[AddressSpace, dict[int, bytes]] = {}
        self.maps: dict[AddressSpace, list[proc.Mapping]] = {}
        for pid in proc.tree(root):
            if proc.stat(pid).state not in "ZX":
                assert NO_RSEQ.encode() in Path(f"/proc/{pid}/environ").read_bytes()
                space = AddressSpace("process", pid)
                self.maps[space] = [each for each in proc.maps(pid) if not _kernels(each)]
                self.pages[space] = dict(_private_pages(pid, self.maps[space]))

    def assert_equal(self, image: MemoryImage) -> None:
        for space, pages in self.pages.items():
            stored: dict[int, bytes] = {}
            for run, data in image.runs_of.get(space, []):
                for number in range(run.pages):
                    at = number * PAGE_BYTES
                    stored[run.address + at] = data[at : at + PAGE_BYTES]
            wrong = []
            for mapping in self.maps[space]:
                for page in range(mapping.start, mapping.end, PAGE_BYTES):
                    was, is_now = pages.get(page), stored.get(page)
                    if was != is_now and (was or _untouched(mapping, page)) != (
                        is_now or _untouched(mapping, page)
                    ):
                        wrong.append(f"{page:#x} in {mapping}")
            assert wrong == [], f"{space}: {len(wrong)} of {len(pages)} pages"


def _kernels(mapping: proc.Mapping) -> bool:
    """CRIU stores the vDSO, which a restore replaces by that of the kernel it runs on."""
    return mapping.path.startswith(("[v", "/[aio]"))


def _untouched(mapping: proc.Mapping, page: int) -> bytes:
    """What a page reads as that is not the process's own."""
    if mapping.path.startswith("/") and not mapping.deleted:
        with open(mapping.path, "rb") as file:
            file.seek(mapping.offset + page - mapping.start)
            return file.read(PAGE_BYTES).ljust(PAGE_BYTES, b"\0")
    return _ZEROS


def looked_at(root: int, seen: list[Frozen]) -> Callable[[], None]:
    """For a cut: looks at the tree when all of it was read."""
    return lambda: seen.append(Frozen(root))


def _private_pages(pid: int, maps: list[proc.Mapping]) -> Iterator[tuple[int, bytes]]:
    """Documentation/admin-guide/mm/pagemap.rst: bit 63 present, 62 swapped, 61 of a file."""
    with open(f"/proc/{pid}/pagemap", "rb") as table, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for mapping in maps:
            if mapping.shared:
                continue
            table.seek(mapping.start // PAGE_BYTES * 8)
            entries = np.frombuffer(
                table.read((mapping.end - mapping.start) // PAGE_BYTES * 8), np.uint64
            )
            there = (entries >> np.uint64(62)).astype(bool)
            own = (entries >> np.uint64(61) & np.uint64(1)) == 0
            for number in np.flatnonzero(there & own).tolist():
                address = mapping.start + number * PAGE_BYTES
                yield address, os.pread(memory.fileno(), PAGE_BYTES, address)


class Torture:
    """A running torture program."""

    def __init__(self, host: Host, program: str, folder: Path, seed: int) -> None:
        self.host = host
        self.folder = folder
        folder.mkdir()
        self.log = folder / "log"
        environment = {"GLIBC_TUNABLES": NO_RSEQ}
        argv = ["sh", "-c", 'exec "$@" 2>>"$0"', str(self.log)]
        argv += [program, str(folder), str(seed), THREADS, MEMORY_MIB]
        self.pid = host.popen(argv, environment).pid
        # It takes no question before it has answered once.
        deadline = time.monotonic() + 120
        while not (folder / "answer").exists():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        # Nearly every page has been written by then.
        while self.checked() < 3 * int(MEMORY_MIB) << 8:
            assert time.monotonic() < deadline, self.said()

    def checked(self) -> int:
        answer = self.folder / "answer"
        answer.unlink(missing_ok=True)
        deadline = time.monotonic() + 20
        while not answer.exists():
            assert time.monotonic() < deadline, self.said()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.01)
        return int(answer.read_text())

    def works(self) -> None:
        """It goes on checking and has found nothing."""
        before = self.checked()
        deadline = time.monotonic() + 20
        while self.checked() == before:
            assert time.monotonic() < deadline, self.said()
        assert self.said() == ""

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else "it did not start"

    def kill(self) -> None:
        pids = proc.tree(self.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for popen in self.host.popens:
            if popen.pid == self.pid:
                popen.wait()
        for tree in self.host.trees:
            tree.kill()
        deadline = time.monotonic() + 10
        while any(proc.exists(pid) for pid in pids):
            assert time.monotonic() < deadline, "the tree does not end"
            time.sleep(0.005)


@pytest.mark.slow
def test_no_wrong_byte_in_many_cycles(
    host: Host,
    torture: str,
    tmp_path: Path,
    way: str,
) -> None:
    """Where writes are noted, and where all that is known of memory is what it held."""
    cycles = CYCLES // 4 if way == "none" else CYCLES
    seed = int(os.environ.get("TORTURE_SEED", "0")) or time.time_ns() % 1_000_000
    print(f"TORTURE_SEED={seed}")
    draw = random.Random(seed)
    job = Torture(host, torture, tmp_path / "torture", seed)
    fell_back: list[str] = []
    done = 0
    kept, before = Kept(), None
    began = time.monotonic()
    for cycle in range(cycles):
        if cycle >= FEWEST and time.monotonic() - began > ENOUGH_S:
            break
        time.sleep(draw.random() * 0.2)
        frozen: list[Frozen] = []
        shared: list[dict[AddressSpace, bytes]] = []

        def look(
            frozen: list[Frozen] = frozen, shared: list[dict[AddressSpace, bytes]] = shared
        ) -> None:
            frozen.append(Frozen(job.pid))
            shared.append(objects(job.pid))

        image = MemoryImage(before)
        cut = Cut(captured=look)
        try:
            report = host.capture(job.pid, image, cut, dataclasses.replace(OPTIONS, kept=kept))
        except errors.TargetExited:
            # It ends itself where it finds what it did not write.
            pytest.fail(f"after {done} cycles: {job.said()}")
        except errors.ShortStopFailed as exc:
            # As a dump does: once more the plain way. What counts is that no byte is wrong.
            fell_back.append(str(exc))
            frozen.clear()
            shared.clear()
            kept.forget()
            image = MemoryImage()
            report = host.capture(job.pid, image, cut, dataclasses.replace(OPTIONS, precopy=False))
        else:
            how = report.engine_facts["stop"]
            assert how["path"] == "precopy", how
            assert how["tracked"].get(way, 0) > 0, how
            kept.committed(str(cycle))
            # Now and then another epoch has come between, or nothing is known any more.
            before = None if draw.random() < 0.2 else (str(cycle), image)
        frozen[0].assert_equal(image)
        assert sum(len(pages) for pages in frozen[0].pages.values()) * PAGE_BYTES > 10 << 20
        wrong = [
            space
            for space, content in shared[0].items()
            if stored(image, space, len(content)) != content
        ]
        assert wrong == [], f"{len(wrong)} of {len(shared[0])} shared objects"
        assert job.said() == ""
        done += 1
        if draw.random() < 0.4:
            kept.forget()
            job.kill()
            tree = host.restore(image, RestoreOptions(files=FilePolicy.ROLLBACK))
            assert tree.pid == job.pid
            job.works()
    kept.forget()
    job.works()
    host.assert_clean()
    print(f"{done} cycles, of which {len(fell_back)} took the plain way")
    assert len(fell_back) <= 1, fell_back


def test_of_private_memory_criu_sends_the_kernels_page_and_hardly_another(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = host.start("memory", MEMORY_MIB="48", GLIBC_TUNABLES=NO_RSEQ)
    sent: list[int] = []
    pages = shortstop.ShortStop.pages

    def noted(self: Any, space: AddressSpace, run: Any, data: memoryview) -> None:
        sent.append(run.pages)
        pages(self, space, run, data)

    monkeypatch.setattr(shortstop.ShortStop, "pages", noted)
    frozen: list[Frozen] = []
    image = MemoryImage()
    host.capture(target.pid, image, Cut(captured=looked_at(target.pid, frozen)), OPTIONS)
    frozen[0].assert_equal(image)
    assert 0 < sum(sent) < 16


def test_a_dump_whose_flags_changed_meanwhile_is_made_the_plain_way(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = host.start("memory", MEMORY_MIB="48")
    monkeypatch.setattr(layouts.Layouts, "changed", lambda self: [target.pid])
    store = Store.open(DirectoryVolume(str(tmp_path / "store"), create=True), create=True)
    members = [node_dump.Member(ids.member_name("tree"), target.pid)]
    outcome = node_dump.dump(store, host.engine, ids.group_name("job"), members, OPTIONS)
    ((_, report),) = outcome.members
    assert report.engine_facts["stop"]["path"] == "plain"
    host.assert_running(target)
    host.assert_clean()


def test_a_dump_that_fails_with_memory_hidden_is_made_the_plain_way(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU's next version may not like the answers that it gets."""
    target = host.start("memory", "threads", MEMORY_MIB="48")
    answered = hiding.Hiding._answer
    met = []

    def spoiled(self: Any, call: Any) -> int | None:
        if (answer := answered(self, call)) is None:
            return None
        met.append(answer)
        return -1

    monkeypatch.setattr(hiding.Hiding, "_answer", spoiled)
    store = Store.open(DirectoryVolume(str(tmp_path / "store"), create=True), create=True)
    group, member = ids.group_name("job"), ids.member_name("tree")
    outcome = node_dump.dump(
        store, host.engine, group, [node_dump.Member(member, target.pid)], OPTIONS
    )
    assert met
    ((_, report),) = outcome.members
    assert report.engine_facts["stop"]["path"] == "plain"
    host.assert_running(target)
    host.assert_clean()
    host.kill(target)
    node_restore.restore(store, host.engine, group, RestoreOptions()).trees[0][1].kill()


def test_a_job_that_goes_on_is_copied_slowly_and_one_that_ends_is_not(host: Host) -> None:
    target = host.start("memory", MEMORY_MIB="48", GLIBC_TUNABLES=NO_RSEQ)
    slowly = dataclasses.replace(OPTIONS, precopy_bytes_per_s=8 << 20)
    frozen: list[Frozen] = []
    image = MemoryImage()
    cut = Cut(captured=looked_at(target.pid, frozen))
    how = host.capture(target.pid, image, cut, slowly).engine_facts["stop"]
    assert how["held_back_s"] > 0.5
    assert not how["hurried"]
    frozen[0].assert_equal(image)
    ends = dataclasses.replace(slowly, precopy_bytes_per_s=1 << 20, kill=True)
    how = host.capture(target.pid, MemoryImage(), Cut(), ends).engine_facts["stop"]
    assert (how["path"], how["held_back_s"]) == ("precopy", 0)


def test_what_is_read_past_the_page_cache_meanwhile_is_stored_as_it_came(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protected, "_DIRECT_S", 20.0)  # the disk may be busy
    monkeypatch.setattr(precopy, "_LET_GO_S", 20.0)
    (tmp_path / "read").write_bytes(random.Random(1).randbytes(4 << 20))
    script = (
        "import mmap, os, random, sys, threading, time\n"
        "area = memoryview(mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))\n"
        "area[:] = b'x' * len(area)\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)\n"
        "def read():\n"
        "    while True:\n"
        "        at = random.randrange(500) << 16\n"
        "        os.preadv(fd, [area[at:at + (1 << 16)]], random.randrange(60) << 16)\n"
        "        time.sleep(0.01)\n"
        "for _ in range(3): threading.Thread(target=read).start()\n"
        "print('stands', flush=True)\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "read")],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"GLIBC_TUNABLES": NO_RSEQ},
    )
    host.popens.append(reader)
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"stands\n"
    for _ in range(4):
        image = MemoryImage()
        frozen: list[Frozen] = []
        cut = Cut(captured=looked_at(reader.pid, frozen))
        how = host.capture(reader.pid, image, cut, OPTIONS).engine_facts["stop"]
        assert (how["path"], how["tracked"]) == ("precopy", {"write-protect": 1}), how
        frozen[0].assert_equal(image)


def test_what_can_be_written_behind_the_page_table_is_not_tracked(host: Host) -> None:
    """Asynchronous I/O: a device may write to memory while no page looks written."""
    target = host.start("memory", MEMORY_MIB="48", GLIBC_TUNABLES=NO_RSEQ)
    script = (
        "import ctypes, mmap, time\n"
        "area = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "area[:] = b'x' * len(area)\n"
        "ctypes.CDLL(None).syscall(206, 1, ctypes.byref(ctypes.c_ulong()))\n"
        "print('stands', flush=True)\n"
        "time.sleep(1000)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"GLIBC_TUNABLES": NO_RSEQ},
    )
    host.popens.append(other)
    assert other.stdout is not None
    other.stdout.readline()
    for pid, kind in ((target.pid, "write-protect"), (other.pid, "none")):
        image = MemoryImage()
        frozen: list[Frozen] = []
        cut = Cut(captured=looked_at(pid, frozen))
        how = host.capture(pid, image, cut, OPTIONS).engine_facts["stop"]
        assert how["tracked"] == {kind: 1}, how
    # Nothing of a copy made ahead was believed.
    assert how["untracked_because"] == [f"process {other.pid}: it uses asynchronous I/O"]
    assert how["read_at_cut_bytes"] >= 32 << 20
    frozen[0].assert_equal(image)
