"""A directory as a volume: what the contract cannot say of every kind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.volumes.directory import DirectoryVolume

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "volume"


@pytest.fixture
def volume(root: Path) -> DirectoryVolume:
    return DirectoryVolume(str(root), create=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _write_mib(volume: DirectoryVolume, name: str, count: int) -> None:
    with volume.create(name) as writer:
        for _ in range(count):
            writer.write(bytes(1 << 20))
        writer.commit()


def test_the_directory_must_exist_unless_asked_to_make_it(root: Path) -> None:
    with pytest.raises(errors.VolumeGone, match="cannot be opened"):
        DirectoryVolume(str(root))
    DirectoryVolume(str(root), create=True).put("a", b"x")
    assert DirectoryVolume(str(root)).read("a") == b"x"


def test_others_cannot_read_what_a_job_had_in_memory(volume: DirectoryVolume, root: Path) -> None:
    volume.put("a/b", b"x")
    for path in (root, root / "a", root / "a/b"):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("target", ["outside", "a/real"])
def test_a_planted_link_is_not_followed(
    volume: DirectoryVolume, root: Path, tmp_path: Path, target: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    volume.put("a/real/blob", b"x")
    (root / "link").symlink_to(outside if target == "outside" else root / target)
    (root / "file").symlink_to(outside / "secret")
    for name in ("link/secret", "link/blob", "file"):
        with pytest.raises(errors.VolumeError):
            volume.read(name)
        with pytest.raises(errors.VolumeError):
            volume.info(name)
    with pytest.raises(errors.VolumeError):
        volume.put("link/new", b"x")
    with pytest.raises(errors.VolumeError):
        volume.delete("link/secret")
    with pytest.raises(errors.BlobExists):
        volume.put("file", b"x")
    assert [info.name for info in volume.list()] == ["a/real/blob"]
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


def test_a_fifo_in_place_of_a_blob_does_not_hold_a_reader_up(
    volume: DirectoryVolume, root: Path
) -> None:
    os.mkfifo(root / "fifo")
    with pytest.raises(errors.VolumeError, match="not a regular file"):
        volume.read("fifo")


def test_a_lost_reply_to_the_link_is_seen_through(
    volume: DirectoryVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def link(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", link)
    volume.put("a", b"x")
    assert volume.read("a") == b"x"


@pytest.mark.parametrize(
    ("number", "condition"),
    [
        (errno.ENOSPC, errors.VolumeFull),
        (errno.EDQUOT, errors.VolumeFull),
        (errno.EROFS, errors.VolumeGone),
        (errno.ESTALE, errors.VolumeGone),
        (errno.ENOTCONN, errors.VolumeGone),
        (errno.EIO, errors.VolumeError),
        (errno.EACCES, errors.VolumeError),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync", "link", "open", "mkdir"])
def test_a_failing_call_is_understood_and_nothing_stays(
    volume: DirectoryVolume,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    condition: type[errors.VolumeError],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    volume.put("warm", b"x")
    original: Callable[..., int] = os.open
    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr(
                os, "open", lambda *a, **k: fail() if "dir_fd" in k else original(*a, **k)
            )
        else:
            patch.setattr(os, call, fail)
        with pytest.raises(errors.VolumeError) as caught:
            _write_mib(volume, "folder/blob", 33)
    assert type(caught.value) is condition
    assert isinstance(caught.value.__cause__, OSError)
    assert [info.name for info in volume.list()] == ["warm"]
    assert os.listdir(root / ".unfinished") == []


def test_a_failed_write_spoils_the_blob_for_good(
    volume: DirectoryVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, data: bytes) -> int:
        raise OSError(errno.EIO, "I/O error")

    with volume.create("a") as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with pytest.raises(errors.VolumeError):
                writer.write(b"x")
        with pytest.raises(errors.VolumeError):
            writer.commit()
    assert list(volume.list()) == []


@needs_root
def test_a_full_disk_is_told_and_leaves_room_again(small: Path) -> None:
    volume = DirectoryVolume(str(small))
    with pytest.raises(errors.VolumeFull) as caught:
        _write_mib(volume, "big", 10)
    assert caught.value.hint != ""
    assert list(volume.list()) == []
    free = volume.space().free_bytes
    assert free is not None
    assert free > 3 << 20


@needs_root
def test_a_read_only_volume_is_gone(small: Path) -> None:
    volume = DirectoryVolume(str(small))
    volume.put("a", b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(errors.VolumeGone):
        volume.put("b", b"x")
    with pytest.raises(errors.VolumeGone):
        volume.space()
    assert volume.read("a") == b"x"


@needs_root
def test_an_unmounted_volume_is_gone_and_nothing_lands_on_the_disk_below(
    small: Path, tmp_path: Path
) -> None:
    volume = DirectoryVolume(str(small))
    volume.put("a", b"x")
    subprocess.run(["umount", str(small)], check=True)  # no descriptor of ours is in the way
    try:
        with pytest.raises(errors.VolumeGone, match="another directory"):
            volume.put("b", b"x")
        with pytest.raises(errors.VolumeGone):
            list(volume.list())
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(small)], check=True)


def test_a_removed_volume_is_gone(volume: DirectoryVolume, root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    with pytest.raises(errors.VolumeGone):
        volume.read("a")
    with pytest.raises(errors.VolumeGone):
        volume.put("a", b"x")
    with pytest.raises(errors.VolumeGone):
        volume.space()


_KILLED = """
import sys, os, signal
from agent.volumes.directory import DirectoryVolume
volume = DirectoryVolume(sys.argv[1])
with volume.create("half/blob") as writer:
    writer.write(b"x" * (40 << 20))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_only_what_a_sweep_removes(
    volume: DirectoryVolume, root: Path
) -> None:
    died = subprocess.run([sys.executable, "-c", _KILLED, str(root)], check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert list(volume.list()) == []
    assert len(os.listdir(root / ".unfinished")) == 1
    assert volume.sweep(3600.0) == 0
    assert volume.sweep(0.0) == 1
    assert os.listdir(root / ".unfinished") == []


def test_a_name_that_was_visible_is_never_taken_back(
    volume: DirectoryVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have acted on it; so it stays, and whoever meets it makes it durable."""
    volume.put("folder/warm", b"x")
    linked: list[bool] = []
    link, fsync = os.link, os.fsync

    def note_link(*args: Any, **kwargs: Any) -> None:
        link(*args, **kwargs)
        linked.append(True)

    def then_fail(fd: int) -> None:
        if linked:
            raise OSError(errno.EIO, "I/O error")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", note_link)
        patch.setattr(os, "fsync", then_fail)
        with pytest.raises(errors.VolumeError):
            volume.put("folder/name", b"first")
    assert volume.read("folder/name") == b"first"
    synced: list[str] = []

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    with pytest.raises(errors.BlobExists):
        volume.put("folder/name", b"second")
    assert synced[-1].endswith("/folder")
