"""What is kept of a tree between two captures."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.engines.base import CaptureOptions, Kept
from agent.engines.criu import hiding, shortstop
from agent.engines.criu.held import HeldSink
from agent.engines.criu.shortstop import ShortStop
from agent.engines.tracking.precopy import Precopy
from agent.host import clock
from agent.model import ids
from agent.node import dump as node_dump
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests.host.conftest import Cut, Host, Target
from tests.host.image import MemoryImage
from tests.host.test_short_stop import NO_RSEQ, Frozen, looked_at

MEMORY_MIB = "48"


def captured(
    host: Host, target: Target, kept: Kept, before: tuple[str, MemoryImage] | None
) -> tuple[MemoryImage, int]:
    """Another image, equal to what the tree held, and how much was read for it."""
    frozen: list[Frozen] = []
    image = MemoryImage(before)
    options = CaptureOptions(precopy=True, kept=kept)
    cut = Cut(captured=looked_at(target.pid, frozen))
    how = host.capture(target.pid, image, cut, options).engine_facts["stop"]
    assert how["path"] == "precopy", how
    frozen[0].assert_equal(image)
    return image, how["read_at_cut_bytes"] + sum(size for size, _ in how["rounds"])


def test_the_next_capture_reads_only_what_was_written_since(host: Host) -> None:
    target = host.start(
        "memory", "threads", "children", MEMORY_MIB=MEMORY_MIB, GLIBC_TUNABLES=NO_RSEQ
    )
    with Kept() as kept:
        image, read_bytes = captured(host, target, kept, None)
        whole_bytes = read_bytes
        assert whole_bytes > 24 << 20
        for number in range(3):
            kept.committed(str(number))
            target.check()  # writes, too
            image, read_bytes = captured(host, target, kept, (str(number), image))
            assert read_bytes < whole_bytes / 4
    host.assert_running(target)
    host.assert_clean()


def test_what_the_new_epoch_does_not_build_on_is_read_whole(host: Host) -> None:
    target = host.start("memory", MEMORY_MIB=MEMORY_MIB, GLIBC_TUNABLES=NO_RSEQ)
    with Kept() as kept:
        image, whole_bytes = captured(host, target, kept, None)
        kept.committed("one")
        _, read_bytes = captured(host, target, kept, ("another", image))
        assert read_bytes > whole_bytes / 2
    host.assert_running(target)
    host.assert_clean()


def test_an_epoch_that_is_captured_the_plain_way_is_built_on(host: Host) -> None:
    """As when one of several members could not be copied ahead, and all are captured again."""
    target = host.start("memory", "threads", MEMORY_MIB=MEMORY_MIB, GLIBC_TUNABLES=NO_RSEQ)
    with Kept() as kept:
        _, whole_bytes = captured(host, target, kept, None)
        kept.committed("one")
        target.check()
        frozen: list[Frozen] = []
        plain = MemoryImage()
        cut = Cut(captured=looked_at(target.pid, frozen))
        host.capture(target.pid, plain, cut, CaptureOptions(kept=kept))
        frozen[0].assert_equal(plain)
        kept.committed("two")
        target.check()
        _, read_bytes = captured(host, target, kept, ("two", plain))
        assert read_bytes < whole_bytes / 4
    host.assert_running(target)
    host.assert_clean()


def test_after_a_capture_that_failed_nothing_is_kept(host: Host) -> None:
    target = host.start("memory", MEMORY_MIB=MEMORY_MIB, GLIBC_TUNABLES=NO_RSEQ)

    def fail() -> None:
        raise RuntimeError("no")

    with Kept() as kept:
        options = CaptureOptions(precopy=True, kept=kept)
        host.capture(target.pid, MemoryImage(), Cut(), options)
        kept.committed("one")
        with pytest.raises(RuntimeError):
            host.capture(target.pid, MemoryImage(), Cut(captured=fail), options)
        assert kept.take(target.pid) is None
    host.assert_running(target)
    host.assert_clean()


# Changes the flags of a mapping whenever it is told to, and says how often it has.
_CHANGING = """
import mmap, os, signal, sys
large = mmap.mmap(-1, 24 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
large[:] = b"x" * len(large)
# No mapping beside it is alike, so that none is joined with it.
area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
times = 0
while True:
    with open(sys.argv[1] + "~", "w") as said: said.write(str(times))
    os.rename(sys.argv[1] + "~", sys.argv[1])
    signal.sigwait([signal.SIGUSR1])
    area.madvise([mmap.MADV_DONTFORK, mmap.MADV_DOFORK][times % 2])
    times += 1
"""


class Changing:
    """That program, running."""

    def __init__(self, host: Host) -> None:
        self._said = host.folder / "times"
        self.job = host.popen([sys.executable, "-c", _CHANGING, str(self._said)])
        self._wait_for(0)

    def change(self) -> None:
        times = int(self._said.read_text())
        self.job.send_signal(signal.SIGUSR1)
        self._wait_for(times + 1)

    def _wait_for(self, times: int) -> None:
        until = time.monotonic() + 20
        while not self._said.exists() or int(self._said.read_text()) < times:
            assert time.monotonic() < until
            time.sleep(0.005)


def test_mappings_that_change_while_what_was_held_is_passed_on_do_not_stop_a_tree_twice(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = Changing(host)
    last_rounds = Precopy.last_rounds

    def overflow(self: Precopy, root: int, sink: HeldSink, between: Callable[[], None]) -> None:
        last_rounds(self, root, sink, between)
        sink.overflowed = True
        changing.change()

    monkeypatch.setattr(Precopy, "last_rounds", overflow)
    host.capture(changing.job.pid, MemoryImage(), options=CaptureOptions(precopy=True))
    assert changing.job.poll() is None
    host.assert_clean()


def test_a_tree_that_changes_its_mappings_all_the_time_is_not_stopped_twice_each_time(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = Changing(host)
    job = changing.job
    about_to_freeze = ShortStop.about_to_freeze

    def change(self: ShortStop) -> None:
        about_to_freeze(self)
        changing.change()

    monkeypatch.setattr(ShortStop, "about_to_freeze", change)
    monkeypatch.setattr(shortstop, "_DOUBTED", 2)
    store = Store.open(DirectoryVolume(str(tmp_path / "store"), create=True), create=True)
    members = [node_dump.Member(ids.member_name("tree"), job.pid)]
    ways = []
    with Kept() as kept:
        for _ in range(5):
            options = CaptureOptions(precopy=True, kept=kept)
            made = node_dump.dump(store, host.engine, ids.group_name("job"), members, options)
            kept.committed(made.epoch.epoch)
            ways.append(made.members[0][1].engine_facts["stop"]["path"])
    assert ways == ["plain", "precopy", "precopy", "plain", "precopy"]
    assert all(each.damage is None for each in store.epochs())
    assert job.poll() is None
    host.assert_clean()


def test_what_was_kept_is_let_go_of_when_the_next_capture_cannot_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(hiding, "Hiding", fails)
    before = set(threading.enumerate())
    image, deadline = MemoryImage(), clock.Deadline.after(60)
    with Kept() as kept:
        kept.keep(os.getpid(), Precopy(image, deadline))
        kept.committed("one")
        with pytest.raises(OSError, match="too many"):
            ShortStop(os.getpid(), image, HeldSink(image, 0), deadline, CaptureOptions(kept=kept))
    assert not set(threading.enumerate()) - before
