"""What is packed before a container stands still is what packing it at the cut would give, whoever
writes when and how.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.engines.container import ahead, pack
from agent.engines.container.ahead import Ahead
from agent.engines.criu.spool import Spool
from agent.host import clock

_SETTLED_NS = 30_000_000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


class Rootfs:
    """An overlay as a container has one: ``seen`` is what its processes see."""

    def __init__(self, folder: Path) -> None:
        lower, self.upper, work, self.seen = (folder / name for name in ("l", "u", "w", "seen"))
        for each in (lower, self.upper, work, self.seen):
            each.mkdir()
        (lower / "below").write_text("from the image")
        options = f"lowerdir={lower},upperdir={self.upper},workdir={work}"
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, str(self.seen)], check=True
        )
        self._spool = Spool(str(folder))
        (self.seen / "etc").mkdir()
        for number in range(4):
            (self.seen / f"etc/{number}").write_bytes(bytes([number]) * 9000)
        (self.seen / "link").symlink_to("etc/0")
        (self.seen / "below").unlink()

    def close(self) -> None:
        self._spool.close()
        subprocess.run(["umount", str(self.seen)], check=True)

    def settle(self) -> None:
        """Wait until what was changed so far lies back far enough."""
        last_ns = max(each.lstat().st_ctime_ns for each in [self.upper, *self.upper.rglob("*")])
        assert clock.wait_until(
            lambda: clock.wall_s() * 1e9 > last_ns + 2 * _SETTLED_NS, clock.Deadline.after(10)
        )

    def look_ahead(self) -> Ahead:
        self.settle()
        fd = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return Ahead(fd, self._spool, clock.Deadline.after(60), whiteouts=True)
        finally:
            os.close(fd)

    def packed(self, known: Ahead | None = None, most_bytes: int = 1 << 20) -> bytes:
        """The tree as it is. Where something is ``known`` the stream is read when the tree has
        changed again, unless more than ``most_bytes`` were not.
        """
        fd = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = pack.Pack(fd, clock.Deadline.after(60), whiteouts=True, known=known)
            if known is None or not found.read_changed(most_bytes):
                return found.read()
        finally:
            os.close(fd)
        _overwrite(self.seen / "etc/3")
        return found.read()

    def known(self, looked: Ahead, path: str) -> bool:
        return looked.entry(path, (self.upper / path).lstat()) is not None


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"when the job runs again")


@pytest.fixture
def rootfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rootfs]:
    monkeypatch.setattr(ahead, "_SETTLED_NS", _SETTLED_NS)
    made = Rootfs(tmp_path)
    try:
        yield made
    finally:
        made.close()


def _same_length_and_time(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _through_a_mapping(file: Path) -> None:
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[0] = 77


def _replaced(file: Path) -> None:
    new = file.with_name("new")
    new.write_bytes(b"y" * 9000)
    new.rename(file)


def _a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda file: None,
    "same length and time": _same_length_and_time,
    "through a mapping": _through_a_mapping,
    "replaced": _replaced,
    "shorter": lambda file: os.truncate(file, 5),
    "mode": lambda file: file.chmod(0o600),
    "owner": lambda file: os.chown(file, 7, 7),
    "attribute": lambda file: os.setxattr(file, "user.a", b"1"),
    "gone": lambda file: file.unlink(),
    "another name": lambda file: os.link(file, file.with_name("0")),
    "a directory": _a_directory,
    "renamed": lambda file: file.rename(file.with_name("other")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_changed_since_is_read_at_the_cut(
    rootfs: Rootfs, change: Callable[[Path], object]
) -> None:
    looked = rootfs.look_ahead()
    assert all(rootfs.known(looked, path) for path in (".", "etc", "etc/1", "link", "below"))
    (rootfs.seen / "etc/0").unlink()
    change(rootfs.seen / "etc/1")
    wanted = rootfs.packed()
    assert rootfs.known(looked, "etc/2")
    assert rootfs.packed(looked) == wanted
    assert rootfs.packed() != wanted  # it was read after the job had gone on


def test_more_than_may_be_held_is_read_as_it_comes(rootfs: Rootfs) -> None:
    looked = rootfs.look_ahead()
    (rootfs.seen / "etc/1").write_bytes(bytes(50_000))
    wanted = rootfs.packed()
    assert rootfs.packed(looked, most_bytes=10_000) == wanted


def test_what_is_open_for_writing_is_left_for_the_cut(rootfs: Rootfs) -> None:
    with (rootfs.seen / "etc/1").open("r+b"), (rootfs.seen / "etc/2").open("rb"):
        looked = rootfs.look_ahead()
    assert not rootfs.known(looked, "etc/1")
    assert rootfs.known(looked, "etc/2")


def test_nor_is_it_known_what_is_written_through_a_mapping_without_a_trace(rootfs: Rootfs) -> None:
    file = rootfs.seen / "etc/1"
    fd = os.open(file, os.O_RDWR)
    shared = _libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    try:
        # The page is writable already, and the file's times say nothing of the second write, unless
        # the kernel has written the page to the disk meanwhile.
        for _ in range(20):
            ctypes.memset(shared, 65, 1)
            looked = rootfs.look_ahead()
            before_ns = (rootfs.upper / "etc/1").stat().st_ctime_ns
            ctypes.memset(shared, 66, 1)
            if (rootfs.upper / "etc/1").stat().st_ctime_ns == before_ns:
                break
        assert (rootfs.upper / "etc/1").stat().st_ctime_ns == before_ns
        wanted = rootfs.packed()
        assert rootfs.packed(looked) == wanted
    finally:
        _libc.munmap(ctypes.c_void_p(shared), 4096)


def test_where_a_write_may_leave_no_trace_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "_SETTLED_NS", _SETTLED_NS)
    folder = tmp_path / "memory"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)
    spool = Spool(str(tmp_path))
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        file = folder / "file"
        file.write_bytes(b"a" * 9000)
        settled_ns = file.stat().st_ctime_ns + 2 * _SETTLED_NS
        clock.wait_until(lambda: clock.wall_s() * 1e9 > settled_ns, clock.Deadline.after(10))
        looked = Ahead(root, spool, clock.Deadline.after(60))
        before_ns = file.stat().st_ctime_ns
        with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
            assert mapped[0] == ord("a")
            mapped[0] = ord("b")
        # Read first, the page was writable already: nobody writes to it now, and nothing tells.
        assert file.stat().st_ctime_ns == before_ns
        wanted = pack.Pack(root, clock.Deadline.after(60)).read()
        assert pack.Pack(root, clock.Deadline.after(60), known=looked).read() == wanted
    finally:
        os.close(root)
        spool.close()
        subprocess.run(["umount", str(folder)], check=True)


def test_what_changed_a_moment_ago_is_left_for_the_cut(
    rootfs: Rootfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rootfs.settle()
    monkeypatch.setattr(ahead, "_SETTLED_NS", 3_600_000_000_000)
    looked = rootfs.look_ahead()
    assert not rootfs.known(looked, "etc/1")
    wanted = rootfs.packed()
    assert rootfs.packed(looked) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_between_the_two_looks(rootfs: Rootfs, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(6):
        looked = rootfs.look_ahead()
        for _ in range(chance.randrange(6)):
            files = sorted(
                each for each in rootfs.seen.rglob("*") if each.is_file() and each.name != "3"
            )
            # What a name is taken for already is not changed in every way.
            with contextlib.suppress(FileExistsError, IsADirectoryError):
                chance.choice(list(CHANGES.values()))(chance.choice(files))
                (rootfs.seen / f"made{chance.randrange(9)}").write_bytes(chance.randbytes(300))
        wanted = rootfs.packed()
        assert rootfs.packed(looked) == wanted
