"""What is compared: ckpt-agent on one side; criu, tar with zstd, restic and borg on the other.

Promises: each backup ends with its bytes on the disk, as a dump of ckpt-agent does: what a tool
does not sync by itself is synced for it, inside its time.
Does not: tune anybody; the options are those of the brief of this bench, the same for all runs.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import shlex
import shutil
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import agent
from bench import programs

_CRIU_NET = ("--tcp-established", "--network-lock", "nftables")


def _beside_python(name: str) -> str | None:
    path = os.path.join(os.path.dirname(sys.executable), name)
    return path if os.access(path, os.X_OK) else None


def program(name: str) -> str:
    """The program ``name``, from this Python's folder or the search path.

    Raises:
        programs.ProgramFailed: it is not installed.
    """
    found = _beside_python(name) or shutil.which(name)
    if found is None:
        raise programs.ProgramFailed(
            f"{name} is missing: run scripts/bench-setup, or install it with your package manager"
        )
    return found


def tree_bytes(directory: str) -> int:
    """The sizes of all files below ``directory``."""
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(directory)
        for name in names
    )


class Agent:
    """``ckpt-agent`` on one store, with ``environment`` besides this program's own. Its bytecode is
    there, as it is where it was installed: here nobody may have been allowed to keep it.
    """

    def __init__(self, store: str, environment: Mapping[str, str] | None = None) -> None:
        compileall.compile_dir(os.path.dirname(agent.__file__), quiet=1)
        self.store = store
        self.environment = dict(environment or {})

    def _run(self, *arguments: str) -> programs.Ran:
        return programs.run(
            [program("ckpt-agent"), *arguments, "--store", self.store, "-o", "json"],
            env=self.environment,
        )

    def dump(self, pid: int, name: str, *options: str) -> tuple[programs.Ran, dict[str, Any]]:
        """Dump the tree below ``pid``; return the run and the DumpReport."""
        ran = self._run("dump", "--pid", str(pid), "--name", name, *options)
        return ran, json.loads(ran.stdout)

    def restore(self, image: str, *options: str) -> programs.Ran:
        """Restore in place; the tree runs on when this returns."""
        return self._run("restore", image, *options)

    def show(self, image: str) -> programs.Ran:
        """Tell of an image."""
        return self._run("show", image)

    def look(self) -> programs.Ran:
        """List the store: the program started and hardly anything done."""
        return self._run("list")


class Criu:
    """``criu`` itself, with images as files."""

    def __init__(self, images: str) -> None:
        self.images = images

    def dump(self, pid: int) -> programs.Ran:
        """Dump the tree below ``pid`` and leave it running."""
        os.makedirs(self.images)
        what = ["-t", str(pid), "-D", self.images, "--leave-running", "--ghost-limit", "1G"]
        return programs.run([program("criu"), "dump", *what, *_CRIU_NET, "-o", "dump.log"])

    def restore(self) -> programs.Ran:
        """Restore in place; the tree runs on when this returns."""
        return programs.run(
            [program("criu"), "restore", "-D", self.images, "-d", *_CRIU_NET, "-o", "restore.log"]
        )

    def stop_s(self) -> float:
        """How long the last dump stopped the tree, by CRIU's own account."""
        with open(os.path.join(self.images, "stats-dump"), "rb") as file:
            freezing_us, frozen_us = _stats(file.read())
        return (freezing_us + frozen_us) / 1e6


def _stats(image: bytes) -> tuple[int, int]:
    """``freezing_time`` and ``frozen_time`` of a stats-dump image: two magics, the size, then a
    message whose field 1, the dump's stats, begins with these two as fields 1 and 2 (varints).
    """
    (size,) = struct.unpack_from("<I", image, 8)
    fields = _varints(image[12 : 12 + size][2:])
    return fields.get(1, 0), fields.get(2, 0)


def _varints(message: bytes) -> dict[int, int]:
    found: dict[int, int] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7:
            break
        found[key >> 3] = varint()
    return found


class Backup(Protocol):
    """A way to keep a directory of images, with history or without."""

    name: str
    place: str

    def prepare(self) -> None:
        """Make the empty repository; not timed."""

    def save(self, images: str) -> float:
        """Keep ``images``; return the seconds until they are on the disk."""


@dataclass
class Tar:
    """``tar | zstd -1 -T2``: no history."""

    place: str
    name: str = "tar | zstd -1 -T2"

    def prepare(self) -> None:
        """Make the empty place; not timed."""
        os.makedirs(self.place)

    def save(self, images: str) -> float:
        """Keep ``images``; return the seconds until they are on the disk."""
        archive = os.path.join(self.place, "images.tar.zst")
        line = (
            f"set -o pipefail; tar -C {shlex.quote(images)} -cf - . | zstd -1 -T2 -q -f -o"
            f" {shlex.quote(archive)} && sync {shlex.quote(archive)} {shlex.quote(self.place)}"
        )
        return programs.run(["bash", "-c", line]).took_s


@dataclass
class Restic:
    """restic with its default compression. It always encrypts, which costs it some of its time."""

    place: str
    name: str = "restic backup"

    def _run(self, *arguments: str) -> float:
        line = shlex.join([program("restic"), "-q", *arguments])
        if arguments[0] == "backup":
            line += f" && sync -f {shlex.quote(self.place)}"
        return programs.run(
            ["bash", "-c", line],
            env={
                "RESTIC_REPOSITORY": os.path.join(self.place, "repo"),
                "RESTIC_PASSWORD": "bench",
                "RESTIC_CACHE_DIR": os.path.join(self.place, "cache"),
            },
        ).took_s

    def prepare(self) -> None:
        """Make the empty place; not timed."""
        os.makedirs(self.place)
        self._run("init")

    def save(self, images: str) -> float:
        """Keep ``images``; return the seconds until they are on the disk."""
        return self._run("backup", images)


@dataclass
class Borg:
    """borg with zstd level 1 and without encryption."""

    place: str
    name: str = "borg create (zstd,1)"
    _saved: int = 0

    def _run(self, *arguments: str, sync: bool = False) -> float:
        line = shlex.join([program("borg"), *arguments])
        if sync:
            line += f" && sync -f {shlex.quote(self.place)}"
        env = {"BORG_BASE_DIR": self.place, "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}
        env["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
        return programs.run(["bash", "-c", line], env=env).took_s

    def prepare(self) -> None:
        """Make the empty place; not timed."""
        os.makedirs(self.place)
        self._run("init", "-e", "none", os.path.join(self.place, "repo"))

    def save(self, images: str) -> float:
        """Keep ``images``; return the seconds until they are on the disk."""
        self._saved += 1
        archive = os.path.join(self.place, f"repo::{self._saved}")
        return self._run("create", "-C", "zstd,1", archive, images, sync=True)


def versions() -> dict[str, str]:
    """What the tools say of themselves."""
    asked = {
        "criu": ("criu", "--version"),
        "zstd": ("zstd", "--version"),
        "tar": ("tar", "--version"),
        "restic": ("restic", "version"),
        "borg": ("borg", "--version"),
        "ckpt-agent": ("ckpt-agent", "--version"),
    }
    found = {}
    for name, command in asked.items():
        found[name] = "missing"
        with contextlib.suppress(programs.ProgramFailed):
            said = programs.run([program(command[0]), *command[1:]]).stdout
            found[name] = said.strip().splitlines()[0]
    return found
