"""A volume of one agent's own, to break under its hands while all others keep theirs.

Promises: the file system is a real one, in the agent's own mount namespace; what was broken is
whole after the block, and the agent sees the cluster's volume again in the end.
Does not: outlive the agent's process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

STORE = "/var/lib/ckpt-agent/store"
_UPPER = "/mnt"  # an empty folder of the image


class OwnVolume:
    """The volume of the agent whose process this machine calls ``agent``, with the images of
    ``namespace``.
    """

    def __init__(self, agent: int, namespace: str) -> None:
        self._agent = agent
        self._namespace = namespace

    @property
    def root(self) -> Path:
        """Its files, seen from here."""
        return Path(f"/proc/{self._agent}/root{STORE}")

    def _run(self, *argv: str) -> None:
        # umount(8) looks for itself in /proc, which is of the agent's pid namespace.
        enter = ["nsenter", f"--target={self._agent}", "--mount", "--pid"]
        subprocess.run([*enter, *argv], check=True)

    @contextlib.contextmanager
    def mounted(self, size: str = "4m") -> Iterator[None]:
        """In the place of the store's volume, on top of what that holds, as if nothing of it had
        been restored; ``size`` is what more fits.
        """
        with contextlib.ExitStack() as stack:
            self._run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", _UPPER)
            stack.callback(self._run, "umount", "--lazy", _UPPER)
            self._run("mkdir", f"{_UPPER}/upper", f"{_UPPER}/work")
            folders = f"lowerdir={STORE},upperdir={_UPPER}/upper,workdir={_UPPER}/work"
            self._run("mount", "-t", "overlay", "-o", folders, "overlay", STORE)
            stack.callback(self._run, "umount", "--lazy", STORE)
            shutil.rmtree(self.root / self._namespace / "restored", ignore_errors=True)
            yield

    def claimed(self, image: str) -> bool:
        """Whether a restore of ``image`` has begun: it writes that down, then reads the image."""
        return (self.root / self._namespace / "restored" / image).exists()

    @contextlib.contextmanager
    def broken_at_once(self, fault: Fault) -> Iterator[None]:
        """``fault`` while the agent does nothing, which then goes on with it."""
        os.kill(self._agent, signal.SIGSTOP)
        try:
            with fault(self):
                os.kill(self._agent, signal.SIGCONT)
                yield
        finally:
            os.kill(self._agent, signal.SIGCONT)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte more fits."""
        filler = self.root / "filler"
        space = os.statvfs(self.root)
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize)
        try:
            yield
        finally:
            filler.unlink()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written any more."""
        self._run("mount", "-o", "remount,bind,ro", STORE)
        try:
            yield
        finally:
            self._run("mount", "-o", "remount,bind,rw", STORE)

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """An empty folder is in its place."""
        self._run("mount", "-t", "tmpfs", "tmpfs", STORE)
        try:
            yield
        finally:
            self._run("umount", "--lazy", STORE)


Fault = Callable[[OwnVolume], AbstractContextManager[None]]
