"""A checkpoint archive is taken apart whole and exactly, or refused by name."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from agent import errors
from agent.engines.criu import images
from agent.engines.kubelet import archive, ingest, layer, tarindex
from agent.model.streams import PAGE_BYTES, AddressSpace
from tests import archives
from tests.archives import Entry
from tests.host.image import MemoryImage
from tests.images import page


def take(path: str) -> tuple[MemoryImage, ingest.Taken]:
    image = MemoryImage()
    with archive.opened(path) as source:
        taken = ingest.ingest(source, image, {"kernel": "6.1"})
    return image, taken


def take_entries(folder: Path, entries: tuple[Entry, ...]) -> tuple[MemoryImage, ingest.Taken]:
    return take(archives.write(folder / "a.tar", archives.tar(entries)))


def refused(folder: Path, entries: tuple[Entry, ...], words: str) -> None:
    with pytest.raises(errors.Corrupt, match=words):
        take_entries(folder, entries)


def with_image(name: str, content: bytes) -> tuple[Entry, ...]:
    return archives.entries(archives.criu_images() | {name: content})


def memory(image: MemoryImage, space: AddressSpace) -> dict[int, tuple[int, bytes]]:
    return {
        run.address // PAGE_BYTES + at: (run.flags, data[at * PAGE_BYTES :][:PAGE_BYTES])
        for run, data in image.runs_of[space]
        for at in range(run.pages)
    }


def expected(runs: archives.Runs) -> dict[int, tuple[int, bytes]]:
    return {
        first + at: (flags, page(number))
        for first, flags, numbers in runs
        for at, number in enumerate(numbers)
    }


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_everything_of_an_archive_reaches_the_sink(tmp_path: Path, format: int) -> None:  # noqa: A002
    path = archives.write(tmp_path / "a.tar", archives.tar(archives.entries(), format))
    image, taken = take(path)

    spaces = {
        AddressSpace("process", 1): archives.FIRST,
        AddressSpace("process", 7): archives.SECOND,
        AddressSpace("shmem", 99): archives.SHARED,
    }
    assert {space: memory(image, space) for space in image.runs_of} == {
        space: expected(runs) for space, runs in spaces.items()
    }
    assert taken.memory_bytes == (25 + 3 + 2) * PAGE_BYTES
    kept = {
        name: content
        for name, content in archives.criu_images().items()
        if not name.startswith(("pages-", "pagemap-"))
    }
    beside = archives.parts()
    other = ("dump.log", "container.log", "rootfs-diff.tar")
    kept |= {name: beside[name] for name in beside if name not in other}
    assert image.images == kept
    # An entry alone would be that of the root.
    assert tree(image) == {"tmp/new": ("0", b"made by the job", "", {}), ".": ("5", b"", "", {})}


def test_the_facts_are_those_of_the_container(tmp_path: Path) -> None:
    image, taken = take_entries(tmp_path, archives.entries())
    known = image.known
    assert known is not None
    assert known == taken.facts
    assert known["layout"] == "container-1"
    assert (known["kernel"], known["root"], known["volumes"]) == ("6.1", 1, [])
    container = known["container"]
    assert (container["namespace"], container["pod"], container["name"]) == ("team", "pod-1", "c")
    assert container["image_digest"] == "sha256:" + "ab" * 32
    assert container["stdio"] == ["/dev/null", "pipe:[4711]", "pipe:[4711]"]
    assert (container["mounts"], container["memory_limit_bytes"]) == (["/proc"], 1 << 30)
    assert container["capabilities"] == 1 << 21 | 1 << 40
    assert known["threads"] == [[1, [1]], [7, [7]]]
    first, second = known["processes"]
    assert (first["pid"], first["comm"], first["exe"]) == (1, "job", "/usr/bin/job")
    assert (first["uid"], first["gid"], first["cwd"]) == (1000, 100, "/work")
    assert first["memory"]["anon_bytes"] == 25 * PAGE_BYTES
    assert (second["pid"], second["ppid"], second["state"]) == (7, 1, "S")
    assert known["sockets"][0] == {
        "pid": 1,
        "fd": 5,
        "kind": "tcp",
        "local": "10.0.0.1:8080",
        "remote": "10.0.0.2:40000",
        "state": "established",
    }
    assert known["rootfs"]["name"] == "/rootfs-diff.tar"
    assert known["rootfs"]["content_bytes"] == len(b"made by the job")
    assert known["spaces"] == [["process", 1], ["process", 7], ["shmem", 99]]


def test_an_address_space_without_a_page_is_known(tmp_path: Path) -> None:
    changed = archives.criu_images() | {
        "pagemap-7.img": archives.pagemap(2, ()),
        "pages-2.img": b"",
    }
    image, _ = take_entries(tmp_path, archives.entries(changed))
    assert image.known is not None
    assert ["process", 7] in image.known["spaces"]
    assert AddressSpace("process", 7) not in image.runs_of


def test_page_maps_of_criu_before_4_2_are_understood(tmp_path: Path) -> None:
    pb = archives.pb
    old = images.dump(
        "pagemap",
        [
            pb.pagemap_head(pages_id=2),
            pb.pagemap_entry(vaddr=32 * PAGE_BYTES, compat_nr_pages=3, in_parent=False),
        ],
    )
    image, _ = take_entries(tmp_path, with_image("pagemap-7.img", old))
    assert memory(image, AddressSpace("process", 7)) == expected(archives.SECOND)


def test_a_zombie_has_no_memory_and_no_files(tmp_path: Path) -> None:
    found = archives.criu_images()
    pb = archives.pb
    core = images.load("core", "core", found["core-7.img"], pb.core_entry)[0]
    core.tc.task_state = 2
    found["core-7.img"] = images.dump("core", [core])
    for name in ("ids-7.img", "mm-7.img", "fs-7.img", "fdinfo-7.img", "pagemap-7.img"):
        del found[name]
    del found["pages-2.img"]
    image, _ = take_entries(tmp_path, archives.entries(found))
    assert image.known is not None
    assert image.known["processes"][1]["state"] == "Z"


HOSTILE = [
    (Entry("../escape", b"x"), "leads out"),
    (Entry("checkpoint/../../escape", b"x"), "leads out"),
    (Entry("/etc/passwd", b"x"), "absolute"),
    (Entry("checkpoint/core-9.img", type=tarfile.SYMTYPE, link="/etc/shadow"), "is a symlink"),
    (Entry("checkpoint/core-9.img", type=tarfile.LNKTYPE, link="spec.dump"), "is a hardlink"),
    (Entry("checkpoint/core-9.img", type=tarfile.CHRTYPE), "is a device"),
    (Entry("checkpoint/core-9.img", type=tarfile.BLKTYPE), "is a device"),
    (Entry("checkpoint/core-9.img", type=tarfile.FIFOTYPE), "is a fifo"),
    (Entry("checkpoint/core-9.img", type=tarfile.CONTTYPE), "unknown kind"),
    (Entry("checkpoint/core-9.img", type=b"S"), "unknown kind"),
    (Entry("checkpoint/core-1.img", b"again"), "twice"),
    (Entry("./checkpoint/core-1.img", b"again"), "twice"),
    (Entry("checkpoint//core-9.img", b"x"), "not normal"),
    (Entry("checkpoint/deeper/core-9.img", b"x"), "where no checkpoint"),
    (Entry("elsewhere/file", b"x"), "where no checkpoint"),
    (Entry("elsewhere/", type=tarfile.DIRTYPE), "unknown folder"),
    (Entry("checkpoint", b"x"), "where no checkpoint|twice"),
    (Entry("checkpoint/new\nline.img", b"x"), "not what CRIU"),
    (Entry("spec.dump", b"{}"), "twice"),
    (Entry("checkpoint/spec.dump", b"{}"), "twice"),
]


@pytest.mark.parametrize(("entry", "words"), HOSTILE)
def test_what_no_checkpoint_archive_holds_is_refused(
    tmp_path: Path, entry: Entry, words: str
) -> None:
    refused(tmp_path, (*archives.entries(), entry), words)


@pytest.mark.parametrize("name", ["spec.dump", "config.dump"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"9" * 10_000])
def test_a_part_that_is_no_json_object_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    refused(tmp_path, archives.entries(parts_of=archives.parts() | {name: content}), "JSON")


@pytest.mark.parametrize(
    "name", ["spec.dump", "config.dump", "checkpoint/inventory.img", "checkpoint/files.img",
             "checkpoint/core-7.img", "checkpoint/pages-2.img", "checkpoint/pagemap-7.img"],
)  # fmt: skip
def test_a_missing_part_is_named(tmp_path: Path, name: str) -> None:
    entries = tuple(entry for entry in archives.entries() if entry.name != name)
    refused(tmp_path, entries, r"has no|no page map belongs")


SIZES = [
    ("pages-2.img", archives.pages(archives.SECOND)[:-PAGE_BYTES], "cut short"),
    ("pages-2.img", archives.pages(archives.SECOND)[:-1], "does not consist of pages"),
    ("pages-2.img", archives.pages(archives.SECOND) + page(1), "in no page map"),
    ("pages-4.img", page(1), "no page map belongs"),
    ("pagemap-7.img", archives.pagemap(1, archives.SECOND), "of its own"),
    ("pagemap-7.img", archives.pagemap(2, ((32, 5, (2, 3, 40)),)), "earlier dump"),
    ("pagemap-7.img", archives.pagemap(2, ((32, 2, (2, 3, 40)),)), "flags"),
    ("pagemap-7.img", archives.pagemap(2, ((1 << 45, 4, (2, 3, 40)),)), "a run of"),
    ("pagemap-7.img", archives.pagemap(2, ((32, 4, ()),)), "a run of"),
    ("pagemap-7.img", archives.pagemap(2, ((9, 4, (2, 3)), (8, 4, (40,)))), "out of order"),
    ("pagemap-7.img", archives.pagemap(2, archives.SECOND)[:-1], "cut short"),
    ("pagemap-7.img", b"", "not what CRIU"),
    ("pstree.img", images.dump("pstree", []), "no processes"),
    ("core-7.img", b"\x00" * 40, "not what CRIU"),
]


@pytest.mark.parametrize(("name", "content", "words"), SIZES)
def test_images_that_do_not_add_up_are_refused(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    refused(tmp_path, with_image(name, content), words)


def test_a_name_with_leading_zeros_is_no_second_page_map(tmp_path: Path) -> None:
    image, taken = take_entries(tmp_path, with_image("pagemap-07.img", b"whatever"))
    assert image.images["pagemap-07.img"] == b"whatever"
    assert taken.facts["spaces"].count(["process", 7]) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"[" * 100_000])
def test_standard_streams_that_are_no_names_are_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, with_image("descriptors.json", content), "descriptors.json")


LAYERS = [
    ((Entry("../out", b"x"),), "leads out"),
    ((Entry("/abs", b"x"),), "absolute"),
    ((Entry("link", type=tarfile.LNKTYPE, link="/etc/shadow"),), "absolute"),
    ((Entry("link", type=tarfile.LNKTYPE, link="../shadow"),), "leads out"),
    ((Entry("twice", b"x"), Entry("twice", b"y")), "twice"),
    ((Entry("dir/.wh..", b""),), "deletes nothing"),
    ((Entry("dir/.wh.", b""),), "deletes nothing"),
    ((Entry("dir/.wh..wh..opq"),), "not a directory in it"),
]


@pytest.mark.parametrize(("entries", "words"), LAYERS)
@pytest.mark.parametrize("packed", [True, False])
def test_a_layer_that_reaches_outside_is_refused(
    tmp_path: Path, entries: tuple[Entry, ...], words: str, packed: bool
) -> None:
    raw = archives.layer(entries) if packed else archives.tar(entries)
    refused(tmp_path, archives.entries(parts_of=archives.parts(raw)), words)


def tree(image: MemoryImage) -> dict[str, tuple[str, bytes, str, dict[str, str]]]:
    """What the image's tar of the root file system says, by path."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(image.contents["/rootfs-diff.tar"])) as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            found[info.name] = (
                info.type.decode(),
                content.read() if content else b"",
                info.linkname,
                dict(info.pax_headers),
            )
            assert info.type != tarfile.CHRTYPE or (info.devmajor, info.devminor) == (0, 0)
    # A restore compares what comes with what was said.
    assert image.known is not None
    about = image.known["rootfs"]
    assert about["entries"] == len(found)
    assert about["content_bytes"] == sum(len(content) for _, content, _, _ in found.values())
    return found


def test_a_layer_may_hold_what_a_root_file_system_holds(tmp_path: Path) -> None:
    raw = archives.tar(
        (
            Entry("dev/", type=tarfile.DIRTYPE),
            Entry("dev/sda", type=tarfile.BLKTYPE),
            Entry("etc/link", type=tarfile.SYMTYPE, link="/anywhere"),
            Entry("etc/hard", type=tarfile.LNKTYPE, link="etc/link"),
            Entry("etc/.wh.gone"),
            Entry("opt/", type=tarfile.DIRTYPE),
            Entry("opt/.wh..wh..opq"),
            Entry("run/pipe", type=tarfile.FIFOTYPE),
        )
    )
    beside = archives.parts(raw) | {"deleted.files": b'["/var/old", "srv/x"]'}
    image, taken = take_entries(tmp_path, archives.entries(parts_of=beside))
    assert tree(image) == {
        "dev": ("5", b"", "", {}),
        "etc/link": ("2", b"", "/anywhere", {}),
        "etc/hard": ("1", b"", "etc/link", {}),
        "etc/gone": ("3", b"", "", {}),
        "opt": ("5", b"", "", {"SCHILY.xattr.trusted.overlay.opaque": "y"}),
        "run/pipe": ("6", b"", "", {}),
        "var/old": ("3", b"", "", {}),
        "srv/x": ("3", b"", "", {}),
    }
    assert taken.facts["rootfs"]["skipped"] == ["dev/sda"]


def test_deletions_alone_are_kept_and_no_change_is_none(tmp_path: Path) -> None:
    beside = archives.parts()
    del beside["rootfs-diff.tar"]
    image, taken = take_entries(tmp_path, archives.entries(parts_of=beside))
    assert (taken.facts["rootfs"], image.file_entries) == (None, [])
    deleted = beside | {"deleted.files": b'["/etc/motd"]'}
    image, taken = take_entries(tmp_path, archives.entries(parts_of=deleted))
    assert tree(image) == {".": ("5", b"", "", {}), "etc/motd": ("3", b"", "", {})}
    image, _ = take_entries(tmp_path, archives.entries(parts_of=beside | {"rootfs-diff.tar": b""}))
    assert tree(image) == {}


def test_owners_modes_times_and_attributes_of_a_layer_are_kept(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("tool")
        info.mode, info.uid, info.gid, info.mtime = 0o4755, 1000, 4_000_000_000, 17
        info.uname = info.gname = "somebody"
        info.pax_headers = {
            "mtime": "17.123456789",
            "SCHILY.xattr.user.note": "kept",
            "SCHILY.xattr.security.capability": "\x01\x02",
            "SCHILY.xattr.trusted.overlay.redirect": "/elsewhere",
            "SCHILY.xattr.security.selinux": "label",
            "LIBARCHIVE.creationtime": "5",
        }
        info.size = 3
        tar.addfile(info, io.BytesIO(b"run"))
    image, _ = take_entries(
        tmp_path, archives.entries(parts_of=archives.parts(gzip.compress(out.getvalue())))
    )
    with tarfile.open(fileobj=io.BytesIO(image.contents["/rootfs-diff.tar"])) as tar:
        found = tar.getmember("tool")
    assert (found.mode, found.uid, found.gid, found.uname) == (0o4755, 1000, 4_000_000_000, "")
    assert found.pax_headers["mtime"] == "17.123456789"
    kept = {key for key in found.pax_headers if key.startswith("SCHILY")}
    assert kept == {"SCHILY.xattr.user.note", "SCHILY.xattr.security.capability"}


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"[", b'["../out"]', b'["a//b"]', b'[""]'])
def test_a_list_of_deletions_that_makes_no_sense_is_refused(tmp_path: Path, content: bytes) -> None:
    beside = archives.parts() | {"deleted.files": content}
    refused(tmp_path, archives.entries(parts_of=beside), "deleted.files|leads out")


def test_a_layer_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.engines.kubelet.layer.CONTENT_BYTES", 1 << 20)
    bomb = archives.layer((Entry("zeros", bytes(8 << 20)),))
    refused(tmp_path, archives.entries(parts_of=archives.parts(bomb)), "a member of")


@pytest.mark.parametrize("cut", [1, 8, 40])
def test_a_layer_that_is_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    raw = archives.layer()[:-cut]
    refused(tmp_path, archives.entries(parts_of=archives.parts(raw)), "gzip")


def test_an_archive_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = archives.tar(archives.entries())
    end = len(whole.rstrip(b"\0"))
    for length in (0, 1, 511, 512, 513, end // 3, end // 2, end - 512, end, end + 512):
        path = archives.write(tmp_path / "a.tar", whole[:length])
        with pytest.raises(errors.Corrupt):
            take(path)


def test_something_behind_the_end_is_refused(tmp_path: Path) -> None:
    whole = archives.tar(archives.entries())
    for tail in (b"x", bytes(4 << 20)):
        path = archives.write(tmp_path / "a.tar", whole + tail)
        with pytest.raises(errors.Corrupt, match="follows its end"):
            take(path)


def test_sizes_that_no_archive_has_are_refused(tmp_path: Path) -> None:
    whole = bytearray(archives.tar((Entry("spec.dump", b"{}"),)))
    whole[124:136] = b"\x80" + (1 << 62).to_bytes(11, "big")
    whole[148:156] = b"%06o\0 " % (sum(whole[:148]) + 8 * 32 + sum(whole[156:512]))
    with pytest.raises(errors.Corrupt, match="a member of"):
        take(archives.write(tmp_path / "a.tar", bytes(whole)))


def test_more_than_the_limits_is_refused(tmp_path: Path) -> None:
    path = archives.write(tmp_path / "a.tar", archives.tar(archives.entries()))
    for limits, words in (
        (tarindex.Limits(members=5), "more than 5 members"),
        (tarindex.Limits(content_bytes=100_000), "100000 bytes|a member of"),
    ):
        with pytest.raises(errors.Corrupt, match=words), archive.opened(path, limits):
            pass
    long_name = archives.tar((Entry("checkpoint/" + "x" * 5000),))
    with pytest.raises(errors.Corrupt, match="name"):
        take(archives.write(tmp_path / "b.tar", long_name))
    with (
        pytest.raises(errors.Corrupt, match="a header of"),
        archive.opened(str(tmp_path / "b.tar"), tarindex.Limits(extension_bytes=100)),
    ):
        pass


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    path = archives.write(tmp_path / "a.tar", archives.tar(archives.entries()))
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name, error in (
        ("link", errors.NotFound),
        ("absent", errors.NotFound),
        ("pipe", errors.Corrupt),
    ):
        with pytest.raises(error), archive.opened(str(tmp_path / name)):
            pass


def test_an_archive_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = archives.write(tmp_path / "a.tar", archives.tar(archives.entries()))
    with archive.opened(path) as source:
        os.truncate(path, 30_000)
        with pytest.raises(errors.Corrupt, match="shorter"):
            ingest.ingest(source, MemoryImage(), {})


def test_what_is_read_stays_readable_when_the_name_is_gone(tmp_path: Path) -> None:
    path = archives.write(tmp_path / "a.tar", archives.tar(archives.entries()))
    with archive.opened(path) as source:
        os.unlink(path)
        assert ingest.ingest(source, MemoryImage(), {}).pids == (1, 7)


def test_giving_up_in_the_middle_is_the_callers(tmp_path: Path) -> None:
    path = archives.write(tmp_path / "a.tar", archives.tar(archives.entries()))
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise errors.DeadlineExceeded("too late")

    with archive.opened(path) as source, pytest.raises(errors.DeadlineExceeded):
        ingest.ingest(source, MemoryImage(), {}, check)


def test_a_layer_that_takes_long_to_unpack_can_be_given_up(tmp_path: Path) -> None:
    bomb = archives.layer((Entry("zeros", bytes(8 << 20)),))
    raw = archives.tar(archives.entries(parts_of=archives.parts(bomb)))
    with archive.opened(archives.write(tmp_path / "a.tar", raw)) as source:
        member = source.parts[archive.ROOTFS_DIFF]
        checked = layer.check(source, member, None)
        began = 0

        def give_up() -> None:
            nonlocal began
            began += 1
            if began == 3:
                raise errors.DeadlineExceeded("too late")

        with pytest.raises(errors.DeadlineExceeded):
            layer.check(source, member, None, give_up)
        began = 0
        with pytest.raises(errors.DeadlineExceeded):
            layer.converted(source, member, checked, give_up).read()
