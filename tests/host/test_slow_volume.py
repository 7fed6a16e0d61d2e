"""A job that writes more than the volume takes: a disk of its own, which the kernel slows down."""

from __future__ import annotations

import datetime
import os
import pathlib
import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import NOT_TO_BE_HAD
from tests.host.test_cli_job import Cli, Job, cli, started, until

__all__ = ["cli"]

_MIB = 1 << 20
_BLOCKS = 32
_BYTES_PER_S = 16 * _MIB
_EVERY_S = 1.0
_EPOCHS = 3
# The program itself, what it holds of a stop, and what is on its way to the volume.
_MOST_MEMORY_BYTES = 256 * _MIB
_THROTTLE = pathlib.Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")

# Writes one block after the other, each with its number and its digest, and so all the time about
# 40 MiB a second that do not compress. When asked, it tells whether all blocks are of one instant.
_JOB = f"""
import hashlib, os, sys, time
folder, blocks, size = sys.argv[1], {_BLOCKS}, {_MIB}
memory = bytearray(blocks * size)
def write(number):
    body = number.to_bytes(8, "little") + os.urandom(size - 40)
    at = number % blocks * size
    memory[at : at + size] = body + hashlib.sha256(body).digest()
def wrong(last):
    for number in range(last - blocks + 1, last + 1):
        at = number % blocks * size
        body, digest = memory[at : at + size - 32], memory[at + size - 32 : at + size]
        if hashlib.sha256(body).digest() != digest or body[:8] != number.to_bytes(8, "little"):
            yield number
def tell(name, text):
    with open(f"{{folder}}/{{name}}.new", "w") as file:
        file.write(text)
    os.rename(f"{{folder}}/{{name}}.new", f"{{folder}}/{{name}}")
for number in range(10**9):
    write(number)
    if number >= blocks:
        tell("count", str(number))
        if os.path.exists(f"{{folder}}/ask"):
            os.unlink(f"{{folder}}/ask")
            tell("answer", f"{{number}} {{list(wrong(number))}}")
    time.sleep(0.02)
"""


class Disk:
    """A file system on a disk of its own. ``slow``: all that is written to it, by whomever."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder / "disk"
        self.path.mkdir()
        image = folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(1 << 30)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        mount = ["mount", "-o", "loop", str(image), str(self.path)]
        subprocess.run(mount, check=True)
        device = os.stat(self.path).st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"

    def slow(self, bytes_per_s: int) -> None:
        """0: not any more."""
        _THROTTLE.write_text(f"{self._device} {bytes_per_s}\n")

    def close(self) -> None:
        self.slow(0)
        subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[Disk]:
    # What the page cache writes back is nobody's, and of version 2 the root has no limits.
    if not _THROTTLE.exists() or not pathlib.Path("/dev/loop-control").exists():
        pytest.skip(f"{NOT_TO_BE_HAD}a disk that the kernel slows down")
    made = Disk(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def job(tmp_path: pathlib.Path) -> Iterator[Job]:
    with started(_JOB, tmp_path) as made:
        yield made


def check(job: Job) -> None:
    """All that it holds is of one instant."""
    (job.folder / "answer").unlink(missing_ok=True)
    (job.folder / "ask").touch()
    assert until((job.folder / "answer").exists)
    assert (job.folder / "answer").read_text().endswith(" []")


def most_memory_bytes(pid: int) -> int:
    """The most that the process ever had."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    (line,) = (each for each in status.splitlines() if each.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def test_the_time_between_two_epochs_grows_where_the_volume_is_slower_than_the_job_writes(
    cli: Cli, disk: Disk, job: Job
) -> None:
    cli.common[1] = str(disk.path / "store")
    disk.slow(_BYTES_PER_S)
    before = job.count()
    every = ("--every", f"{_EVERY_S}s", "--count", str(_EPOCHS))
    with subprocess.Popen(
        cli.command("watch", "--pid", str(job.pid), "--name", "job", *every),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watch:
        assert watch.stdout is not None
        while watch.stdout.readline():
            # The last image is told before the pause after it.
            most_bytes = most_memory_bytes(watch.pid)
            written_bytes = (job.count() - before) * _MIB
        _, err = watch.communicate(timeout=60)
    assert watch.returncode == 0, err
    images = cli.document("list")["items"]
    said = re.findall(r"the dump took (\S+) s, longer .* the next begins in (\S+) s", err)
    assert len(images) == len(said) == _EPOCHS, err
    for (took_s, pause_s), one, other in zip(said, images, images[1:], strict=False):
        assert float(pause_s) >= float(took_s) > _EVERY_S
        # Each was begun when half of the time was no epoch's. Tenths are told, and whole seconds.
        assert begun_s(other) - begun_s(one) > float(took_s) + float(pause_s) - 1.2

    # The job was quicker than the volume, and what it wrote was kept nowhere meanwhile.
    assert written_bytes > 2 * sum(each["storedBytes"] for each in images)
    assert most_bytes < _MOST_MEMORY_BYTES < written_bytes
    check(job)
    os.kill(job.pid, signal.SIGKILL)
    os.waitpid(job.pid, 0)
    cli.run("restore", images[-1]["name"])
    check(job)


def begun_s(image: dict[str, Any]) -> float:
    """When the epoch was begun, seconds since 1970."""
    return datetime.datetime.fromisoformat(image["createdAt"]).timestamp()
