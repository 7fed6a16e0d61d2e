"""What is held back while a job stands still, and where."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest

from agent import errors
from agent.engines.criu.held import HeldSink
from agent.host import system
from agent.model.streams import PAGE_BYTES, AddressSpace, FileEntry, MemberSink, PageRun

SPACE = AddressSpace("process", 1)
MIB = 1 << 20


class Seen:
    """Notes what arrives, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, bytes]] = []

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        self.calls.append(("pages", run.address, bytes(data)))

    def draft(self, space: AddressSpace, runs: list[PageRun], data: memoryview) -> None:
        self.calls.append(("draft", runs[0].address, bytes(data)))

    def metadata(self, name: str, content: BinaryIO) -> None:
        self.calls.append(("metadata", name, content.read()))

    def file(self, entry: FileEntry, content: BinaryIO | None) -> None:
        self.calls.append(("file", entry.path, content.read() if content else b""))

    def facts(self, facts: dict[str, Any]) -> None:
        self.calls.append(("facts", facts["n"], b""))


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else has filled the disk and the memory of this machine."""
    disk = SimpleNamespace(f_frsize=MIB, f_blocks=1000, f_bavail=900)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: disk)
    monkeypatch.setattr(system, "memory_available_bytes", lambda: 1 << 30)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def filled(held: HeldSink) -> list[tuple[str, Any, bytes]]:
    """Give it one of everything, 1 MiB each."""
    contents = [os.urandom(MIB) for _ in range(4)]
    runs = [PageRun(at * MIB, MIB // PAGE_BYTES, 0) for at in range(2)]
    held.pages(SPACE, runs[0], memoryview(contents[0]))
    held.draft(SPACE, [runs[1]], memoryview(contents[1]))
    held.metadata("mm.img", io.BytesIO(contents[2]))
    entry = FileEntry("/f", "file", 0o600, 0, 0, 0, MIB, "open")
    held.file(entry, io.BytesIO(contents[3]))
    held.facts({"n": 1})
    heads = [("pages", 0), ("draft", MIB), ("metadata", "mm.img"), ("file", "/f")]
    calls = [(*head, content) for head, content in zip(heads, contents, strict=True)]
    return [*calls, ("facts", 1, b"")]


def held_sink(seen: Seen, budget_bytes: int, folder: Path | None) -> Iterator[HeldSink]:
    made = HeldSink(cast("MemberSink", seen), budget_bytes, str(folder) if folder else None)
    yield made
    made.close()


@pytest.mark.parametrize("budget_bytes", [8 * MIB, 5 * MIB // 2, 1])
def test_nothing_arrives_before_the_job_runs_and_then_all_in_order(
    seen: Seen, tmp_path: Path, budget_bytes: int
) -> None:
    for held in held_sink(seen, budget_bytes, tmp_path):
        held.hold()
        given = filled(held)
        assert seen.calls == []
        assert (held.spooled_bytes > 0) == (budget_bytes < 4 * MIB)
        assert list(tmp_path.iterdir()) == [], "it has a name"
        held.drain()
        assert seen.calls == given
        assert not held.overflowed


def test_without_room_on_the_disk_the_store_gets_it_at_once(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "memory_available_bytes", lambda: 25 * MIB)
    for held in held_sink(seen, 1, tmp_path):
        held.hold()
        given = filled(held)
        assert held.overflowed
        assert held.spooled_bytes == 2 * MIB
        assert seen.calls == given
        held.drain()
        assert seen.calls == given


def test_a_disk_is_not_filled_until_a_kubelet_evicts_pods(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SimpleNamespace(f_frsize=MIB, f_blocks=100, f_bavail=17)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    for held in held_sink(seen, 1, tmp_path):
        held.hold()
        given = filled(held)
        assert held.spooled_bytes == 2 * MIB
        assert seen.calls == given


def test_a_disk_that_fails_is_as_one_that_is_full(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for held in held_sink(seen, MIB, tmp_path):
        held.hold()
        assert filled(held) == seen.calls


def test_who_goes_on_giving_pages_of_a_dump_that_was_given_up_is_told(
    seen: Seen, tmp_path: Path
) -> None:
    for held in held_sink(seen, MIB, tmp_path):
        held.hold()
        held.refuse()
        with pytest.raises(errors.DumpFailed):
            filled(held)
        assert seen.calls == []


def test_what_is_renewed_holds_as_much_again(seen: Seen, tmp_path: Path) -> None:
    for held in held_sink(seen, 5 * MIB, tmp_path):
        held.prepare(4 * MIB)
        held.renew(lambda: None)
        held.hold()
        given = filled(held)
        assert seen.calls == []
        held.renew(lambda: None)
        assert seen.calls == given
        held.hold()
        filled(held)
        assert seen.calls == given
        assert held.spooled_bytes == 0


def test_what_is_renewed_after_it_could_not_hold_everything_is_as_quick_as_before(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is touched for the first time takes ten times as long to write to."""
    held = HeldSink(cast("MemberSink", seen), 5 * MIB)
    try:
        held.prepare(5 * MIB)
        held.hold()
        given = filled(held) + filled(held)
        assert seen.calls == given
        assert held.overflowed
        touched: list[int] = []
        make = mmap.mmap

        def counted(descriptor: int, size_bytes: int, flags: int) -> mmap.mmap:
            touched.append(size_bytes)
            return make(descriptor, size_bytes, flags=flags)

        monkeypatch.setattr(mmap, "mmap", counted)
        held.renew(lambda: None)
        assert touched
        assert not held.overflowed
        held.hold()
        given += filled(held)
        assert seen.calls != given
        held.drain()
        assert seen.calls == given
    finally:
        held.close()


@pytest.mark.parametrize("expected_bytes", [1, 8 * MIB, 64 * MIB])
@pytest.mark.parametrize("budget_bytes", [8 * MIB, 5 * MIB // 2, 1])
def test_what_was_prepared_holds_the_same(
    seen: Seen, tmp_path: Path, budget_bytes: int, expected_bytes: int
) -> None:
    for held in held_sink(seen, budget_bytes, tmp_path):
        held.prepare(expected_bytes)
        held.hold()
        given = filled(held)
        assert seen.calls == []
        assert (held.spooled_bytes > 0) == (budget_bytes < 4 * MIB)
        held.drain()
        assert seen.calls == given


def test_no_more_disk_is_prepared_than_may_be_used(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "memory_available_bytes", lambda: 25 * MIB)
    looks: list[int] = []
    for held in held_sink(seen, 1, tmp_path):
        held.prepare(1 << 40, lambda: looks.append(1))
    assert len(looks) < 8, "a piece each"


def test_what_is_prepared_for_a_dump_that_was_given_up_is_not_gone_on_with(
    seen: Seen, tmp_path: Path
) -> None:
    class GivenUp(Exception):
        pass

    def check() -> None:
        raise GivenUp

    for budget_bytes in (1, 8 * MIB):
        for held in held_sink(seen, budget_bytes, tmp_path):
            with pytest.raises(GivenUp):
                held.prepare(8 * MIB, check)


@pytest.mark.parametrize("prepared_bytes", [0, 3 * MIB])
def test_a_disk_that_others_fill_meanwhile_is_left_to_them(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared_bytes: int
) -> None:
    full = SimpleNamespace(f_frsize=MIB, f_blocks=100, f_bavail=15)
    for held in held_sink(seen, MIB, tmp_path):
        held.prepare(prepared_bytes)
        monkeypatch.setattr(os, "fstatvfs", lambda descriptor: full)
        held.hold()
        given = filled(held)
        assert held.spooled_bytes == max(0, prepared_bytes - MIB), "what was there already"
        held.drain()
        assert seen.calls == given


@pytest.mark.parametrize("budget_bytes", [0, 8 * MIB])
def test_without_a_budget_nothing_is_held(seen: Seen, tmp_path: Path, budget_bytes: int) -> None:
    for held in held_sink(seen, budget_bytes, tmp_path):
        if not budget_bytes:
            held.hold()
        assert filled(held) == seen.calls
        assert held.spooled_bytes == 0
