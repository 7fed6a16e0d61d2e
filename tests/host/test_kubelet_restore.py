"""What a runtime checkpoints of an opted-in container goes on in another one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from agent import errors
from agent.engines.base import RestoreOptions
from agent.engines.criu import probe
from agent.engines.kubelet import archive, ingest, inner
from agent.engines.kubelet.engine import node_facts
from tests.host.boxes import Box, Boxes, tables
from tests.host.conftest import Gate
from tests.host.image import MemoryImage, MemorySource

FEATURES = (
    *("memory", "threads", "children", "pipes", "unix_sockets", "tcp"),
    *("shared_memory", "memfd", "timers", "pending_signals", "sessions", "eventfd"),
    *("open_file",),
)


def checkpoint(box: Box) -> MemoryImage:
    """What the kubelet's runtime does with a container, taken in as the agent does."""
    folder = box.folder / f"checkpoint-{time.monotonic_ns()}"
    images, work = folder / "images", folder / "work"
    work.mkdir(parents=True)
    spec = json.loads((box.folder / "config.json").read_text())
    # runc takes the criu that it finds first.
    search = f"{Path(probe.find()).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [
            *("runc", "--root", str(box.boxes.state), "checkpoint", "--leave-running"),
            *("--image-path", str(images), "--work-path", str(work)),
            *("--tcp-established", "--file-locks", "--ext-unix-sk", box.id),
        ],
        env={**os.environ, "PATH": search},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr + (work / "dump.log").read_text()[-3000:]
    path = folder / "archive.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(images, "checkpoint", filter=_no_links)
        _put(tar, "spec.dump", json.dumps(spec).encode())
        _put(tar, "config.dump", json.dumps({"id": box.id, "name": "main"}).encode())
        _put(tar, "rootfs-diff.tar", _layer(box.folder / "upper"))
    image = MemoryImage()
    with archive.opened(str(path)) as source:
        taken = ingest.ingest(source, image, node_facts() | {"criu": "4.2.1"})
    about = {**taken.facts["container"], "name": "main"}
    image.known = {**taken.facts, "container": about, "skipped": [["/memory", "a volume"]]}
    return image


def _no_links(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return info if info.isreg() or info.isdir() else None


def _put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _layer(upper: Path) -> bytes:
    done = subprocess.run(
        ["tar", "--create", "--numeric-owner", "--directory", str(upper), "."],
        capture_output=True,
        check=True,
    )
    return done.stdout


def restore(boxes: Boxes, image: MemoryImage, box: Box) -> None:
    engine = inner.RestoresInner(boxes.engine(box))
    boxes.trees.append(engine.restore(MemorySource(image), RestoreOptions(), Gate()))


def test_a_job_goes_on_in_another_container(boxes: Boxes) -> None:
    source = boxes.tree("source", *FEATURES)
    image = checkpoint(source)
    boxes.check(source)
    target = boxes.placeholder("target")
    restore(boxes, image, target)
    boxes.check(target)
    boxes.check(source)
    # The source's packet filter has the empty tables of the runtime's own CRIU.
    assert tables(target) == ""
    source.close()
    boxes.all.remove(source)
    boxes.assert_clean()


def test_a_restored_job_is_dumped_by_either_engine(boxes: Boxes) -> None:
    first = boxes.tree("first", *FEATURES)
    second = boxes.placeholder("second")
    restore(boxes, checkpoint(first), second)
    image = boxes.dump(second)
    third = boxes.placeholder("third")
    boxes.restore(image, third)
    boxes.check(third)


def test_an_open_file_in_a_volume_is_refused(boxes: Boxes) -> None:
    source = boxes.tree("source", "open_file", folder="/memory")
    image = checkpoint(source)
    with pytest.raises(errors.RestoreConflict, match="lies in a volume"):
        inner.of(MemorySource(image))


def test_a_container_without_hold_goes_on_in_a_placeholder(boxes: Boxes) -> None:
    source = boxes.ordinary("source", *FEATURES)
    image = checkpoint(source)
    boxes.check(source)
    target = boxes.placeholder("target")
    restore(boxes, image, target)
    boxes.check(target)
    boxes.check(source)
    assert tables(target) == ""
