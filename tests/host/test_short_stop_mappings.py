"""What a process has asked of its mappings is in the image of a short stop, and holds after it came
back; so is what it wrote to each kind of them.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.engines.base import CaptureOptions
from agent.engines.criu import hiding
from agent.host import proc
from agent.model.streams import PAGE_BYTES
from tests.host.conftest import Host
from tests.host.image import MemoryImage
from tests.host.nodes import wait_for

# Says when it stands, with where its mappings are; each is of another kind and partly written.
_PROGRAM = """
import ctypes, mmap, os, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = libc.madvise.argtypes
MIB, PAGE, RW = 1 << 20, 4096, mmap.PROT_READ | mmap.PROT_WRITE
folder, made = sys.argv[1], []

def new(size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd=-1, hints=()):
    # Holes on both sides: nothing is joined.
    at = libc.mmap(None, size + 16 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    at = libc.mmap(at + 8 * PAGE, size, RW, flags | 0x10, fd, 0)
    for hint in hints:
        libc.madvise(at, size, hint)
    made.append((at, size))
    for page in range(0, size, 3 * PAGE):
        ctypes.memset(at + page, len(made) + page // PAGE % 7, PAGE)
    return at

for size in (8 * PAGE, 2 * MIB):
    new(size, hints=[mmap.MADV_DONTFORK])
    new(size, hints=[18])  # MADV_WIPEONFORK
    new(size, hints=[mmap.MADV_DONTDUMP, mmap.MADV_NOHUGEPAGE])
    new(size, hints=[mmap.MADV_MERGEABLE, mmap.MADV_RANDOM])
    new(size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    libc.mprotect(new(size), size, 0)
    libc.mprotect(new(size), size, mmap.PROT_READ)
    with open(os.path.join(folder, f"file{size}"), "w+b") as file:
        file.write(b"f" * (size - 100))
        file.flush()
        new(size, flags=mmap.MAP_PRIVATE, fd=file.fileno())
    memory = os.memfd_create("memory")
    os.ftruncate(memory, size)
    new(size, flags=mmap.MAP_PRIVATE, fd=memory)
    os.close(memory)
    # MADV_GUARD_INSTALL, since Linux 6.15
    libc.madvise(new(size) + 4 * PAGE, PAGE, 102)
ballast = bytearray(os.urandom(24 * MIB))
with open(os.path.join(folder, "up.new"), "w") as file:
    file.write(repr(made))
os.rename(os.path.join(folder, "up.new"), os.path.join(folder, "up"))
while True:
    time.sleep(0.01)
"""


# Documentation/filesystems/proc.rst, of VmFlags those that a program asks for.
_ASKED = {b"dc", b"wf", b"dd", b"mg", b"rr", b"nh", b"nr", b"rd", b"wr"}


def _asked(pid: int, mappings: list[tuple[int, int]]) -> list[set[bytes]]:
    """What holds of each; it may have been joined with what is around it."""
    found: dict[int, set[bytes]] = {}
    start = 0
    for line in proc.text(pid, "smaps").splitlines():
        if line.startswith(b"VmFlags:"):
            found[start] = _ASKED & set(line.split())
        elif line[:1] in b"0123456789abcdef":
            start = int(line.partition(b"-")[0], 16)
    return [found[max(at for at in found if at <= start)] for start, _ in mappings]


def _content(pid: int, mappings: list[tuple[int, int]]) -> list[bytes | None]:
    """Page by page; None where nobody may read, not even by force."""
    found: list[bytes | None] = []
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for start, size_bytes in mappings:
            for page in range(start, start + size_bytes, PAGE_BYTES):
                try:
                    found.append(os.pread(memory.fileno(), PAGE_BYTES, page))
                except OSError:
                    found.append(None)
    return found


def test_every_kind_of_mapping_comes_back_as_it_was(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[bytes] = []
    given = hiding._file

    def noted(smaps: bytes) -> Any:
        prepared.append(smaps)
        return given(smaps)

    monkeypatch.setattr(hiding, "_file", noted)
    started = host.popen([sys.executable, "-c", _PROGRAM, str(tmp_path)])
    wait_for((tmp_path / "up").exists)
    mappings = ast.literal_eval((tmp_path / "up").read_text())
    image = MemoryImage()
    report = host.capture(started.pid, image, options=CaptureOptions(precopy=True))
    assert report.engine_facts["stop"]["path"] == "precopy"
    assert prepared
    asked, content = _asked(started.pid, mappings), _content(started.pid, mappings)
    assert set().union(*asked) == _ASKED
    started.kill()
    started.wait()
    tree = host.restore(image)
    assert _asked(tree.pid, mappings) == asked
    assert _content(tree.pid, mappings) == content
    tree.kill()
    host.assert_clean()
