"""The CRIU bundle: one directory with CRIU, its loader and its libraries, that CRIU is started from
inside a container by an open descriptor alone (scripts/criu-bundle makes it).

CRIU has the agent's rights in there while the files around it are the workload's, so it is told to
take nothing from them: no configuration, no plugins, no programs, no libraries.

Promises: the container's file system is neither needed nor changed to start CRIU.
Does not: start anything in a container; ``inside`` does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from agent import errors
from agent.engines.criu import probe

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
        self.criu = probe.probe_version(self._command(path))

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
        return [*self._command(directory), "--libdir", f"{directory}/plugins"]

    def environment(self, descriptor: int) -> dict[str, str]:
        """What CRIU finds its helpers by: none of the container's."""
        path = f"/proc/self/fd/{descriptor}/plugins"
        return {"PATH": path, "GNUTLS_NO_IMPLICIT_INIT": "1"}

    def _command(self, directory: str) -> list[str]:
        return [f"{directory}/ld.so", "--library-path", directory, f"{directory}/criu"]
