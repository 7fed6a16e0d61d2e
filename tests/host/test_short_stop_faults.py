"""Whatever dies, fails or changes while a short stop is made: the job runs on with nothing of the
agent's in it, and what is stored is what it held, or nothing is.

Every fault is planned, and each test asserts that it was met.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.base import CaptureOptions
from agent.engines.criu import preflight
from agent.host import cgroups, injection, proc
from agent.model.streams import AddressSpace, PageRun
from tests.conftest import NOT_TO_BE_HAD
from tests.host import test_faults
from tests.host.conftest import Cut, Host, Target
from tests.host.image import MemoryImage
from tests.host.test_faults import STAGES, Spoiled, at_stage, kill_criu
from tests.host.test_short_stop import NO_RSEQ, OPTIONS, Frozen, looked_at

FEATURES = ("memory", "threads", "children", "tcp", "shared_memory")


class Drafted(Spoiled):
    """Lets something happen at the n-th draft, too."""

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        self._call("draft")
        super().draft(space, runs, data)

    def settle(self, space: AddressSpace, runs: Sequence[PageRun]) -> None:
        self._call("settle")
        super().settle(space, runs)


def tracked(root: int) -> list[str]:
    """What of the tree the kernel still watches for somebody (proc_pid_smaps(5): uw, um)."""
    flags = (f"{path}: {line}" for pid in proc.tree(root) for path, line in _flags(pid))
    return [each for each in flags if {"uw", "um"} & set(each.split())]


def _flags(pid: int) -> Iterator[tuple[str, str]]:
    path = f"/proc/{pid}/smaps"
    for line in Path(path).read_text().splitlines():
        if line.startswith("VmFlags:"):
            yield path, line


def assert_unharmed(host: Host, target: Target) -> None:
    """The tree runs, nothing is left in it, and the next short stop holds what it held."""
    host.assert_running(target)
    assert tracked(target.pid) == []
    frozen: list[Frozen] = []
    image = MemoryImage()
    cut = Cut(captured=looked_at(target.pid, frozen))
    how = host.capture(target.pid, image, cut, OPTIONS).engine_facts["stop"]
    assert how["path"] == "precopy", how
    frozen[0].assert_equal(image)
    host.assert_running(target)
    host.assert_clean()


def test_criu_killed_at_each_stage(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    target = host.start(*FEATURES, MEMORY_MIB="48", GLIBC_TUNABLES=NO_RSEQ)

    def kill() -> None:
        assert tracked(target.pid)
        kill_criu(host)

    for stage in STAGES:
        with monkeypatch.context() as patch:
            met = at_stage(patch, stage, kill)
            with pytest.raises(errors.ShortStopFailed, match="signal 9"):
                host.capture(target.pid, MemoryImage(), options=OPTIONS)
            assert met == [stage]
        host.assert_running(target)
    assert_unharmed(host, target)


def run_dying_agent(host: Host, target: Target, stage: str = "", group: str = "") -> None:
    test_faults.run_dying_agent(host, target, OPTIONS, stage, sink=Drafted, group=group)
    # CRIU notices by itself that its agent is gone, and the kernel that nobody is told any more.
    deadline = time.monotonic() + 30
    while any(proc.status(pid).tracer_pid for pid in proc.tree(target.pid)):
        assert time.monotonic() < deadline, "the tree stays frozen"
        time.sleep(0.01)


def test_agent_killed_at_each_stage(host: Host) -> None:
    """While it copies ahead, when CRIU has started, in the stop, and when the job runs again."""
    target = host.start(*FEATURES, MEMORY_MIB="48", GLIBC_TUNABLES=NO_RSEQ)
    for stage in ("draft:1", "draft:8", *STAGES, "captured", "settle:1", "metadata:1"):
        run_dying_agent(host, target, stage)
        host.assert_running(target)
        assert tracked(target.pid) == [], stage
    assert_unharmed(host, target)


class MemoryGroup:
    """A control group of the memory controller."""

    def __init__(self) -> None:
        found = [Path(each) for each in cgroups.directories(os.getpid())]
        one = [each for each in found if (each / "memory.limit_in_bytes").exists()]
        two = [each for each in found if (each / "memory.max").exists()]
        if not one + two:
            pytest.skip(f"{NOT_TO_BE_HAD}a memory controller")
        parent = (one + two)[0]
        self.path = parent / f"ckpt-test-{secrets.token_hex(4)}"
        self.path.mkdir()
        self._limit, self._used, self._met = "limit_in_bytes", "usage_in_bytes", "failcnt"
        if not one:
            self._limit, self._used, self._met = "max", "current", "events"

    def limit(self, size_bytes: int) -> None:
        (self.path / f"memory.{self._limit}").write_text(str(size_bytes))

    def used_bytes(self) -> int:
        return int((self.path / f"memory.{self._used}").read_text())

    def met(self) -> bool:
        """Whether the limit was reached; the numbers, or the one, of how often."""
        words = (self.path / f"memory.{self._met}").read_text().split()
        return int(words[words.index("max") + 1 if "max" in words else 0]) > 0

    def close(self) -> None:
        for pid in cgroups.members(str(self.path)):
            (self.path.parent / "cgroup.procs").write_text(str(pid))
        self.path.rmdir()


@pytest.fixture
def memory_group() -> Iterator[MemoryGroup]:
    made = MemoryGroup()
    try:
        yield made
    finally:
        made.close()


def test_an_agent_that_runs_out_of_memory_leaves_the_job_running(
    host: Host, memory_group: MemoryGroup
) -> None:
    """Here it keeps what it copies ahead, which is more than it may have."""
    target = host.start("memory", "threads", MEMORY_MIB="192", GLIBC_TUNABLES=NO_RSEQ)
    memory_group.limit(128 << 20)
    run_dying_agent(host, target, group=str(memory_group.path))
    assert memory_group.met()
    assert_unharmed(host, target)


def test_a_job_at_the_limit_of_its_memory_goes_on(host: Host, memory_group: MemoryGroup) -> None:
    enter = f'echo $$ > {memory_group.path}/cgroup.procs && exec "$@"'
    target = host.start(
        "memory",
        "threads",
        under=("sh", "-c", enter, "sh"),
        MEMORY_MIB="48",
        GLIBC_TUNABLES=NO_RSEQ,
    )
    memory_group.limit(memory_group.used_bytes() + (4 << 20))
    # A file's pages fill up what is left, so that everything new must take their place.
    cached = [
        "dd",
        "if=/dev/zero",
        f"of={host.folder}/cached",
        "bs=64k",
        "count=256",
        "status=none",
    ]
    subprocess.run(["sh", "-c", enter, "sh", *cached], check=True, timeout=60)
    assert memory_group.met()
    for _ in range(2):
        assert_unharmed(host, target)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Host]:
    """An engine whose local disk has room for little."""
    host = Host(tmp_path)
    host.work.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m,mode=700", "tmpfs", str(host.work)]
    subprocess.run(mount, check=True)
    try:
        yield host
    finally:
        host.close()
        subprocess.run(["umount", "--lazy", str(host.work)], check=True)


def fill(folder: Path, but_bytes: int = 0) -> None:
    """Leave no more of the disk free."""
    found = os.statvfs(folder)
    with open(folder / "filling", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - but_bytes)


def test_a_disk_that_is_full_in_the_stop_costs_a_longer_one(small_disk: Host) -> None:
    """What the disk cannot take goes to the store while the job stands still."""
    host = small_disk
    target = host.start("memory", MEMORY_MIB="48", GLIBC_TUNABLES=NO_RSEQ)
    os.kill(target.pid, signal.SIGSTOP)  # all of it is read in the stop then
    frozen: list[Frozen] = []

    # CRIU's descriptions find room.
    fill(host.work, 8 << 20)
    image = MemoryImage()
    options = CaptureOptions(precopy=True, held_bytes=1 << 20)
    cut = Cut(captured=looked_at(target.pid, frozen))
    how = host.capture(target.pid, image, cut, options).engine_facts["stop"]
    (host.work / "filling").unlink()
    assert how["path"] == "precopy", how
    assert how["spooled_bytes"] < 8 << 20
    assert how["read_at_cut_bytes"] > 24 << 20
    frozen[0].assert_equal(image)
    os.kill(target.pid, signal.SIGCONT)
    assert_unharmed(host, target)


def test_a_disk_without_room_for_a_description_gives_the_dump_up(small_disk: Host) -> None:
    host = small_disk
    target = host.start(*FEATURES, MEMORY_MIB="48", GLIBC_TUNABLES=NO_RSEQ)
    with pytest.raises(errors.CkptError):
        host.capture(target.pid, MemoryImage(), Cut(frozen=lambda: fill(host.work)), OPTIONS)
    (host.work / "filling").unlink()
    assert_unharmed(host, target)


# Forks on SIGUSR1, and starts itself anew on SIGUSR2; says so by a file. The signals come at any
# moment, so the work is done by a loop.
_CHANGING = """
import mmap, os, signal, sys, time
folder, number = sys.argv[1], int(sys.argv[2])
area = mmap.mmap(-1, 24 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(area), 4096): area[at:at + 8] = (number << 40 | at).to_bytes(8, "little")
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append("fork"))
signal.signal(signal.SIGUSR2, lambda *_: asked.append("exec"))
open(f"{folder}/{number}", "w").close()
while True:
    if not asked:
        time.sleep(0.002)
    elif asked.pop() == "fork":
        if os.fork() == 0:
            area[:4096] = bytes(4096)
            open(f"{folder}/{number + 1}", "w").close()
            while True: time.sleep(1000)
        number += 1
    else:
        os.execv(sys.executable, [sys.executable, "-c", sys.argv[3], folder, str(number + 1), sys.argv[3]])
"""  # noqa: E501


class Changing:
    """It, running. ``change`` returns when it has done so."""

    def __init__(self, host: Host) -> None:
        self._folder = host.folder / "changing"
        self._folder.mkdir()
        self._number = 0
        argv = [sys.executable, "-c", _CHANGING, str(self._folder), "0", _CHANGING]
        self.pid = host.popen(argv, {"GLIBC_TUNABLES": NO_RSEQ}).pid
        self._wait()

    def change(self, number: int) -> None:
        self._number += 1
        os.kill(self.pid, number)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while not (self._folder / str(self._number)).exists():
            assert time.monotonic() < deadline, "it does not change"
            time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_process_that_forks_or_starts_another_program_in_each_phase_is_stored_as_it_is(
    host: Host, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    job = Changing(host)

    def change() -> None:
        job.change(number)

    for phase in ("draft:1", "draft:4", "pre-dump"):
        kind, _, at = phase.partition(":")
        image = Drafted(kind, int(at or 0), change)
        frozen: list[Frozen] = []
        cut = Cut(captured=looked_at(job.pid, frozen))
        with monkeypatch.context() as patch:
            met: list[Any] = at_stage(patch, phase, change)
            how = host.capture(job.pid, image, cut, OPTIONS).engine_facts["stop"]
            assert met or image.met == 1
        assert how["path"] == "precopy", how
        frozen[0].assert_equal(image)
    assert tracked(job.pid) == []
    host.assert_clean()


def test_who_executes_another_program_just_before_it_is_stopped_for_a_call_goes_on(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Changing(host)
    stopped = injection._stopped
    changed: list[int] = []

    def later(pid: int) -> contextlib.AbstractContextManager[object]:
        if not changed:
            changed.append(pid)
            job.change(signal.SIGUSR2)
        return stopped(pid)

    monkeypatch.setattr(injection, "_stopped", later)
    os.close(injection.userfaultfd(proc.identity(job.pid)).descriptor)
    assert changed
    job.change(signal.SIGUSR2)
    host.assert_clean()


# Has what is missing in a mapping of its own filled by a thread, one page whenever it is asked.
_FILLING = """
import ctypes, fcntl, mmap, os, select, struct, sys, threading, time
folder, size = sys.argv[1], 4 << 20
def mapped(size): return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
large, own, page = mapped(24 << 20), mapped(size), mapped(4096)
large[:], page[:] = b"x" * len(large), b"f" * 4096
at, source = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (own, page))
libc = ctypes.CDLL(None)
fd = libc.syscall(323, os.O_CLOEXEC)  # userfaultfd
fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))  # UFFDIO_API
fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("QQQQ", at, size, 1, 0)))  # UFFDIO_REGISTER
def fill():
    while True:
        address = struct.unpack_from("Q", os.read(fd, 32), 16)[0] & ~4095
        fcntl.ioctl(fd, 0xC028AA03, bytearray(struct.pack("QQQQq", address, source, 4096, 0, 0)))
threading.Thread(target=fill, daemon=True).start()
for number in range(size // 4096):
    open(f"{folder}/{number}", "w").close()
    while not os.path.exists(f"{folder}/touch-{number}"): time.sleep(0.005)
    if libc.memcmp(*map(ctypes.c_void_p, (at + number * 4096, source)), 4096): break
"""


def test_a_job_that_fills_memory_of_its_own_by_userfaultfd_is_not_disturbed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU has no way to store that: the dump fails, late if the job was looked at before it
    began.
    """
    folder = host.folder / "filling"
    folder.mkdir()
    pid = host.popen([sys.executable, "-c", _FILLING, str(folder)]).pid

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + 20
        while not (folder / str(number)).exists():
            assert time.monotonic() < deadline, "nothing fills it"
            time.sleep(0.005)

    wait_for(0)
    before = tracked(pid)
    assert len(before) == 1
    with pytest.raises(errors.TargetUnsuitable, match="uses userfaultfd"):
        host.capture(pid, MemoryImage(), options=OPTIONS)
    monkeypatch.setattr(preflight, "refuse_userfaultfds", lambda pid: None)
    monkeypatch.setattr(preflight, "refuse_filled", lambda pid, flags: None)
    for number in range(2):
        image = Drafted("draft", 1, lambda: (folder / f"touch-{number}").touch())  # noqa: B023
        with pytest.raises(errors.ShortStopFailed, match="userfaultfd"):
            host.capture(pid, image, options=OPTIONS)
        assert image.met == 1
        wait_for(number + 1)
    assert tracked(pid) == before
    host.assert_clean()
