"""Another process writes to memory while that is copied ahead, past the page table."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator

import pytest

from agent.engines.criu.held import HeldSink
from agent.engines.tracking import precopy
from agent.engines.tracking.precopy import Precopy
from agent.engines.tracking.quiet import Quiet
from agent.host import clock, pins, proc
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun
from tests.host.image import MemoryImage
from tests.host.mappings import Program, copied
from tests.host.slowfile import SIZE_BYTES, SlowFile

# The kernel gets hold of all pages that it is to write to, and then waits for the first byte.
_WRITER = """
import ctypes, mmap, os, sys
path, pid, to, size_bytes = sys.argv[1], *map(int, sys.argv[2:])
source = mmap.mmap(os.open(path, os.O_RDONLY), size_bytes, access=mmap.ACCESS_COPY)
at = ctypes.addressof(ctypes.c_char.from_buffer(source))
local, remote = (ctypes.c_size_t * 2)(at, size_bytes), (ctypes.c_size_t * 2)(to, size_bytes)
wrote = ctypes.CDLL(None).process_vm_writev(pid, local, 1, remote, 1, 0)
sys.exit(wrote != size_bytes)
"""
_AT, _MIB = 4, SIZE_BYTES >> 20


class Writer:
    """Writes to ``program`` what ``source`` brings."""

    def __init__(self, program: Program, source: SlowFile) -> None:
        self._source = source
        to = program.room + (_AT << 20)
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _WRITER, source.path, *map(str, (program.pid, to, SIZE_BYTES))]
        )
        self.pid = self._popen.pid
        assert source.asked.wait(20), "it does not write"

    def through(self) -> None:
        """Let it write and end."""
        deadline = clock.Deadline.after(20)
        while self._popen.poll() is None:
            self._source.answer()
            deadline.check("the writer")
            time.sleep(0.001)
        assert self._popen.returncode == 0

    def close(self) -> None:
        """End it, whatever it waits for."""
        self._popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(0.1)
        self._source.answer()
        self._popen.wait(20)


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    try:
        made.do("map(2, 16)")
        made.do("fill(2, 16, 1)")
        yield made
    finally:
        made.close()


@pytest.fixture
def source(tmp_path: pathlib.Path) -> Iterator[SlowFile]:
    made = SlowFile(tmp_path, b"Z")
    try:
        yield made
    finally:
        made.close()


def cut(copy: Precopy, program: Program, image: MemoryImage) -> None:
    """As at the stop; every page is as the program then has it."""
    program.stop()
    copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
    assert copied(image, program, 2, 16) == program.first_bytes(2, 16)


@pytest.fixture
def image() -> MemoryImage:
    return MemoryImage()


@pytest.fixture
def copy(program: Program, image: MemoryImage) -> Iterator[Precopy]:
    """After its first round."""
    with contextlib.closing(Precopy(image, clock.Deadline.after(60))) as made:
        made.round(program.pid)
        yield made


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if somebody on the host had hold of a page for good."""
    monkeypatch.setattr(pins.Pins, "none", lambda _, deadline: False)


def only(monkeypatch: pytest.MonkeyPatch, *pids: int) -> None:
    """Let there be these processes: whoever runs tests may not look at all of this host's."""
    monkeypatch.setattr(proc, "pids", lambda: list(pids))


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("rested", [0, 2])
def test_what_another_process_is_about_to_write_is_not_taken_for_read(
    program: Program, source: SlowFile, copy: Precopy, image: MemoryImage, rested: int, last: int
) -> None:
    with contextlib.closing(Writer(program, source)) as writer:
        for _ in range(rested):
            copy.round(program.pid, rested=True)
        for _ in range(last):
            copy.round(program.pid, into=HeldSink(image, 0))
        writer.through()
    cut(copy, program, image)
    assert program.first_bytes(_AT, _MIB) == b"Z" * (SIZE_BYTES // PAGE_BYTES)
    assert "may be writing to the memory of others" in copy.unread_because


def test_what_another_process_has_written_is_read_ahead(
    program: Program,
    source: SlowFile,
    copy: Precopy,
    image: MemoryImage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.closing(Writer(program, source)) as writer:
        copy.round(program.pid, into=HeldSink(image, 0))
        writer.through()
    # The machine may be busy, and others on it have hold of pages now and then.
    monkeypatch.setattr(precopy, "_LET_GO_QUICKLY_S", 20.0)
    copy.round(program.pid, into=HeldSink(image, 0))
    cut(copy, program, image)
    assert copy.cut_bytes < SIZE_BYTES
    assert copy.unread_because == ""


def test_what_is_written_after_the_stop_is_in_the_next_image(
    program: Program, source: SlowFile, copy: Precopy, image: MemoryImage
) -> None:
    with contextlib.closing(Writer(program, source)) as writer:
        copy.round(program.pid, into=HeldSink(image, 0))
        cut(copy, program, image)
        writer.through()
    os.kill(program.pid, signal.SIGCONT)
    copied_before = MemoryImage()
    space = AddressSpace("process", program.pid)
    for page, data in sorted(image.drafts[space].items()):
        copied_before.pages(space, PageRun(page, 1, 0), memoryview(data))
    after = MemoryImage(("one", copied_before))
    copy.begin(after, clock.Deadline.after(60), "one")
    copy.round(program.pid)
    cut(copy, program, after)
    assert program.first_bytes(_AT, _MIB) == b"Z" * (SIZE_BYTES // PAGE_BYTES)


@pytest.mark.usefixtures("pinned")
def test_where_others_hold_pages_for_good_those_who_may_write_are_looked_at(
    program: Program,
    source: SlowFile,
    copy: Precopy,
    image: MemoryImage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precopy, "_LET_GO_S", 2.0)  # all are looked at, on a busy machine as well
    with contextlib.closing(Writer(program, source)) as writer:
        only(monkeypatch, program.pid, writer.pid)
        copy.round(program.pid, into=HeldSink(image, 0))
        writer.through()
    copy.round(program.pid)
    with contextlib.closing(Writer(program, source)) as writer:
        only(monkeypatch, program.pid, writer.pid)
        copy.round(program.pid, into=HeldSink(image, 0))
        copy.round(program.pid, rested=True)
        writer.through()
    cut(copy, program, image)
    assert SIZE_BYTES <= copy.cut_bytes < 2 * SIZE_BYTES
    assert copy.unread_because.startswith(f"process {writer.pid} ")


@pytest.mark.usefixtures("pinned")
def test_who_computes_outside_the_tree_and_may_write_leaves_all_for_the_stop(
    program: Program, copy: Precopy, image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precopy, "_LET_GO_S", 2.0)  # all are looked at, on a busy machine as well
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            only(monkeypatch, program.pid, busy.pid)
            program.do("fill(2, 8, 2)")
            for _ in range(2):
                copy.round(program.pid, rested=True)
            cut(copy, program, image)
        finally:
            busy.kill()
    assert copy.cut_bytes >= 8 << 20
    assert copy.unread_because.startswith(f"process {busy.pid} ")


# Becomes another user of a user namespace that belongs to user 1000.
_OWNED = """
import ctypes, os
os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
assert ctypes.CDLL(None).unshare(0x10000000) == 0
print("up", flush=True)
input()
os.setgid(0); os.setuid(0)
print("up", flush=True)
input()
"""
_OWNER = """
import os
os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
print("up", flush=True)
while True: pass
"""


@pytest.mark.usefixtures("pinned")
def test_whom_a_tree_s_user_namespace_belongs_to_may_write_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.ExitStack() as stack:
        started = []
        for script in (_OWNED, _OWNER):
            command = [sys.executable, "-c", script]
            popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(popen)
            stack.callback(popen.kill)
            assert popen.stdout is not None
            assert popen.stdout.readline() == b"up\n"
            started.append(popen)
        target, owner = started
        assert target.stdin is not None
        assert target.stdout is not None
        for name in ("uid_map", "gid_map"):
            pathlib.Path(f"/proc/{target.pid}/{name}").write_text("0 100000 1")
        target.stdin.write(b"\n")
        target.stdin.flush()
        assert target.stdout.readline() == b"up\n"
        assert proc.status(target.pid).uid != proc.status(owner.pid).uid
        only(monkeypatch, target.pid, owner.pid)
        asked = Quiet()
        assert not asked.since_now([target.pid], clock.Deadline.after(2))
        assert asked.doubt.startswith(f"process {owner.pid} ")


@pytest.mark.usefixtures("pinned")
def test_a_tree_that_computes_is_seen_to_write_to_nobody(
    program: Program, copy: Precopy, image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, program.pid)
    monkeypatch.setattr(precopy, "_LET_GO_QUICKLY_S", 20.0)  # the machine may be busy
    program.do("threading.Thread(target=exec, args=('while True: pass',)).start()")
    program.do("fill(2, 8, 2)")
    copy.round(program.pid, into=HeldSink(image, 0))
    cut(copy, program, image)
    assert copy.cut_bytes < 8 << 20


def test_what_is_waited_for_in_vain_in_a_round_is_hardly_waited_for_by_the_other_processes(
    program: Program, image: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.do("len([os.fork() or time.sleep(1000) for _ in range(2)])")
    waited_s: list[float] = []

    def since_now(_: Quiet, __: Collection[int], deadline: clock.Deadline) -> bool:
        waited_s.append(deadline.remaining_s)
        return False

    monkeypatch.setattr(Quiet, "since_now", since_now)
    monkeypatch.setattr(precopy, "_LET_GO_S", 20.0)
    with contextlib.closing(Precopy(image, clock.Deadline.after(60))) as made:
        made.round(program.pid, rested=True)
        assert not waited_s
        for _ in range(2):
            made.round(program.pid, rested=True)
            first_s, *others_s = waited_s
            assert first_s > 10
            assert len(others_s) == 2
            assert max(others_s) <= precopy._LET_GO_AGAIN_S
            waited_s.clear()


def test_pins_are_seen_while_somebody_has_hold_of_pages(program: Program, source: SlowFile) -> None:
    asked = pins.Pins()
    assert asked.none(clock.Deadline.after(20)), asked.hindrance
    with contextlib.closing(Writer(program, source)) as writer:
        assert not asked.none(clock.Deadline.after(0.2))
        writer.through()
    assert asked.none(clock.Deadline.after(20))
