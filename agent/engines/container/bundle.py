"""The CRIU bundle: one directory with CRIU, its loader and its libraries, that CRIU is started from
inside a container by an open descriptor alone (scripts/criu-bundle makes it).

CRIU has the agent's rights in there while the files around it are the workload's, so it is told to
take nothing from them: no configuration, no plugins, no programs, no libraries.

The bundle's CRIU keeps what it knows of the kernel in its working directory, which is the images'
folder: it is asked once, outside of any container, and put there for every operation.

Promises: the container's file system is neither needed nor changed to start CRIU.
Does not: start anything in a container; ``inside`` does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator

from agent import errors
from agent.engines.criu import probe
from agent.host import subprocesses

# What CRIU calls it.
KERNEL_CACHE = "criu.kdat"
# CRIU tries mounts out below /tmp, which need not be writable here.
_PRIVATE_TMP = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /tmp && exec "$@"')
# CRIU keeps it on a file system only that forgets it at the next boot.
_TMPFS = "/dev/shm"  # noqa: S108 - a folder of our own is made there

BUNDLE_DIR = "/usr/local/lib/ckpt-agent/bundle"
_WAY_OUT = "make one with scripts/criu-bundle DIRECTORY, and name it with CKPT_AGENT_CRIU_BUNDLE"


class Bundle:
    """The bundle in the directory ``path``.

    Raises:
        errors.CriuMissing: there is none, or its CRIU cannot be used.
    """

    def __init__(self, path: str = BUNDLE_DIR) -> None:
        self.path = path
        for name in ("ld.so", "criu", "plugins"):
            if not os.path.exists(os.path.join(path, name)):
                raise errors.CriuMissing(
                    f"{path} is no CRIU bundle: it has no {name}", hint=_WAY_OUT, path=path
                )
        self.criu = probe.probe_version(_command(path))

    def lay_kernel_cache(self, folder: str) -> None:
        """Put what CRIU knows of this kernel into the images' folder."""
        with open(os.path.join(folder, KERNEL_CACHE), "wb") as file:
            file.write(self._kernel_cache())

    def _kernel_cache(self) -> bytes:
        with open(os.path.join(self.path, "made-from"), encoding="ascii") as file:
            return _kernel_cache(self.path, file.read())

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the directory."""
        fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def command(self, descriptor: int) -> list[str]:
        """CRIU for a program that has the bundle open as ``descriptor`` and a /proc of its own."""
        directory = f"/proc/self/fd/{descriptor}"
        return [*_command(directory), "--libdir", f"{directory}/plugins"]

    def environment(self, descriptor: int) -> dict[str, str]:
        """What CRIU finds its helpers by: none of the container's."""
        path = f"/proc/self/fd/{descriptor}/plugins"
        return {"PATH": path, "GNUTLS_NO_IMPLICIT_INIT": "1"}


def _command(directory: str) -> list[str]:
    return [f"{directory}/ld.so", "--library-path", directory, f"{directory}/criu"]


@functools.lru_cache(maxsize=4)
def _kernel_cache(path: str, made_from: str) -> bytes:
    del made_from  # only there to notice another bundle at the same place
    folder = tempfile.mkdtemp(prefix="ckpt-agent-", dir=_TMPFS)
    # By descriptor: the bundle may lie below the /tmp that is hidden.
    opened = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def start(argv: list[str], descriptors: list[int], cwd: str | None) -> subprocesses.Child:
        private = [*_PRIVATE_TMP, "sh", *argv]
        return subprocesses.start(private, pass_fds=[*descriptors, opened], cwd=cwd)

    try:
        probe.features(path, _command(f"/proc/self/fd/{opened}"), start=start, cwd=folder)
        with open(os.path.join(folder, KERNEL_CACHE), "rb") as file:
            return file.read()
    except FileNotFoundError as exc:
        raise errors.CriuMissing(
            f"the CRIU of {path} does not say what this kernel can do",
            hint=_WAY_OUT,
            path=path,
        ) from exc
    finally:
        os.close(opened)
        shutil.rmtree(folder, ignore_errors=True)
