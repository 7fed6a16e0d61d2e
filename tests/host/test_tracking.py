"""What a running process does to its mappings while its writes are noted."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from agent.engines.criu.held import HeldSink
from agent.engines.tracking import precopy, protected, rate
from agent.engines.tracking.precopy import Precopy
from agent.engines.tracking.protected import Protected
from agent.host import clock, injection, moves, proc, underway
from agent.host.pagemap import Pagemap
from agent.host.underway import Calls
from agent.model.streams import PAGE_BYTES, AddressSpace
from tests.conftest import NOT_TO_BE_HAD
from tests.host.image import MemoryImage
from tests.host.mappings import Program, copied
from tests.host.slowfile import SlowFile


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be busy, or emulated, and others may hold pages."""
    for name in ("_LET_GO_S", "_LET_GO_QUICKLY_S"):
        monkeypatch.setattr(precopy, name, 20.0)


def test_writes_are_noted_though_another_mapping_is_moved_next_to_these(
    program: Program, way: str
) -> None:
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
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
    finally:
        copy.close()
    assert copied(image, program, 2, 8) == program.first_bytes(2, 8)


def test_what_is_written_all_the_time_is_copied_at_the_cut_only(
    program: Program, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of it would be stored, and none of them used."""
    monkeypatch.setattr(precopy, "LOOK_S", 1.5)  # the writer may have no core for a while
    if way == "none":
        pytest.skip(f"{NOT_TO_BE_HAD}what is written is not known")
    # A thread that is kept waiting writes nothing between two looks, and looks come late then.
    monkeypatch.setattr(precopy, "_COMPARABLE", math.inf)
    look, numbers = Precopy.round, itertools.count(2)

    def written_and_looked_at(self: Precopy, root: int, **how: Any) -> int:
        program.do(f"fill(20, 16, {next(numbers) % 250})")
        return look(self, root, **how)

    monkeypatch.setattr(Precopy, "round", written_and_looked_at)
    image = MemoryImage()
    for line in ("map(2, 8)", "map(20, 16)", "fill(2, 8, 1)", "fill(20, 16, 1)"):
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    try:
        copy.run(program.pid)
        assert not copy.shrinks
        assert copied(image, program, 2, 8) == program.first_bytes(2, 8)
        drafts = image.drafts[AddressSpace("process", program.pid)]
        first = program.room + (20 << 20)
        ahead = sum(page in drafts for page in range(first, first + (16 << 20), PAGE_BYTES))
        assert ahead * PAGE_BYTES < 2 << 20
        program.stop()
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
    finally:
        copy.close()
    assert copied(image, program, 20, 16) == program.first_bytes(20, 16)


def test_who_writes_here_and_there_is_caught_up_with_by_the_last_rounds(program: Program) -> None:
    """Each look finds as much written as the one before, but in other places."""
    image = MemoryImage()
    writer = "lambda: [(fill(2 + n % 60, 1, n % 250), time.sleep(0.025)) for n in range(10**9)]"
    for line in (
        *("map(2, 60)", "fill(2, 60, 1)"),
        f"threading.Thread(target={writer}).start()",
    ):
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    try:
        copy.run(program.pid)
        assert copy.shrinks
        rounds = len(copy.rounds)
        copy.last_rounds(program.pid, HeldSink(image, 0), lambda: None)
        assert len(copy.rounds) >= rounds + 2
        program.stop()
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
        assert copied(image, program, 2, 60) == program.first_bytes(2, 60)
    finally:
        copy.close()


def test_the_last_rounds_do_not_wait_for_the_store(program: Program) -> None:
    """What a tree writes meanwhile would be left for its stop."""
    image = MemoryImage()
    for line in ("map(2, 8)", "fill(2, 8, 1)"):
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    held = HeldSink(image, 64 << 20)
    try:
        copy.round(program.pid)
        first = copied(image, program, 2, 8)
        program.do("fill(2, 8, 2)")
        held.hold()
        copy.last_rounds(program.pid, held, lambda: program.do("fill(4, 2, 3)"))
        program.do("fill(3, 1, 4)")
        program.stop()
        copy.finish(copy.cut([program.pid]), held)
        assert copy.cut_bytes < 2 << 20
        assert copied(image, program, 2, 8) == first
        held.drain()
    finally:
        copy.close()
        held.close()
    assert copied(image, program, 2, 8) == program.first_bytes(2, 8)


def test_what_a_number_was_read_by_counts_only_if_it_is_still_the_same_process(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have got it in the middle of a quick round."""
    image = MemoryImage()
    for line in ("map(2, 8)", "fill(2, 8, 1)"):
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        alive = [True]
        with monkeypatch.context() as patched:
            patched.setattr(proc, "alive", lambda _: alive.pop() if alive else False)
            copy.round(program.pid, into=image)
        program.stop()
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
        assert copy.cut_bytes >= 8 << 20
    finally:
        copy.close()


def test_memory_is_copied_where_it_was_moved_to(program: Program, way: str) -> None:
    """Also over what was copied from there before."""
    if way == "none":
        pytest.skip(f"{NOT_TO_BE_HAD}what is written is not known")
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
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
        assert copy.cut_bytes >= 4 << 20, "it was not tracked"
    finally:
        copy.close()
    assert copied(image, program, 2, 4) == program.first_bytes(30, 4) == b"\2" * 1024
    assert copied(image, program, 30, 4) == b"\2" * 1024


def test_what_another_one_is_told_of_the_same_process_is_not_kept_from_this_one(
    program: Program,
    way: str,
) -> None:
    """A watch lasts while others dump, or ask what a dump would take."""
    image = MemoryImage()
    for line in ("map(2, 4)", "map(20, 4)", "fill(2, 4, 1)", "fill(20, 4, 1)"):
        program.do(line)
    first = Precopy(image, clock.Deadline.after(60))
    other_image = MemoryImage()
    other = Precopy(other_image, clock.Deadline.after(60))
    try:
        first.round(program.pid)
        program.do("fill(2, 4, 2)")
        other.round(program.pid)
        rate.measure([program.pid], 0.01, 0.01)
        program.do("fill(20, 4, 3)")
        other.round(program.pid)
        first.round(program.pid)
        assert program.do("move(20, 4, 40)") == 0
        program.stop()
        for copy, into in ((first, image), (other, other_image)):
            copy.finish(copy.cut([program.pid]), HeldSink(into, 0))
    finally:
        first.close()
        other.close()
    for into in (image, other_image):
        assert copied(into, program, 2, 4) == program.first_bytes(2, 4) == b"\2" * 1024
        assert copied(into, program, 40, 4) == program.first_bytes(40, 4) == b"\3" * 1024


def kind_and_bytes(copy: Precopy, program: Program) -> tuple[dict[str, int], int]:
    """Copy once more; how it is tracked, and what had to be read while it stood still."""
    copy.begin(MemoryImage(("one", MemoryImage())), clock.Deadline.after(60), "one")
    copy.round(program.pid)
    program.stop()
    copy.finish(copy.cut([program.pid]), HeldSink(MemoryImage(), 0))
    os.kill(program.pid, signal.SIGCONT)
    return copy.kinds, copy.cut_bytes


def test_who_could_not_be_tracked_is_tried_again_with_the_next_copy(program: Program) -> None:
    """A watch may last for days."""
    program.do("map(2, 16)")
    program.do("fill(2, 16, 1)")
    with contextlib.closing(Precopy(MemoryImage(), clock.Deadline.after(60))) as copy:
        # Before it is met, and while it is tracked.
        for _ in range(2):
            program.do("follow_not()")
            kinds, cut_bytes = kind_and_bytes(copy, program)
            assert cut_bytes >= 16 << 20
            assert copy.reasons
            program.do("follow()")
            kinds, cut_bytes = kind_and_bytes(copy, program)
            assert (kinds, copy.reasons) == ({"write-protect": 1}, [])
            assert cut_bytes < 8 << 20


@pytest.fixture(
    params=["as it asks", "as the file system likes", "by a mount that is gone", "by an overlay"]
)
def slow(
    program: Program, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> Iterator[SlowFile]:
    """A file that the program reads from past the page cache."""
    asks = request.param == "as it asks"
    folder, other, empty = (tmp_path / name for name in ("folder", "other", "empty"))
    for each in (folder, other, empty):
        each.mkdir()
    made = SlowFile(folder, b"Z", uncached=not asks)
    try:
        program.do("map(2, 16)")
        program.do("fill(2, 16, 1)")
        with contextlib.ExitStack() as stack:
            path = made.path
            if request.param.startswith("by"):
                bind, overlay = ["--bind", folder], ["-t", "overlay", "overlay"]
                overlay += ["-o", f"lowerdir={folder}:{empty}"]
                kind = overlay if request.param == "by an overlay" else bind
                subprocess.run(["mount", *kind, other], check=True, timeout=20)
                unmount = ["umount", "--lazy", os.fspath(other)]
                stack.callback(lambda: subprocess.run(unmount, check=True, timeout=20))
                path = other / path.name
            program.do(f"direct({str(path)!r}, {os.O_DIRECT if asks else 0})")
            if request.param == "by a mount that is gone":
                stack.close()
            yield made
    finally:
        made.close()


@pytest.mark.parametrize("answered", ["while it waits", "when it has given up"])
def test_what_a_direct_read_brings_after_the_first_look_is_copied(
    program: Program, slow: SlowFile, answered: str
) -> None:
    image = MemoryImage()
    with contextlib.closing(Precopy(image, clock.Deadline.after(60))) as copy:
        copy.round(program.pid)
        # It begins after the page was taken on, which is noted, and goes on when it is again.
        program.do("read(4)")
        assert slow.asked.wait(10)
        if answered == "while it waits":
            threading.Timer(0.1, slow.answer).start()
        copy.round(program.pid)
        slow.answer()
        assert clock.wait_until(
            lambda: program.first_bytes(4, 1)[:1] == b"Z", clock.Deadline.after(10)
        )
        program.stop()
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
    assert copy.kinds == {"write-protect": 1}
    assert copied(image, program, 2, 16) == program.first_bytes(2, 16)


def test_who_reads_directly_from_what_does_not_answer_is_not_followed(
    program: Program, slow: SlowFile
) -> None:
    program.do("read(4)")
    assert slow.asked.wait(10)
    with contextlib.closing(Precopy(MemoryImage(), clock.Deadline.after(60))) as copy:
        copy.round(program.pid)
        assert copy.reasons == [f"process {program.pid}: its direct I/O takes long"]


def test_a_direct_read_that_does_not_end_is_waited_for_only_once(
    program: Program, slow: SlowFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many processes with such reads would hold up every round, one after another."""
    waits: list[float] = []
    over = underway.over

    def noted(
        pid: int, deadline: clock.Deadline, calls: Calls = Calls.OWN, *, interrupt: bool = True
    ) -> bool:
        if calls is Calls.OWN:
            waits.append(deadline.remaining_s)
        return over(pid, deadline, calls, interrupt=interrupt)

    image = MemoryImage()
    with contextlib.closing(Precopy(image, clock.Deadline.after(60))) as copy:
        copy.round(program.pid)
        program.do("fill(6, 1, 7)")
        program.do("read(4)")
        assert slow.asked.wait(10)
        monkeypatch.setattr(underway, "over", noted)
        for _ in range(3):
            copy.round(program.pid)
        slow.answer()
        assert clock.wait_until(
            lambda: program.first_bytes(4, 1)[:1] == b"Z", clock.Deadline.after(10)
        )
        first, *others = waits
        assert others
        assert max(others) < first / 10
        program.stop()
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
    assert copied(image, program, 2, 16) == program.first_bytes(2, 16)


def test_who_reads_directly_all_the_time_is_followed(
    program: Program, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protected, "_DIRECT_S", 20.0)  # the disk may be busy
    program.do("map(2, 60)")
    program.do("fill(2, 60, 1)")
    path = tmp_path / "direct"
    path.write_bytes(b"Z" * (1 << 16))
    program.do(f"direct({str(path)!r})")
    for at in (4, 6, 8):
        program.do(f"read_on({at})")
    image = MemoryImage()
    with contextlib.closing(Precopy(image, clock.Deadline.after(60))) as copy:
        for _ in range(4):
            copy.round(program.pid)
        program.stop()
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
    assert (copy.kinds, copy.reasons) == ({"write-protect": 1}, [])
    assert copied(image, program, 2, 60) == program.first_bytes(2, 60)
    assert copy.cut_bytes < 32 << 20


def test_mappings_that_could_not_be_followed_are_tried_again_with_the_next_copy(
    program: Program,
) -> None:
    program.do("map(2, 16)")
    program.do("fill(2, 16, 1)")
    with contextlib.closing(Precopy(MemoryImage(), clock.Deadline.after(60))) as copy:
        with contextlib.closing(Precopy(MemoryImage(), clock.Deadline.after(60))) as other:
            other.round(program.pid)
            _, cut_bytes = kind_and_bytes(copy, program)
            assert cut_bytes >= 16 << 20
        _, cut_bytes = kind_and_bytes(copy, program)
        assert cut_bytes < 8 << 20


def test_what_another_one_follows_counts_as_written(program: Program) -> None:
    program.do("map(2, 4)")
    program.do("fill(2, 4, 1)")
    copy = Precopy(MemoryImage(), clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        found = rate.measure([program.pid], 0.01, 0.01)
    finally:
        copy.close()
    assert found.span_bytes >= 4 << 20


def test_a_child_that_still_has_its_parents_memory_is_told_nothing_of_it(
    program: Program, way: str, tmp_path: pathlib.Path
) -> None:
    """As each one of posix_spawn, and of Python's subprocess, for a moment."""
    image = MemoryImage()
    os.mkfifo(tmp_path / "fifo")
    for line in ("map(2, 4)", "fill(2, 4, 1)"):
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        program.do(f"threading.Thread(target=spawn, args=['{tmp_path}/fifo']).start()")
        deadline = clock.Deadline.after(10)
        assert clock.wait_until(lambda: len(proc.tree(program.pid)) == 2, deadline)
        child = proc.tree(program.pid)[1]
        program.do("fill(2, 4, 2)")
        # It is not known at which moment the child is met: here, only the child is.
        copy.round(child)
        (tmp_path / "fifo").write_bytes(b"")
        copy.round(program.pid)
        program.stop()
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
    finally:
        copy.close()
    assert copied(image, program, 2, 4) == program.first_bytes(2, 4) == b"\2" * 1024


def test_a_process_that_moves_mappings_all_the_time_costs_no_memory(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch may pause for hours."""
    monkeypatch.setattr(moves, "_MOST", 64)
    image = MemoryImage()
    for line in ("map(2, 2)", "map(20, 2)", "fill(2, 2, 1)", "fill(20, 2, 1)"):
        program.do(line)
    copy = Precopy(image, clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        program.do("[move(at, 2, to) for at, to in ((2, 30), (30, 2)) * 200] and 0")
        assert all(len(each) <= 64 for each in copy._moves._arrived.values())
        # Too many that do not touch.
        program.do("[move(at, 2, at + 4) for at in (20, 24, 28, 32, 36, 40)] and 0")
        monkeypatch.setattr(moves, "_MOST", 2)
        program.do("[move(at, 2, at - 4) for at in (44, 40, 36, 32, 28, 24)] and 0")
        assert all(len(each) <= 2 for each in copy._moves._arrived.values())
        program.do("fill(20, 2, 3)")
        program.stop()
        copy.finish(copy.cut([program.pid]), HeldSink(image, 0))
    finally:
        copy.close()
    assert copied(image, program, 2, 2) == program.first_bytes(2, 2) == b"\1" * 512
    assert copied(image, program, 20, 2) == program.first_bytes(20, 2) == b"\3" * 512


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


@pytest.fixture
def late_children(program: Program, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One child is forked while the program is taken on: it has the descriptor too."""
    call = injection._Thread._call
    children: list[int] = []

    def late(self: Any, instruction: int, number: int, argument: int) -> int:
        if number == injection._NR_CLOSE and not children:
            children.append(program.do("fork()"))
        return call(self, instruction, number, argument)

    monkeypatch.setattr(injection._Thread, "_call", late)
    program.do("map(2, 4)")
    program.do("fill(2, 4, 1)")
    return children


def test_what_is_mapped_anew_while_memory_is_copied_is_taken_on_whole(program: Program) -> None:
    """A mapping that is followed in a part only is moved in a part only (Linux >= 6.17)."""
    for line in ("map(26, 8)", "fill(26, 8, 1)", "protect(26, 4, 1)"):  # two, side by side
        program.do(line)
    noted = moves.Moves()
    try:
        tracker = Protected(proc.identity(program.pid), noted)
        try:
            pieces = tracker.round()
            next(piece for piece in pieces if program.room + (26 << 20) in piece)
            # In place of the upper half of this one and the lower half of the next.
            program.do("map(28, 4)")
            for _ in pieces:
                pass
            assert program.do("move(28, 4, 40)") == 0
            assert program.do("fill(40, 4, 2)") == 0
        finally:
            tracker.close()
    finally:
        noted.close()


def test_a_child_that_is_forked_while_its_parent_is_taken_on_keeps_nothing(
    program: Program, late_children: list[int]
) -> None:
    copy = Precopy(MemoryImage(), clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        (child,) = late_children
        assert faults(child), "it was not forked at that moment"
    finally:
        copy.close()
    assert proc.exists(child)
    assert faults(program.pid) + faults(child) == []
    assert not guarded(program)


def test_nothing_of_a_measurement_stays_in_a_child_that_was_forked_meanwhile(
    program: Program, late_children: list[int]
) -> None:
    rate.measure([program.pid], 0.01, 0.01)
    (child,) = late_children
    assert proc.exists(child)
    assert faults(program.pid) + faults(child) == []
    assert not guarded(program)


def test_a_child_that_ends_meanwhile_keeps_no_other_from_letting_go(
    program: Program, late_children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_lived = program.do("fork()")
    tree = proc.tree

    def ended(root: int) -> list[int]:
        found = tree(root)
        program.do(f"end({short_lived})")
        return found

    copy = Precopy(MemoryImage(), clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        (child,) = late_children
        assert tree(program.pid).index(short_lived) < tree(program.pid).index(child)
        monkeypatch.setattr(proc, "tree", ended)
    finally:
        copy.close()
    assert faults(child) == []


def test_a_parent_moves_mappings_though_a_child_that_is_stopped_keeps_the_descriptor(
    program: Program, late_children: list[int]
) -> None:
    """Nothing runs in a stopped process, and nobody reads any more which mappings are moved."""
    copy = Precopy(MemoryImage(), clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        (child,) = late_children
        os.kill(child, signal.SIGSTOP)
        assert clock.wait_until(lambda: proc.stat(child).state == "T", clock.Deadline.after(10))
        copy.round(program.pid)
        assert guarded(program)
    finally:
        copy.close()
    assert faults(child), "it was not kept"
    assert program.do("move(2, 4, 30)") == 0
    assert not guarded(program, 30)
    assert program.first_bytes(30, 4) == b"\1" * 1024


def test_a_child_that_could_not_be_reached_lets_go_the_next_time(
    program: Program, late_children: list[int]
) -> None:
    copy = Precopy(MemoryImage(), clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        (child,) = late_children
        os.kill(child, signal.SIGSTOP)
        assert clock.wait_until(lambda: proc.stat(child).state == "T", clock.Deadline.after(10))
        copy.round(program.pid)
        assert faults(child)
        os.kill(child, signal.SIGCONT)
        assert clock.wait_until(lambda: proc.stat(child).state == "S", clock.Deadline.after(10))
    finally:
        copy.close()
    assert faults(child) == []


def test_whatever_fails_at_the_end_nothing_stays_tracked(
    program: Program, late_children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    before = set(threading.enumerate())
    copy = Precopy(MemoryImage(), clock.Deadline.after(60))
    try:
        copy.round(program.pid)
        assert late_children
        assert set(threading.enumerate()) - before
        monkeypatch.setattr(injection, "take_back", fails)
    finally:
        with pytest.raises(MemoryError):
            copy.close()
    assert not guarded(program)
    assert not set(threading.enumerate()) - before
    assert program.do("move(2, 4, 30)") == 0


def faults(pid: int) -> list[str]:
    """The userfaultfds that it holds."""
    links = (proc.descriptor_link(pid, number) for number in proc.descriptors(pid))
    return [link for link in links if "userfaultfd" in link]


def guarded(program: Program, at: int = 2) -> bool:
    """Whether its writes to the mapping at ``at`` MiB are noted."""
    pages = Pagemap(program.pid)
    try:
        first = program.room + (at << 20)
        return pages.guarded(first, first + (4 << 20))
    finally:
        pages.close()
