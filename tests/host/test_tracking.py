"""What a running process does to its mappings while its writes are noted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from agent.engines.tracking.precopy import Precopy
from agent.host import clock, injection, proc
from agent.host.pagemap import Pagemap
from agent.model.streams import PAGE_BYTES, AddressSpace
from tests.host.image import MemoryImage

# Does each line of its input, and says what came of it. ``move`` answers 0 if it could.
_PROGRAM = """
import ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
P, L, I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.mmap.argtypes = [P, L, I, I, I, ctypes.c_long]
libc.mremap.argtypes = [P, L, L, I, P]
libc.mprotect.argtypes = [P, L, I]
M = 1 << 20
room = libc.mmap(None, 64 * M, 0, 0x22, -1, 0)
def map(at, size): libc.mmap(room + at * M, size * M, 3, 0x32, -1, 0)
def fill(at, size, byte): ctypes.memset(room + at * M, byte, size * M)
def move(at, size, to): return libc.mremap(room + at * M, size * M, size * M, 3, room + to * M) != room + to * M
def protect(at, size, how): libc.mprotect(room + at * M, size * M, how)
def fork(): return os.fork() or time.sleep(1000)
def serve():
    print(room, flush=True)
    for line in sys.stdin: print(int(eval(line) or 0), flush=True)
threading.Thread(target=serve).start()
while True: signal.pause()
"""  # noqa: E501


class Program:
    """The program, running."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid
        self.room = self._said()

    def _said(self) -> int:
        assert self._popen.stdout is not None
        return int(self._popen.stdout.readline())

    def do(self, line: str) -> int:
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()
        return self._said()

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        deadline = clock.Deadline.after(10)
        assert clock.wait_until(lambda: proc.stat(self.pid).state == "T", deadline)

    def first_bytes(self, at: int, size: int) -> bytes:
        """Of each page of ``size`` MiB from ``at``."""
        with open(f"/proc/{self.pid}/mem", "rb", 0) as memory:
            data = os.pread(memory.fileno(), size << 20, self.room + (at << 20))
        return data[::PAGE_BYTES]

    def close(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    try:
        yield made
    finally:
        made.close()


def copied(image: MemoryImage, program: Program, at: int, size: int) -> bytes:
    """As ``Program.first_bytes``, of what was copied last."""
    drafts = image.drafts[AddressSpace("process", program.pid)]
    first = program.room + (at << 20)
    pages = range(first, first + (size << 20), PAGE_BYTES)
    return b"".join(drafts.get(page, b"\0")[:1] for page in pages)


def test_writes_are_noted_though_another_mapping_is_moved_next_to_these(program: Program) -> None:
    """The kernel joins mappings that are alike."""
    image = MemoryImage()
    for line in ("map(2, 4)", "map(20, 4)", "fill(2, 4, 1)"):
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        assert program.do("move(20, 4, 6)") == 0
        program.do("fill(2, 4, 2)")
        copy.round(program.pid)
        program.do("fill(2, 4, 3)")
        program.do("fill(6, 4, 4)")
        program.stop()
        copy.finish(copy.cut([program.pid]), image)
    finally:
        copy.close()
    assert copied(image, program, 2, 8) == program.first_bytes(2, 8)


def test_memory_is_copied_where_it_was_moved_to(program: Program) -> None:
    """Also over what was copied from there before."""
    image = MemoryImage()
    for line in ("map(2, 4)", "map(20, 4)", "fill(2, 4, 1)", "fill(20, 4, 2)"):
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        assert program.do("move(20, 4, 2)") == 0
        for _ in range(2):
            copy.round(program.pid)
        assert program.do("move(2, 4, 30)") == 0
        program.stop()
        copy.finish(copy.cut([program.pid]), image)
        assert copy.cut_bytes >= 4 << 20, "it was not tracked"
    finally:
        copy.close()
    assert copied(image, program, 2, 4) == program.first_bytes(30, 4) == b"\2" * 1024
    assert copied(image, program, 30, 4) == b"\2" * 1024


def test_a_mapping_can_be_moved_whole_though_it_was_protected_in_parts(program: Program) -> None:
    for line in ("map(10, 4)", "map(20, 4)", "fill(10, 4, 1)"):
        program.do(line)
    copy = Precopy(MemoryImage(), clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        program.do("protect(12, 2, 0)")
        # Next to the first of two parts.
        assert program.do("move(20, 4, 6)") == 0
        program.do("protect(12, 2, 3)")
        assert program.do("move(10, 4, 40)") == 0
    finally:
        copy.close()
    assert program.first_bytes(40, 4) == b"\1" * 1024


def test_a_child_that_is_forked_while_its_parent_is_taken_on_keeps_nothing(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = injection._Thread._call
    children: list[int] = []

    def late(self: Any, instruction: int, number: int, argument: int) -> int:
        if number == injection._NR_CLOSE and not children:
            children.append(program.do("fork()"))
        return call(self, instruction, number, argument)

    monkeypatch.setattr(injection._Thread, "_call", late)
    program.do("map(2, 4)")
    program.do("fill(2, 4, 1)")
    copy = Precopy(MemoryImage(), clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        (child,) = children
        held = [link for link in links(child) if "userfaultfd" in link]
        assert held, "it was not forked at that moment"
    finally:
        copy.close()
    assert proc.exists(child)
    assert [link for pid in (program.pid, child) for link in links(pid) if "fault" in link] == []
    pages = Pagemap(program.pid)
    try:
        assert not pages.guarded(program.room + (2 << 20), program.room + (6 << 20))
    finally:
        pages.close()
    os.kill(child, signal.SIGKILL)


def links(pid: int) -> list[str]:
    return [proc.descriptor_link(pid, number) for number in proc.descriptors(pid)]
