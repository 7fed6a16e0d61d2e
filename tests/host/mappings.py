"""A program whose mappings the tests change, and what was copied of them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

from agent.host import clock, proc
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
libc.mprotect.argtypes = libc.madvise.argtypes = [P, L, I]
M = 1 << 20
room = libc.mmap(None, 66 * M, 0, 0x22, -1, 0)
room += -room % (2 * M) # a whole page table's
def map(at, size): libc.mmap(room + at * M, size * M, 3, 0x32, -1, 0)
def fill(at, size, byte): ctypes.memset(room + at * M, byte, size * M)
def move(at, size, to): return libc.mremap(room + at * M, size * M, size * M, 3, room + to * M) != room + to * M
def protect(at, size, how): libc.mprotect(room + at * M, size * M, how)
def fork(): return os.fork() or time.sleep(1000)
def follow_not(): # by asynchronous I/O
    globals().update(ring=ctypes.c_ulong())
    libc.syscall(206, 1, ctypes.byref(ring))
def follow(): libc.syscall(207, ring)
def direct(path, flags=os.O_DIRECT): globals().update(fd=os.open(path, os.O_RDONLY | flags))
def read(at): threading.Thread(target=lambda: libc.pread(fd, P(room + at * M), L(4096), L(0))).start()
def read_on(at):
    def work():
        while libc.pread(fd, P(room + at * M), L(1 << 16), L(0)) > 0: pass
    threading.Thread(target=work).start()
def spawn(fifo):
    # Until somebody opens the fifo, the child is between its birth and execve: in the same memory.
    actions, argv = ctypes.create_string_buffer(256), (ctypes.c_char_p * 2)(b"true")
    libc.posix_spawn_file_actions_init(actions)
    libc.posix_spawn_file_actions_addopen(actions, 9, fifo.encode(), 0, 0)
    libc.posix_spawn(ctypes.byref(I()), b"/bin/true", actions, None, argv, None)
def end(pid): os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
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
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self.room = self._said()

    def _said(self) -> int:
        assert self._popen.stdout is not None
        assert select.select([self._popen.stdout], [], [], 20)[0], "it hangs"
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
        os.killpg(self.pid, signal.SIGKILL)
        self._popen.communicate()


def copied(image: MemoryImage, program: Program, at: int, size: int) -> bytes:
    """As ``Program.first_bytes``, of what was copied last."""
    drafts = image.drafts[AddressSpace("process", program.pid)]
    first = program.room + (at << 20)
    pages = range(first, first + (size << 20), PAGE_BYTES)
    return b"".join(drafts.get(page, b"\0")[:1] for page in pages)
