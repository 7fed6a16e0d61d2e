"""The job in an image of a whole container, as a placeholder takes it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import errors
from agent.engines.criu import images
from agent.engines.kubelet import archive, ingest, inner
from agent.model.streams import AddressSpace
from tests import archives
from tests.host.image import MemoryImage, MemorySource

pb = images.messages


def held(folder: Path, **changed: bytes) -> MemoryImage:
    """An image of a container whose first process is hold, with a job as process 7."""
    found = archives.criu_images()
    entries = images.load("files", "files.img", found["files.img"], pb.file_entry)
    entries[0].reg.name = "/.ckpt-agent/hold"
    entries[0].reg.mnt_id = 55
    found["files.img"] = images.dump("files", entries)
    found["mountpoints-12.img"] = b"mounts"
    found["tmpfs-dev-3.tar.gz.img"] = b"content"
    found["timens-0.img"] = b"clock"
    found |= {name.replace("__", "-") + ".img": content for name, content in changed.items()}
    image = MemoryImage()
    path = archives.write(folder / "a.tar", archives.tar(archives.entries(found)))
    with archive.opened(path) as source:
        ingest.ingest(source, image, {})
    return image


def test_the_first_process_and_the_namespaces_are_left_out(tmp_path: Path) -> None:
    source = MemorySource(held(tmp_path))
    job = inner.of(source)
    known = job.facts()
    assert known["root"] == 7
    assert [(each["pid"], each["ppid"]) for each in known["processes"]] == [(7, 0)]
    assert known["threads"] == [[7, [7]]]
    assert known["spaces"] == [["process", 7], ["shmem", 99]]
    assert {each["pid"] for each in known["sockets"]} == {7}
    assert AddressSpace("process", 1) not in job.spaces()
    assert len(job.spaces()) == 2

    content = dict(job.metadata())
    assert not any(name.endswith("-1.img") for name in content)
    assert "mountpoints-12.img" not in content
    assert "tmpfs-dev-3.tar.gz.img" not in content
    assert content["timens-0.img"] == b"clock"
    (root,) = images.load("pstree", "pstree.img", content["pstree.img"], pb.pstree_entry)
    assert (root.pid, root.ppid) == (7, 0)
    files = images.load("files", "files.img", content["files.img"], pb.file_entry)
    assert not files[0].reg.HasField("mnt_id") or files[0].reg.mnt_id == -1
    assert job.metadata_file("inventory.img") == content["inventory.img"]
    with pytest.raises(errors.Missing):
        job.metadata_file("core-1.img")

    raw = content["inventory.img"]
    assert struct.unpack_from("<II", raw) == (0x58313116, len(raw) - 8)
    inventory = pb.inventory_entry.FromString(raw[8:])
    ids = inventory.root_ids
    # CRIU makes no namespace that the tree has in common with it, and shares nothing else.
    assert (ids.net_ns_id, ids.mnt_ns_id, ids.files_id, ids.vm_id) == (10, 12, 1, 1)


def test_of_a_container_without_hold_only_the_namespaces_are_left_out(tmp_path: Path) -> None:
    image = held(tmp_path)
    assert image.known is not None
    image.known["processes"][0]["exe"] = "/usr/bin/job"
    source = MemorySource(image)
    job = inner.of(source)
    assert job is not source
    known = job.facts()
    assert known["root"] == 1
    assert known["processes"] == image.known["processes"]
    assert "archive_parts" not in known
    assert job.spaces() == source.spaces()
    content = dict(job.metadata())
    assert content["pstree.img"] == image.images["pstree.img"]
    assert "core-1.img" in content
    assert "mountpoints-12.img" not in content
    inventory = images.load_inventory(content["inventory.img"])
    (ids,) = images.load("ids", "ids-1.img", content["ids-1.img"], pb.task_kobj_ids_entry)
    assert inventory.root_ids.mnt_ns_id == ids.mnt_ns_id


def test_pages_and_files_are_those_of_the_image(tmp_path: Path) -> None:
    source = MemorySource(held(tmp_path))
    job = inner.of(source)
    for space in job.spaces():
        assert job.runs(space) == source.runs(space)
        assert list(job.read(space)) == list(source.read(space))
    assert list(job.files()) == list(source.files())
    assert list(job.file_content("/rootfs-diff.tar")) == list(
        source.file_content("/rootfs-diff.tar")
    )
    job.check()
    assert source.checked == 1


def test_other_images_are_given_back_as_they_are(tmp_path: Path) -> None:
    image = held(tmp_path)
    assert image.known is not None
    for facts in (
        {},
        {"root": 8, "processes": image.known["processes"]},
        {"root": 1, "processes": [{"exe": "/usr/bin/job"}]},
    ):
        # The last as the container engine captures it: without a namespace.
        for name in ("mountpoints-12.img", "tmpfs-dev-3.tar.gz.img"):
            image.images.pop(name, None)
        image.known = dict(facts)
        source = MemorySource(image)
        assert inner.of(source) is source


def test_what_a_placeholder_cannot_take_is_refused(tmp_path: Path) -> None:
    image = held(tmp_path, ipcns__shm__4=b"12345678 and a record")
    with pytest.raises(errors.RestoreConflict, match="System V"):
        inner.of(MemorySource(image))
    image = held(tmp_path)
    assert image.known is not None
    image.known["skipped"] = [["/data", "a volume"]]
    with pytest.raises(errors.RestoreConflict, match="/data/input is open"):
        inner.of(MemorySource(image))
    image.known["processes"].append({**image.known["processes"][1], "pid": 9})
    with pytest.raises(errors.RestoreConflict, match="2 trees"):
        inner.of(MemorySource(image))


def test_an_inventory_without_numbers_of_namespaces_is_damaged(tmp_path: Path) -> None:
    image = held(tmp_path)
    raw = bytes(pb.inventory_entry(img_version=2).SerializeToString())
    image.images["inventory.img"] = struct.pack("<II", 0x58313116, len(raw)) + raw
    with pytest.raises(errors.Corrupt, match="inventory"):
        inner.of(MemorySource(image))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["inventory.img", "pstree.img", "ids-1.img", "ids-7.img", "files.img"]),
    st.data(),
)
def test_damaged_images_are_refused_as_such(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    image = held(tmp_path_factory.mktemp("held"))
    content = image.images[name]
    at = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.integers(0, 8))
    image.images[name] = content[:at] + data.draw(st.binary(max_size=8)) + content[at + cut :]
    try:
        inner.of(MemorySource(image))
    except errors.DataError as exc:
        assert exc.hint  # noqa: PT017 - a good image is no failure either
