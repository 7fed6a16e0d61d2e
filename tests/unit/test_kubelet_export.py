"""An image goes out as an archive and comes back the same."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from agent import errors
from agent.engines.kubelet import archive, export, ingest
from agent.model.archives import Whose
from agent.model.streams import PAGE_BYTES, AddressSpace, FileEntry, PageRun
from tests import archives
from tests.archives import Entry
from tests.host.image import MemoryImage, MemorySource

ABOUT = Whose("team", "pod-1", "c", 1_790_000_000.0)


def take(content: bytes, folder: Path) -> MemoryImage:
    image = MemoryImage()
    with archive.opened(archives.write(folder / "a.tar", content)) as source:
        ingest.ingest(source, image, {})
    return image


def exported(image: MemoryImage) -> bytes:
    return b"".join(export.Outgoing(MemorySource(image), ABOUT).pieces())


def content(raw: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return {
            info.name: file.read() for info in tar if (file := tar.extractfile(info)) is not None
        }


def test_an_archive_that_goes_in_comes_out_with_the_same_pages(tmp_path: Path) -> None:
    layer = archives.tar(
        (
            Entry("etc/", type=tarfile.DIRTYPE),
            Entry("etc/.wh.gone"),
            Entry("etc/new", b"content"),
            Entry("etc/link", type=tarfile.SYMTYPE, link="new"),
            Entry("opt/", type=tarfile.DIRTYPE),
            Entry("opt/.wh..wh..opq"),
        )
    )
    went_in = archives.tar(archives.entries(parts_of=archives.parts(layer)))
    image = take(went_in, tmp_path)
    raw = exported(image)
    before, after = content(went_in), content(raw)
    other = ("rootfs-diff.tar", "dump.log", "container.log")
    same = {name for name in before if name not in other and "pagemap" not in name}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert set(after) == set(before) - {"dump.log", "container.log"}
    assert set(content(after["rootfs-diff.tar"])) == set(content(layer))

    again = take(raw, tmp_path)
    assert again.images == image.images
    assert again.known == image.known
    assert again.contents["/rootfs-diff.tar"] == image.contents["/rootfs-diff.tar"]
    source, other_source = MemorySource(image), MemorySource(again)
    assert other_source.spaces() == source.spaces()
    for space in source.spaces():
        assert other_source.runs(space) == source.runs(space)
        assert list(other_source.read(space)) == list(source.read(space))
    assert exported(again) == raw


def test_an_image_of_another_engine_gets_what_its_facts_tell() -> None:
    image = MemoryImage()
    space = AddressSpace("process", 7)
    image.pages(space, PageRun(1 << 20, 2, 4), memoryview(bytes(2 * PAGE_BYTES)))
    image.metadata("core-7.img", io.BytesIO(b"registers"))
    image.file(FileEntry("/volume-0.tar", "file", 0o600, 0, 0, 0, 0, "include"), io.BytesIO(b"x"))
    image.facts(
        {
            "layout": "container-1",
            "spaces": [["process", 7], ["process", 9]],
            "container": {"name": "c", "image_digest": "sha256:" + "ab" * 32, "mounts": ["/proc"]},
        }
    )
    found = export.Outgoing(MemorySource(image), ABOUT)
    assert found.left_out == ("/volume-0.tar",)
    assert found.expected_bytes == 2 * PAGE_BYTES
    assert not found.restorable
    after = content(b"".join(found.pieces()))
    assert after["checkpoint/pages-1.img"] == bytes(2 * PAGE_BYTES)
    assert after["checkpoint/pages-2.img"] == b""
    assert "checkpoint/pagemap-9.img" in after
    config = archive.parse_json("config", after["config.dump"])
    assert config["rootfsImageRef"] == "sha256:" + "ab" * 32
    assert config["checkpointedTime"].startswith("2026-")
    spec = archive.parse_json("spec", after["spec.dump"])
    assert spec["annotations"]["io.kubernetes.cri.sandbox-name"] == "pod-1"


def test_a_damaged_root_file_system_is_not_exported(tmp_path: Path) -> None:
    image = take(archives.tar(archives.entries()), tmp_path)
    image.contents["/rootfs-diff.tar"] = b"\x01" * 5000
    with pytest.raises(errors.Corrupt, match="root file system"):
        exported(image)
