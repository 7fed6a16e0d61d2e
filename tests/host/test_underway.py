"""That all calls of a process are over is known soon, and without a trace in it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.host import clock, proc, underway
from tests.host.slowfile import SlowFile

# Threads that wait in every common way, one that computes, and some that come and go. Who is
# interrupted in epoll_wait is told so; the number of these is what it says at last.
_PROGRAM = """
import ctypes, os, select, socket, sys, threading, time
libc, epoll, pipe = ctypes.CDLL(None, use_errno=True), select.epoll(), os.pipe()
pair, end, interrupted = socket.socketpair(), threading.Event(), []
def wait():
    event = ctypes.create_string_buffer(12)
    while not end.is_set():
        if libc.epoll_wait(epoll.fileno(), event, 1, 10000) < 0: interrupted.append(1)
def compute():
    while not end.is_set(): sum(range(1000))
def come_and_go():
    while not end.is_set(): threading.Thread(target=time.sleep, args=(0.01,)).start(); time.sleep(0.005)
for work in (wait, compute, come_and_go): threading.Thread(target=work).start()
for work in (lambda: os.read(pipe[0], 1), lambda: pair[0].recv(1), lambda: time.sleep(1000)):
    threading.Thread(target=work, daemon=True).start()
print("up", flush=True)
sys.stdin.readline()
end.set()
print(len(interrupted), flush=True)
os._exit(0)
"""  # noqa: E501


@pytest.fixture
def program() -> Iterator[subprocess.Popen[str]]:
    made = _started(_PROGRAM)
    try:
        yield made
    finally:
        made.kill()
        made.communicate()


def _started(text: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", text, *arguments]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    assert made.stdout.readline() == "up\n"
    return made


def test_who_computes_waits_or_comes_and_goes_is_in_no_call_that_matters(
    program: subprocess.Popen[str],
) -> None:
    assert program.stdin is not None
    assert program.stdout is not None
    for _ in range(10):
        assert underway.over(program.pid, clock.Deadline.after(10))
    for tid in proc.threads(program.pid):
        with contextlib.suppress(errors.NotFound):  # it has gone since
            assert proc.status(tid).tracer_pid == 0
    program.stdin.write("\n")
    program.stdin.flush()
    # Now and then, as it is about to sleep; not each time.
    assert int(program.stdout.readline()) < 5


def test_who_waits_for_a_file_past_the_page_cache_is_not_through(tmp_path: Path) -> None:
    slow = SlowFile(tmp_path, b"Z")
    text = (
        "import mmap, os, sys\n"
        "fd, area = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)\n"
        "print('up', flush=True)\n"
        "os.readv(fd, [area])\n"
        "sys.stdin.readline()\n"
    )
    reader = _started(text, os.fspath(slow.path))
    try:
        assert slow.asked.wait(10)
        assert not underway.over(reader.pid, clock.Deadline.after(0.2))
        slow.answer()
        assert underway.over(reader.pid, clock.Deadline.after(10))
    finally:
        slow.close()
        reader.kill()
        reader.communicate()


def test_no_more_threads_are_looked_at_than_there_is_time_for(
    program: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def look(pid: int, tid: int, calls: underway.Calls) -> object:
        del pid
        looked.append(tid)
        time.sleep(0.2)
        return underway._Seen.BUSY

    monkeypatch.setattr(underway, "_look", look)
    assert len(proc.threads(program.pid)) > 5
    assert not underway.over(program.pid, clock.Deadline.after(0.1))
    assert len(looked) <= 1
