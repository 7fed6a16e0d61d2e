"""What soft-dirty bits do not tell, and is found out all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from agent import errors
from agent.engines.criu.held import HeldSink
from agent.engines.tracking.precopy import Precopy
from agent.engines.tracking.softdirty import SoftDirty
from agent.host import clock, pageentries, pagemap, proc, softdirty
from agent.model.streams import PAGE_BYTES, AddressSpace
from tests.conftest import NOT_TO_BE_HAD
from tests.host.image import MemoryImage
from tests.host.mappings import Program, copied

# prctl(PR_SET_THP_DISABLE): huge pages are marked where small ones are not.
SMALL_PAGES = "libc.prctl(41, 1, 0, 0, 0)"

pytestmark = pytest.mark.skipif(
    bool(softdirty.unusable()), reason=f"{NOT_TO_BE_HAD}{softdirty.unusable()}; tests/vm can"
)


@pytest.fixture
def tracked(way: str) -> None:
    """By soft-dirty bits, whatever else this kernel knows."""
    if way != "soft-dirty":
        pytest.skip(f"{NOT_TO_BE_HAD}not about this way")


def first_copy(program: Program, *lines: str) -> tuple[Precopy, MemoryImage]:
    image = MemoryImage()
    for line in lines:
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    copy.round(program.pid)
    assert copy.kinds == {"soft-dirty": 1}
    return copy, image


def finish(copy: Precopy, program: Program, image: MemoryImage) -> None:
    program.stop()
    copy.finish(copy.cut([program.pid]), HeldSink(image, 0))


@pytest.mark.usefixtures("tracked")
def test_a_reset_by_somebody_else_loses_no_write(program: Program) -> None:
    copy, image = first_copy(program, "map(2, 4)", "fill(2, 4, 1)")
    with contextlib.closing(copy):
        program.do("fill(2, 4, 2)")
        with open(f"/proc/{program.pid}/clear_refs", "w") as stream:
            stream.write("4")
        finish(copy, program, image)
    assert copied(image, program, 2, 4) == program.first_bytes(2, 4) == b"\2" * 1024


@pytest.mark.usefixtures("tracked")
def test_of_two_who_follow_a_process_one_only_does_by_its_bits(program: Program) -> None:
    first = SoftDirty(proc.identity(program.pid), "")
    with contextlib.closing(first), pytest.raises(errors.EnvironmentUnfit, match="another capture"):
        SoftDirty(proc.identity(program.pid), "")
    SoftDirty(proc.identity(program.pid), "").close()


@pytest.mark.usefixtures("tracked")
def test_so_it_is_by_whatever_proc_they_see_it(program: Program) -> None:
    with contextlib.closing(SoftDirty(proc.identity(program.pid), "")):
        script = (
            "import sys; from agent.host import proc; "
            "from agent.engines.tracking.softdirty import SoftDirty; "
            "SoftDirty(proc.identity(int(sys.argv[1])), '')"
        )
        own_proc = 'mount -t proc proc /proc && exec "$@"'
        argv = ["unshare", "--mount", "sh", "-c", own_proc, "sh", sys.executable, "-c", script]
        ran = subprocess.run([*argv, str(program.pid)], check=False, capture_output=True, text=True)
    assert "another capture" in ran.stderr


@pytest.mark.usefixtures("tracked")
def test_what_is_moved_by_whole_page_tables_is_read_where_it_came_to_lie(program: Program) -> None:
    """The kernel moves the bits along with the pages, and sets none."""
    lines = ("map(2, 4)", "map(20, 4)", "fill(2, 4, 1)", "fill(20, 4, 2)")
    copy, image = first_copy(program, SMALL_PAGES, *lines)
    with contextlib.closing(copy):
        assert program.do("move(20, 4, 2)") == 0
        finish(copy, program, image)
    assert copied(image, program, 2, 4) == program.first_bytes(2, 4) == b"\2" * 1024


@pytest.mark.usefixtures("tracked")
def test_what_is_written_is_read_though_the_kernel_forgets_that_its_mapping_was_joined(
    program: Program,
) -> None:
    lines = ("map(1, 1)", "map(2, 4)", "fill(1, 5, 1)", "protect(1, 1, 1)")
    copy, image = first_copy(program, SMALL_PAGES, *lines)
    with contextlib.closing(copy):
        # Joined with a new one all of it counts as written, and no bit is set;
        for line in ("map(6, 1)", "protect(2, 5, 0)", "protect(2, 5, 3)", "fill(2, 4, 2)"):
            program.do(line)
        # joined with an old one nothing does any more.
        for line in ("protect(2, 5, 1)", "protect(2, 5, 3)"):
            program.do(line)
        finish(copy, program, image)
    assert copied(image, program, 2, 4) == program.first_bytes(2, 4) == b"\2" * 1024


@pytest.mark.usefixtures("tracked")
def test_memory_that_was_let_go_of_and_read_again_is_zero(program: Program) -> None:
    """The kernel's huge zero page has no bit of its own, and is no content in other ways either."""
    where = "room + 2 * M, 4 * M"
    copy, image = first_copy(program, "map(2, 4)", f"libc.madvise({where}, 14)", "fill(2, 4, 1)")
    with contextlib.closing(copy):
        assert program.do(f"libc.madvise({where}, 4)") == 0
        program.do(f"len(ctypes.string_at({where}))")
        finish(copy, program, image)
        (settled,) = copy._settled.values()
    assert program.first_bytes(2, 4) == b"\0" * 1024
    first = program.room + (2 << 20)
    drafts = image.drafts[AddressSpace("process", program.pid)]
    here = np.array([[first, first + (4 << 20)]], dtype=np.int64)
    for start, end in pagemap.clip(settled, here).tolist():
        assert {drafts[page][:1] for page in range(start, end, PAGE_BYTES)} == {b"\0"}


@pytest.mark.usefixtures("tracked")
def test_what_was_written_before_a_stop_is_not_read_for_the_next_one(program: Program) -> None:
    """But all of it, where devices may write to it by then."""
    program.do("map(2, 16)")
    program.do("fill(2, 16, 1)")
    here = np.array([[program.room + (2 << 20), program.room + (18 << 20)]], dtype=np.int64)

    def cut() -> int:
        program.stop()
        _, unchanged = tracker.cut(here)
        os.kill(program.pid, signal.SIGCONT)
        return pagemap.size_bytes(unchanged)

    def given() -> int:
        return sum(pagemap.size_bytes(pagemap.clip(each, here)) for each in tracker.round())

    with contextlib.closing(SoftDirty(proc.identity(program.pid), "")) as tracker:
        assert given() == 16 << 20
        program.do("fill(2, 4, 2)")
        assert (given(), cut()) == (4 << 20, 12 << 20)
        program.do("fill(6, 2, 2)")
        assert (given(), cut()) == (2 << 20, 14 << 20)
        program.do("follow_not()")
        assert cut() == 0


@pytest.mark.usefixtures("tracked")
def test_marking_a_page_changes_nothing_in_it(program: Program) -> None:
    program.do("map(2, 1)")
    program.do("fill(2, 1, 7)")
    address = program.room + (2 << 20)
    with contextlib.closing(softdirty.Claim(program.pid)) as claim:
        claim.reset()
        with open(f"/proc/{program.pid}/pagemap", "rb", 0) as stream:
            (before,) = pageentries.read(stream.fileno(), address, address + 4096)
            assert softdirty.mark(program.pid, address)
            (after,) = pageentries.read(stream.fileno(), address, address + 4096)
    assert not before & pageentries.SOFT_DIRTY
    assert after & pageentries.SOFT_DIRTY
    assert program.first_bytes(2, 1) == b"\7" * 256


def test_who_has_the_same_memory_is_known() -> None:
    with subprocess.Popen(["sleep", "100"]) as other:
        assert softdirty.same_memory(os.getpid(), [other.pid, os.getpid()])
        assert not softdirty.same_memory(os.getpid(), [other.pid, 1])
        other.kill()
