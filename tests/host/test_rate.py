"""What a running tree is seen to write."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

from agent.engines.tracking import rate
from tests.host.conftest import Host

# Writes 8 MiB of its 64 all the time, and 16 MiB once in a while.
_PROGRAM = """
import mmap, sys, time
area = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(area), 4096): area[at] = 1
print("up", flush=True)
n = 0
while True:
    n += 1
    for at in range(0, 8 << 20, 4096): area[at] = n % 250
    if n % 50 == 0:
        for at in range(16 << 20, 32 << 20, 4096): area[at] = n % 250
    time.sleep(0.01)
"""


def started(host: Host, *argv: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", *argv], stdout=subprocess.PIPE, start_new_session=True
    )
    host.popens.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.stdout.close()
    return process


def test_what_is_written_often_is_told_from_what_is_written_at_times(host: Host) -> None:
    process = started(host, _PROGRAM)
    found = rate.measure([process.pid], 3.0, 0.1)
    assert 64 << 20 <= found.followed_bytes < 96 << 20
    assert found.apart_bytes == 0
    assert found.look_bytes >= 7 << 20
    assert 23 << 20 <= found.span_bytes < 40 << 20
    assert 3.0 <= found.span_s < 30.0
    assert " uw" not in pathlib.Path(f"/proc/{process.pid}/smaps").read_text()


def test_what_cannot_be_followed_is_counted_with_its_reason(host: Host) -> None:
    opened = "import ctypes\nctypes.CDLL(None).syscall(206, 1, ctypes.byref(ctypes.c_ulong()))\n"
    process = started(host, opened + _PROGRAM)
    found = rate.measure([process.pid], 0.1, 0.1)
    assert found.apart_bytes >= 64 << 20
    assert (found.followed_bytes, found.span_bytes) == (0, 0)
    assert found.reasons == (f"process {process.pid}: it uses asynchronous I/O",)
    os.kill(process.pid, 0)
