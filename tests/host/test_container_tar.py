"""Tar streams of container files: what is packed comes back, and a hostile one harms nothing."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.container import pack, unpack
from agent.host import clock


def soon() -> clock.Deadline:
    return clock.Deadline.after(60)


def pieces(raw: bytes) -> Iterator[bytes]:
    for at in range(0, len(raw), 1000):
        yield raw[at : at + 1000]


class Hostile:
    """A tar archive put together entry by entry."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._out, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(
        self, name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **more: Any
    ) -> None:
        info = tarfile.TarInfo(name)
        info.type = kind
        info.size = len(content)
        for key, value in more.items():
            setattr(info, key, value)
        self._tar.addfile(info, io.BytesIO(content))

    @property
    def raw(self) -> bytes:
        self._tar.close()
        return self._out.getvalue()


def counted(raw: bytes) -> unpack.Limits:
    """What an image would say of this archive, as far as it can be read."""
    entries = content_bytes = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r|") as stream:
            for info in stream:
                entries += 1
                content_bytes += info.size
    except (tarfile.TarError, ValueError, EOFError):
        entries += 1
    return unpack.Limits(entries, content_bytes)


class Place:
    """A tree to unpack into, beside something that must not be touched."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("untouched")

    def apply(self, raw: bytes, *, limits: unpack.Limits | None = None, **options: Any) -> None:
        limits = limits or counted(raw)
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        options.setdefault("whiteouts", True)
        try:
            unpack.inspect("/a.tar", pieces(raw), limits, whiteouts=options["whiteouts"])
            unpack.apply("/a.tar", pieces(raw), limits, fd, soon(), **options)
        finally:
            os.close(fd)

    def pack(self, **options: Any) -> tuple[bytes, pack.Content]:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            packed = pack.Pack(fd, soon(), **options)
            return packed.read(), packed.content
        finally:
            os.close(fd)

    def assert_untouched(self) -> None:
        assert [each.name for each in self.outside.iterdir()] == ["secret"]
        assert (self.outside / "secret").read_text() == "untouched"
        assert stat.S_IMODE((self.outside / "secret").stat().st_mode) == 0o644


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "more", "why"),
    [
        ("../outside/secret", tarfile.REGTYPE, {}, "leads out"),
        ("a/../../outside/secret", tarfile.REGTYPE, {}, "leads out"),
        ("/etc/passwd", tarfile.REGTYPE, {}, "leads out"),
        ("disk", tarfile.BLKTYPE, {"devmajor": 8}, "kind"),
        ("mem", tarfile.CHRTYPE, {"devmajor": 1, "devminor": 1}, "device"),
        ("link", tarfile.LNKTYPE, {"linkname": "../outside/secret"}, "leads out"),
        ("link", tarfile.LNKTYPE, {"linkname": "/etc/passwd"}, "leads out"),
        ("link", tarfile.LNKTYPE, {"linkname": "."}, "link to the root"),
        (".", tarfile.REGTYPE, {}, "root is no directory"),
        (".", tarfile.SYMTYPE, {"linkname": "/"}, "root is no directory"),
        ("odd", b"V", {}, "kind"),
        ("empty", tarfile.SYMTYPE, {"linkname": ""}, "impossible link"),
        ("attr", tarfile.REGTYPE, {"pax_headers": {"SCHILY.xattr.trusted.x": "1"}}, "attribute"),
        ("attr", tarfile.REGTYPE, {"pax_headers": {"SCHILY.xattr.security.ima": "1"}}, "attribute"),
        ("time", tarfile.REGTYPE, {"pax_headers": {"mtime": "soon"}}, "not a tar|cut short"),
        ("owner", tarfile.REGTYPE, {"uid": 2**32 - 1}, "owner"),
    ],
)
def test_a_hostile_entry_is_refused_before_anything_is_written(
    place: Place, name: str, kind: bytes, more: dict[str, Any], why: str
) -> None:
    hostile = Hostile()
    hostile.add("innocent", content=b"x")
    hostile.add(name, kind, **more)
    with pytest.raises(errors.Corrupt, match=why):
        place.apply(hostile.raw)
    assert list(place.root.iterdir()) == []
    place.assert_untouched()


def test_whiteouts_are_for_root_file_systems_only(place: Place) -> None:
    hostile = Hostile()
    hostile.add("gone", tarfile.CHRTYPE)
    with pytest.raises(errors.Corrupt, match="device"):
        place.apply(hostile.raw, whiteouts=False)


@pytest.mark.parametrize("planted", ["in the archive", "in the container"])
def test_nothing_is_written_through_a_link(place: Place, planted: str) -> None:
    hostile = Hostile()
    if planted == "in the archive":
        hostile.add("way", tarfile.SYMTYPE, linkname=str(place.outside))
    else:
        (place.root / "way").symlink_to(place.outside)
    hostile.add("way/secret", content=b"overwritten")
    with pytest.raises(errors.Corrupt, match="not a directory"):
        place.apply(hostile.raw)
    place.assert_untouched()


def test_a_file_in_the_place_of_a_link_replaces_the_link_only(place: Place) -> None:
    (place.root / "file").symlink_to(place.outside / "secret")
    archive = Hostile()
    archive.add("file", content=b"new", mode=0o600)
    archive.add("hard", tarfile.LNKTYPE, linkname="file")
    place.apply(archive.raw)
    assert (place.root / "file").read_bytes() == (place.root / "hard").read_bytes() == b"new"
    place.assert_untouched()


def test_a_directory_in_the_place_of_a_link_replaces_the_link_only(place: Place) -> None:
    (place.root / "way").symlink_to(place.outside)
    archive = Hostile()
    archive.add("way", tarfile.DIRTYPE, mode=0o700)
    archive.add("way/file", content=b"new")
    place.apply(archive.raw)
    assert (place.root / "way" / "file").read_bytes() == b"new"
    place.assert_untouched()


def test_a_whiteout_of_a_link_to_a_directory_removes_the_link_only(place: Place) -> None:
    (place.root / "way").symlink_to(place.outside)
    archive = Hostile()
    archive.add("way", tarfile.CHRTYPE)
    place.apply(archive.raw)
    assert list(place.root.iterdir()) == []
    place.assert_untouched()


def test_a_directory_that_is_opaque_loses_what_it_had(place: Place) -> None:
    (place.root / "folder" / "deep").mkdir(parents=True)
    (place.root / "folder" / "deep" / "old").write_text("old")
    (place.root / "folder" / "way").symlink_to(place.outside)
    archive = Hostile()
    archive.add("folder", tarfile.DIRTYPE, mode=0o755, pax_headers={pack.XATTR + pack.OPAQUE: "y"})
    archive.add("folder/new", content=b"new")
    place.apply(archive.raw)
    assert [each.name for each in (place.root / "folder").iterdir()] == ["new"]
    place.assert_untouched()


def test_clearing_leaves_directories_of_the_archive_sockets_and_mounts(place: Place) -> None:
    for folder in ("kept/gone/deep", "other/busy", "mounted"):
        (place.root / folder).mkdir(parents=True)
    before = (place.root / "kept").stat().st_ino
    for name in ("kept/file", "kept/gone/deep/file", "other/file", "mounted/file", "config"):
        (place.root / name).write_text("of an init container")
    (place.root / "kept/way").symlink_to(place.outside)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.root / "other/busy/socket"))
    archive = Hostile()
    archive.add("kept", tarfile.DIRTYPE, mode=0o755)
    archive.add("kept/new", content=b"new")
    fd = os.open(place.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        raw, mounts = archive.raw, ["/mounted", "/config"]
        unpack.clear("/a.tar", pieces(raw), counted(raw), fd, soon(), mounts=mounts)
    finally:
        os.close(fd)
    left = {str(each.relative_to(place.root)) for each in place.root.rglob("*")}
    assert left == {
        *("kept", "other", "other/busy", "other/busy/socket"),
        *("mounted", "mounted/file", "config"),
    }
    assert (place.root / "kept").stat().st_ino == before
    place.assert_untouched()


def test_what_is_mounted_stays(place: Place) -> None:
    (place.root / "etc").mkdir()
    (place.root / "etc" / "hosts").write_text("the runtime's")
    (place.root / "proc" / "sub").mkdir(parents=True)
    archive = Hostile()
    archive.add("etc", tarfile.DIRTYPE, mode=0o755)
    archive.add("etc/hosts", content=b"overwritten")
    archive.add("proc/sub/file", content=b"below")
    archive.add("etc/other", content=b"new")
    place.apply(archive.raw, mounts=["/etc/hosts", "/proc"])
    assert (place.root / "etc" / "hosts").read_text() == "the runtime's"
    assert (place.root / "etc" / "other").read_text() == "new"
    assert list((place.root / "proc" / "sub").iterdir()) == []
    removal = Hostile()
    removal.add("etc", tarfile.CHRTYPE)
    with pytest.raises(errors.RestoreFailed, match="holds a mount"):
        place.apply(removal.raw, mounts=["/etc/hosts"])
    assert (place.root / "etc" / "hosts").exists()


def test_more_than_the_image_says_is_refused(place: Place) -> None:
    archive = Hostile()
    for number in range(20):
        archive.add(f"file{number}", content=b"x" * 100)
    raw = archive.raw
    with pytest.raises(errors.Corrupt, match="more than the image says"):
        place.apply(raw, limits=unpack.Limits(19, 1 << 20))
    with pytest.raises(errors.Corrupt, match="more than the image says"):
        place.apply(raw, limits=unpack.Limits(20, 1999))
    assert list(place.root.iterdir()) == []
    place.apply(raw, limits=unpack.Limits(20, 2000))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_refused_unread(place: Place, kind: bytes) -> None:
    """Its size is only announced: whoever allocated it would be gone."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type = kind
    info.size = 1 << 32
    raw = info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 16)
    with pytest.raises(errors.Corrupt, match="too long"):
        place.apply(raw)


def test_archives_that_are_cut_short_or_no_archives_are_refused(place: Place) -> None:
    archive = Hostile()
    archive.add("first")
    archive.add("file", content=b"x" * 5000)
    raw = archive.raw
    # The last one lacks a whole entry: the rest of it is an archive.
    for bad in (
        raw[:700],
        raw[:3000],
        b"no archive" * 200,
        b"",
        bytes(100),
        raw[:512] + bytes(1024),
    ):
        with pytest.raises(errors.Corrupt):
            place.apply(bad, limits=unpack.Limits(2, 5000))
    assert list(place.root.iterdir()) == []


def test_every_kind_comes_back(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    old, new = Place(tmp_path / "a"), Place(tmp_path / "b")
    root = old.root
    (root / "folder").mkdir()
    (root / "folder" / "file").write_bytes(os.urandom(3 << 20))
    (root / "folder" / "odd \n name \udcff").write_bytes(b"")
    os.link(root / "folder" / "file", root / "hard")
    (root / "soft").symlink_to("folder/nowhere")
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "gone", stat.S_IFCHR, 0)
    (root / "empty").write_bytes(b"")
    (root / ("long" * 60)).write_bytes(b"long")
    os.setxattr(root / "empty", "user.binary", b"\0\xff\n=")
    os.setxattr(root / "folder", pack.OPAQUE, b"y")
    os.chown(root / "hard", 1234, 65534)
    os.chmod(root / "hard", 0o6751)
    os.chmod(root / "folder", 0o1733)
    os.chmod(root, 0o1770)
    for path in (root / "hard", root / "folder"):
        os.utime(path, ns=(0, 1_000_000_007))
    os.utime(root / "soft", ns=(5, -5_000_000_123), follow_symlinks=False)
    (new.root / "gone").write_text("of the image")
    (new.root / "folder").mkdir()
    (new.root / "folder" / "hidden").write_text("of the image")
    raw, content = old.pack(whiteouts=True)
    assert content.skipped == []
    for _ in range(2):  # again: the same
        new.apply(raw, limits=unpack.Limits(content.entries, content.content_bytes))
        os.unlink(root / "gone") if (root / "gone").exists() else None
        os.removexattr(root / "folder", pack.OPAQUE) if listed(root / "folder") else None
        assert described(new.root) == described(root)


def listed(path: Path) -> bool:
    return pack.OPAQUE in os.listxattr(path)


def described(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted([root, *root.rglob("*")]):
        info = path.lstat()
        kind = stat.S_IFMT(info.st_mode)
        found[str(path.relative_to(root))] = (
            info.st_mode,
            info.st_uid,
            info.st_gid,
            info.st_mtime_ns if path.name != "root" else 0,
            info.st_nlink if kind == stat.S_IFREG else 0,
            path.read_bytes() if kind == stat.S_IFREG else b"",
            os.readlink(path) if kind == stat.S_IFLNK else "",
            {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
            },
        )
    return found


def test_a_tree_of_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    old, new = Place(tmp_path / "a"), Place(tmp_path / "b")
    depth = 1200  # the interpreter would give up at 1000
    folder = os.open(old.root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    raw, content = old.pack()
    assert content.entries == depth + 1
    new.apply(raw, limits=unpack.Limits(content.entries, 0))
    again, _ = new.pack()
    assert again == raw
    # pytest's own way to remove it is recursive.
    subprocess.run(["rm", "-rf", str(old.root), str(new.root)], check=True)


def test_sockets_and_devices_are_left_out_by_name(place: Place) -> None:
    os.mknod(place.root / "device", stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(place.root / "socket", stat.S_IFSOCK)
    os.mknod(place.root / "whiteout", stat.S_IFCHR, 0)
    assert place.pack(whiteouts=True)[1].skipped == ["device", "socket"]
    assert place.pack(whiteouts=False)[1].skipped == ["device", "socket", "whiteout"]


def test_an_overlay_that_renamed_a_directory_of_the_image_is_refused(place: Place) -> None:
    (place.root / "folder").mkdir()
    os.setxattr(place.root / "folder", "trusted.overlay.redirect", b"/other")
    with pytest.raises(errors.DumpFailed, match="redirect"):
        place.pack(whiteouts=True)


def test_what_is_left_out_is_left_out_with_all_below(place: Place) -> None:
    (place.root / "proc" / "deep").mkdir(parents=True)
    (place.root / "kept").write_text("kept")
    raw, content = place.pack(without={"proc"})
    assert content.entries == 2
    with tarfile.open(fileobj=io.BytesIO(raw)) as found:
        assert found.getnames() == [".", "kept"]


def test_a_tree_that_changes_into_links_while_it_is_packed_gives_nothing_away(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was a file a moment ago is a link to something else when it is opened."""
    (place.root / "file").write_text("own")
    swapped: list[int] = []
    real = os.open

    def racing(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if path == "file" and not swapped:
            swapped.append(1)
            os.unlink(place.root / "file")
            (place.root / "file").symlink_to(place.outside / "secret")
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", racing)
    with pytest.raises(errors.DumpFailed):
        place.pack()
    assert swapped
