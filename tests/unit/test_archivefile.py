"""Files of archives: whole or not there, and images that name what is in them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.host import archivefile, newfile, ociimage
from agent.model.archives import Exported, Exporting, Written

ABOUT = Exporting("Job_1.x@20260131-235959-0a1b2c", "c", "x86_64", 10, restorable=True)
CONTENT = [b"first piece", bytes(5000), b"last"]


def write(path: Path, about: Exporting = ABOUT, **wanted: Any) -> Written:
    with archivefile.writing(archivefile.Wanted(str(path), **wanted)) as file:
        file.begin(about)
        for piece in CONTENT:
            file.add(piece)
        return file.finish(Exported(5015, ("/left",)))


def test_an_archive_is_its_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    found = write(path)
    assert path.read_bytes() == b"".join(CONTENT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert found == Written(ABOUT.image, "c", str(path), 5015, ("/left",), None)


def blobs(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: file.read() for info in tar if (file := tar.extractfile(info))}


def test_an_oci_image_holds_the_archive_as_its_layer_and_says_that_it_is_a_checkpoint(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.oci"
    found = write(path, form="oci")
    assert found.reference == "localhost/job-1-x-c:20260131-235959-0a1b2c"
    assert found.size_bytes == path.stat().st_size
    content = blobs(path)
    assert json.loads(content["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}

    def blob(descriptor: dict[str, Any]) -> bytes:
        raw = content[f"blobs/{descriptor['digest'].replace(':', '/')}"]
        assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == descriptor["digest"]
        assert len(raw) == descriptor["size"]
        return raw

    (named,) = json.loads(content["index.json"])["manifests"]
    assert named["annotations"]["io.containerd.image.name"] == found.reference
    manifest = json.loads(blob(named))
    assert manifest["annotations"]["org.criu.checkpoint.container.name"] == "c"
    (layer,) = manifest["layers"]
    assert blob(layer) == b"".join(CONTENT)
    config = json.loads(blob(manifest["config"]))
    assert config["rootfs"]["diff_ids"] == [layer["digest"]]
    assert (config["architecture"], config["os"]) == ("amd64", "linux")
    again = tmp_path / "b.oci"
    write(again, form="oci")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "trainer:1",
        "x/Upper",
        "a b",
        "x/../y",
        "x:",
        "x/y:tag:tag",
        "x@sha256:" + "0" * 64,
        "a/" * 200,
    ],
)
def test_what_no_image_can_be_called_is_refused_before_a_file_is_made(
    tmp_path: Path, reference: str
) -> None:
    with pytest.raises(errors.InvalidInput, match="not a name"):
        write(tmp_path / "a.oci", form="oci", reference=reference)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "reference",
    ["localhost/x:1", "registry.example:5000/team/trainer-0:paused", "localhost/a__b/c.d:V-1"],
)
def test_what_an_image_can_be_called(reference: str) -> None:
    assert ociimage.check_reference(reference) == reference


def test_a_machine_without_a_name_among_images_is_refused(tmp_path: Path) -> None:
    about = dataclasses.replace(ABOUT, machine="")
    with pytest.raises(errors.InvalidInput, match="machine"):
        write(tmp_path / "a.oci", about, form="oci")
    assert list(tmp_path.iterdir()) == []


def test_what_no_runtime_restores_becomes_no_image_that_asks_for_it(tmp_path: Path) -> None:
    about = dataclasses.replace(ABOUT, restorable=False)
    with pytest.raises(errors.InvalidInput, match="whole container"):
        write(tmp_path / "a.oci", about, form="oci")
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def unfinished() -> None:
        with newfile.whole(str(path)) as out:
            out.write(b"new")
            out.flush()
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        unfinished()
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_text() == "old"
    with newfile.whole(str(path)) as out:
        out.write(b"new")
    assert path.read_text() == "new"


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(errors.InvalidInput, match="cannot write"),
        newfile.whole(str(tmp_path / "absent" / "a")),
    ):
        pass

    def full() -> None:
        with newfile.whole(str(tmp_path / "a")), open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    with pytest.raises(errors.InvalidInput, match="No space"):
        full()
    assert list(tmp_path.iterdir()) == []
