"""Shared memory in the short stop: copied while the job runs, found again by its content."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from agent.engines.base import CaptureOptions, Kept, RestoreOptions
from agent.engines.criu import hiding
from agent.engines.tracking import shared
from agent.host import proc
from agent.model.streams import PAGE_BYTES, AddressSpace
from tests.host.conftest import Cut, Gate, Host
from tests.host.image import MemoryImage

# Three objects: one mapped, written through its descriptor as well, and by a child through mappings
# that come and go; one that is shared with the child without a name; one that is only open, and has
# a hole. The size of the first is not that of whole pages.
_PROGRAM = """
import mmap, os, random, sys
M = 1 << 20
mapped, opened = os.memfd_create("mapped"), os.memfd_create("opened")
os.ftruncate(mapped, 24 * M + 100)
area = mmap.mmap(mapped, 24 * M)
nameless = mmap.mmap(-1, 8 * M)
for held in (area, nameless): held[:] = random.randbytes(len(held))
os.pwrite(mapped, b"end", 24 * M + 97)
os.pwrite(opened, random.randbytes(M), 0)
os.pwrite(opened, random.randbytes(M), 3 * M)
child = os.fork()
open(sys.argv[1] + (".child" if child == 0 else ""), "w").close()
while True:
    at = random.randrange(24 * M - 8)
    if child == 0:
        passing = mmap.mmap(mapped, 24 * M)
        passing[at:at + 8] = random.randbytes(8)
        passing.close()
        nameless[at // 4] = at & 255
    else:
        os.pwrite(mapped, random.randbytes(8), at)
        os.pwrite(opened, random.randbytes(8), random.choice((0, 3 * M)) + at % (M - 8))
        area[at] = at & 255
"""
_QUIET = """
import mmap, os, random, signal, sys
mapped = os.memfd_create("mapped")
os.pwrite(mapped, random.randbytes(32 << 20), 0)
area = mmap.mmap(mapped, 32 << 20)
sum(area[::4096])
signal.signal(signal.SIGUSR1, lambda *_: os.pwrite(mapped, b"written", 5 << 20))
open(sys.argv[1], "w").close()
open(sys.argv[1] + ".child", "w").close()
while True: signal.pause()
"""
# Each time it is asked the first page becomes what it was before.
_TURNING = """
import mmap, os, random, signal, sys
mapped = os.memfd_create("mapped")
os.pwrite(mapped, random.randbytes(32 << 20), 0)
area = mmap.mmap(mapped, 32 << 20)
sum(area[::4096])
pages = [area[:4096], random.randbytes(4096)]
def turn(*_):
    pages.reverse()
    area[:4096] = pages[0]
signal.signal(signal.SIGUSR1, turn)
open(sys.argv[1], "w").close()
open(sys.argv[1] + ".child", "w").close()
while True: signal.pause()
"""
# Below everything else, so that CRIU finds it first.
_WORKPLACE = """
import ctypes, os, random, signal, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 5]
mapped = os.memfd_create("code")
os.pwrite(mapped, random.randbytes(32 << 20), 0)
# Read, written, executed; MAP_SHARED | MAP_FIXED | MAP_POPULATE.
assert libc.mmap(1 << 24, 32 << 20, 7, 0x8011, mapped, 0) == 1 << 24
open(sys.argv[1], "w").close()
open(sys.argv[1] + ".child", "w").close()
while True: signal.pause()
"""


def objects(root: int) -> dict[AddressSpace, bytes]:
    """What the tree's shared memory holds, holes as zeros, read by nothing of the agent's."""
    found = {}
    for pid in proc.tree(root):
        folder = f"/proc/{pid}/fd"
        paths = [f"{folder}/{name}" for name in os.listdir(folder)]
        folder = f"/proc/{pid}/map_files"
        paths += [f"{folder}/{name}" for name in os.listdir(folder)]
        for path in paths:
            if os.readlink(path).startswith(("/memfd:", "/dev/zero", "/SYSV")):
                with open(path, "rb", 0) as file:
                    number = os.fstat(file.fileno()).st_ino
                    size_bytes = os.fstat(file.fileno()).st_size
                    content = os.pread(file.fileno(), size_bytes, 0)
                    found[AddressSpace("shmem", number)] = content
    return found


def stored(image: MemoryImage, space: AddressSpace, size_bytes: int) -> bytes:
    """What the image has of it."""
    content = bytearray(-(-size_bytes // PAGE_BYTES) * PAGE_BYTES)
    for run, data in image.runs_of.get(space, []):
        content[run.address : run.address + len(data)] = data
    return bytes(content[:size_bytes])


def started(host: Host, program: str, tmp_path: Path) -> int:
    ready = tmp_path / "ready"
    pid = host.popen([sys.executable, "-c", program, str(ready)]).pid
    deadline = time.monotonic() + 20
    while not (ready.exists() and ready.with_suffix(".child").exists()):
        assert time.monotonic() < deadline, "it did not start"
        time.sleep(0.01)
    return pid


def captured(
    host: Host, pid: int, image: MemoryImage, kept: Kept
) -> tuple[dict[AddressSpace, bytes], int]:
    """Capture; what the objects held when all of them had been read, and how many bytes of them
    were not as they had been drafted.
    """
    seen: list[dict[AddressSpace, bytes]] = []
    cut = Cut(captured=lambda: seen.append(objects(pid)))
    options = CaptureOptions(precopy=True, kept=kept)
    how = host.capture(pid, image, cut, options).engine_facts["stop"]
    assert how["path"] == "precopy", how
    (held,) = seen
    for space, content in held.items():
        assert stored(image, space, len(content)) == content
    return held, how["shared_read_at_cut_bytes"]


def test_what_is_stored_of_shared_memory_is_what_it_held_when_the_tree_stood_still(
    host: Host, tmp_path: Path
) -> None:
    job = started(host, _PROGRAM, tmp_path)
    with Kept() as kept:
        image = MemoryImage()
        captured(host, job, image, kept)
        for number in range(3):
            kept.committed(str(number))
            image = MemoryImage((str(number), image))
            held, read_bytes = captured(host, job, image, kept)
            assert sorted(map(len, held.values())) == [4 << 20, 8 << 20, (24 << 20) + 100]
            assert read_bytes > 0
            # A hole is no page of zeros.
            assert len([space for space in held if _bytes(image, space) == 2 << 20]) == 1
    host.assert_clean()
    _end(host, job)
    seen: list[dict[AddressSpace, bytes]] = []
    host.restore(image, RestoreOptions(), Gate(restored=lambda: seen.append(objects(job))))
    # CRIU still has shared memory of its own there.
    assert set(held.values()) <= set(seen[0].values())


def test_only_what_was_written_is_read_again_whoever_wrote_it(host: Host, tmp_path: Path) -> None:
    job = started(host, _QUIET, tmp_path)
    with Kept() as kept:
        image = MemoryImage()
        _, read_bytes = captured(host, job, image, kept)
        assert image.drafted_bytes >= 32 << 20
        assert read_bytes == 0
        kept.committed("one")
        os.kill(job, signal.SIGUSR1)
        image = MemoryImage(("one", image))
        captured(host, job, image, kept)
        assert image.drafted_bytes < 16 << 20
    host.assert_clean()


def test_what_was_there_before_an_epoch_of_the_plain_way_is_not_taken_for_what_that_has(
    host: Host, tmp_path: Path
) -> None:
    """As a lock that is free, taken when the epoch is made, and free again."""
    job = started(host, _TURNING, tmp_path)
    with Kept() as kept:
        captured(host, job, MemoryImage(), kept)
        kept.committed("one")
        _turn(job)
        plain = MemoryImage()
        host.capture(job, plain, Cut(), CaptureOptions(kept=kept))
        kept.committed("two")
        _turn(job)
        captured(host, job, MemoryImage(("two", plain)), kept)
    host.assert_clean()


def test_memory_in_which_criu_works_is_stored_as_it_was_before(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It puts system calls into what a process executes: for an instant each, which is waited for
    here.
    """
    job = started(host, _WORKPLACE, tmp_path)
    read = shared._read

    def read_late(descriptor: int, into: memoryview, offset: int) -> None:
        read(descriptor, into, offset)
        before, until_s = bytes(into[:64]), time.monotonic() + 0.5
        while not offset and into[:64] == before and time.monotonic() < until_s:
            os.preadv(descriptor, [into[:64]], 0)

    seen: list[dict[AddressSpace, bytes]] = []

    def at_captured() -> None:
        seen.append(objects(job))

    def at_frozen() -> None:
        monkeypatch.setattr(shared, "_read", read_late)

    image, options = MemoryImage(), CaptureOptions(precopy=True)
    how = host.capture(job, image, Cut(at_frozen, at_captured), options).engine_facts["stop"]
    assert how["path"] == "precopy", how
    ((space, content),) = seen[0].items()
    assert stored(image, space, len(content)) == content
    host.assert_clean()


def test_objects_that_criu_sends_after_all_are_stored_once(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU's next version may ask in another way."""
    monkeypatch.setattr(hiding.Hiding, "_of_an_object", lambda self, call: None)
    job = started(host, _QUIET, tmp_path)
    with Kept() as kept:
        captured(host, job, MemoryImage(), kept)


def _turn(job: int) -> None:
    before = objects(job)
    os.kill(job, signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while objects(job) == before:
        assert time.monotonic() < deadline, "nothing was written"


def _bytes(image: MemoryImage, space: AddressSpace) -> int:
    return sum(len(data) for _, data in image.runs_of.get(space, []))


def _end(host: Host, root: int) -> None:
    """End the tree, until its numbers are free."""
    pids = proc.tree(root)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)
    for popen in host.popens:
        if popen.pid == root:
            popen.wait()
    deadline = time.monotonic() + 10
    while any(proc.exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "the tree does not end"
        time.sleep(0.01)
