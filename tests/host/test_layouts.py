"""The flags of a process's mappings, from before it stood still."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from agent.host import layouts, proc

# It has a mapping that no other is joined with, which gets one more flag at the word.
_PROGRAM = (
    "import mmap, sys\n"
    "area = mmap.mmap(-1, 1 << 20)\n"
    "print(flush=True)\n"
    "for line in sys.stdin:\n"
    "    area.madvise(mmap.MADV_DONTFORK)\n"
    "    print(flush=True)\n"
)


@pytest.fixture
def program() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with started:
        assert started.stdout
        started.stdout.readline()
        try:
            yield started
        finally:
            started.kill()


def _told(text: bytes) -> list[bytes]:
    """What CRIU reads of it: the lines of maps, and those of flags."""
    lines = text.splitlines()
    return [line for line in lines if line[:1].islower() or line[:1].isdigit() or b"VmF" in line]


def test_smaps_are_told_as_the_kernel_tells_them(program: subprocess.Popen[bytes]) -> None:
    known = layouts.Layouts()
    known.note([program.pid])
    layout = known.now(program.pid)
    assert layout is known.noted(program.pid), "what is made of it before the stop is for nothing"
    assert layout.smaps is not None
    assert _told(layout.smaps) == _told(proc.text(program.pid, "smaps"))
    assert list(layout.mappings) == proc.maps(program.pid)
    assert known.changed() == []


def test_a_flag_that_changes_meanwhile_is_noticed(program: subprocess.Popen[bytes]) -> None:
    known = layouts.Layouts()
    known.note([program.pid])
    assert known.now(program.pid).smaps is not None
    assert program.stdin
    assert program.stdout
    program.stdin.write(b"\n")
    program.stdin.flush()
    program.stdout.readline()
    assert known.changed() == [program.pid]


def test_a_process_with_a_mapping_that_came_meanwhile_is_not_told_of() -> None:
    known = layouts.Layouts()
    known.note([])
    with subprocess.Popen(["sleep", "1000"]) as started:
        try:
            assert known.now(started.pid).smaps is None
        finally:
            started.kill()


def test_flags_are_known_also_of_a_process_that_changes_its_mappings_all_the_time(
    program: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = proc.text

    def one_more(pid: int, name: str) -> bytes:
        more = b"10000-11000 rw-p 00000000 00:00 0 \n" if name == "maps" else b""
        return more + text(pid, name)

    monkeypatch.setattr(proc, "text", one_more)
    known = layouts.Layouts()
    known.note([program.pid])
    layout = known.noted(program.pid)
    assert layout is not None
    assert layout.smaps is None
    # Who has some that cannot be captured is refused by them.
    assert layout.flags >= {b"rd", b"wr", b"ex"}
