"""What is kept of a tree between two captures."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from agent.engines.base import CaptureOptions, Kept
from agent.engines.criu import hiding
from agent.engines.criu.shortstop import ShortStop
from agent.engines.tracking.precopy import Precopy
from agent.host import clock
from tests.host.conftest import Cut, Host, Target
from tests.host.image import MemoryImage
from tests.host.test_short_stop import Frozen, looked_at

# The kernel writes a thread's number into its rseq area whenever it goes on: that is the one thing
# that differs between two looks at a tree that stands still.
NO_RSEQ = "glibc.pthread.rseq=0"
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


def test_what_was_kept_is_let_go_of_when_the_next_capture_cannot_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(hiding, "Hiding", fails)
    before = threading.active_count()
    image, deadline = MemoryImage(), clock.Deadline.after(60)
    with Kept() as kept:
        kept.keep(os.getpid(), Precopy(image, deadline))
        kept.committed("one")
        with pytest.raises(OSError, match="too many"):
            ShortStop(os.getpid(), image, image, deadline, CaptureOptions(kept=kept))
    assert threading.active_count() == before
