"""Which CRIU there is, and what it can do here; asked once.

Promises: ``probe`` and ``known`` return a CRIU whose protocol this program knows, or say which one
was found, where, and how to get the right one.
Does not: install anything.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from pycriu import rpc_pb2

from agent import errors
from agent.engines.criu import rpc
from agent.host import clock, subprocesses

# Below 4.2, sockets cannot be dumped on kernels >= 6.16 and the page server's header has 24 bytes
# instead of 32. 4.3 changes the page server's messages again, without a handshake.
OLDEST = (4, 2)
FIRST_UNKNOWN = (4, 3)
# A cold start probes the kernel's features, which takes about 0.1 s.
_ANSWER_S = 20.0
_WAY_OUT = (
    "run scripts/setup, which fetches CRIU 4.2 into a cache directory, or install it and name it"
    " with --criu"
)


@dataclasses.dataclass(frozen=True)
class Criu:
    """A CRIU that can be used. ``lazy_pages``, ``mem_track`` and ``pidfd_store`` are what it
    found this kernel to support.
    """

    path: str
    version: tuple[int, ...]
    lazy_pages: bool
    mem_track: bool
    pidfd_store: bool

    @property
    def version_text(self) -> str:
        """As ``4.2.1``."""
        return ".".join(str(part) for part in self.version)


def find(explicit: str | None = None) -> str:
    """The path of CRIU: ``explicit``, else beside this interpreter, else from PATH.

    Raises:
        errors.CriuMissing: none there.
    """
    if explicit:
        if not os.access(explicit, os.X_OK):
            raise errors.CriuMissing(
                f"there is no program {explicit}", hint=_WAY_OUT, path=explicit
            )
        return explicit
    beside = os.path.join(sys.prefix, "bin", "criu")
    if os.access(beside, os.X_OK):
        return beside
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/local/sbin:/usr/sbin:/sbin"
    found = shutil.which("criu", path=path)
    if found is None:
        raise errors.CriuMissing("CRIU is not installed", hint=_WAY_OUT)
    return found


def version(command: Sequence[str]) -> tuple[int, ...]:
    """What CRIU, started by ``command``, says to ``--version``.

    Raises:
        errors.CriuMissing: it says nothing that makes sense.
    """
    path = command[-1]
    try:
        done = subprocesses.run([*command, "--version"], timeout_s=_ANSWER_S)
    except errors.NotFound as exc:
        raise errors.CriuMissing(exc.message, hint=_WAY_OUT, path=path) from exc
    match = re.search(rb"^Version: (\d+(?:\.\d+)*)", done.stdout, re.MULTILINE)
    if match is None:
        raise errors.CriuMissing(
            f"{path} does not tell its version (exit status {done.status})",
            hint=_WAY_OUT,
            path=path,
        )
    return tuple(int(part) for part in match[1].split(b"."))


def probe(explicit: str | None = None) -> Criu:
    """Find CRIU and ask what it can do; the answer is remembered while the file stays the same.

    Raises:
        errors.CriuMissing: none, one that is too old, or one that is too new.
    """
    path = find(explicit)
    info = os.stat(path)
    return _probe(path, info.st_ino, info.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _probe(path: str, inode: int, mtime_ns: int) -> Criu:
    del inode, mtime_ns  # only there to notice another file under the same name
    found = _known(version([path]), path)
    found_features = features(path, [path])
    return Criu(
        path=path,
        version=found,
        lazy_pages=found_features.lazy_pages,
        mem_track=found_features.mem_track,
        pidfd_store=found_features.pidfd_store,
    )


def known(explicit: str | None = None) -> Criu:
    """As ``probe``, by its version alone, in a tenth of the time: for a restore, in which nothing
    depends on what this kernel supports, and CRIU looks at that itself.
    """
    path = find(explicit)
    info = os.stat(path)
    return _probe_version(path, info.st_ino, info.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _probe_version(path: str, inode: int, mtime_ns: int) -> Criu:
    del inode, mtime_ns
    return probe_version([path])


def probe_version(command: Sequence[str]) -> Criu:
    """A CRIU that can be used, by its version alone: what this kernel lets it do is not asked.

    Raises:
        errors.CriuMissing: one that is too old, or one that is too new.
    """
    path = command[-1]
    return Criu(path, _known(version(command), path), False, False, False)


def _known(found: tuple[int, ...], path: str) -> tuple[int, ...]:
    text = ".".join(map(str, found))
    if found < OLDEST:
        raise errors.CriuMissing(
            f"CRIU {text} at {path} is too old: 4.2 is needed",
            hint=_WAY_OUT,
            path=path,
            version=text,
        )
    if found >= FIRST_UNKNOWN:
        raise errors.CriuMissing(
            f"CRIU {text} at {path} is newer than this program knows (4.2.x)",
            hint=_WAY_OUT,
            path=path,
            version=text,
        )
    return found


def features(
    path: str, command: Sequence[str], *, start: rpc.Start | None = None, cwd: str | None = None
) -> Any:
    """What this kernel lets the CRIU at ``path`` do; ``start`` and ``cwd`` as for a worker.

    Raises:
        errors.CriuMissing: it does not answer.
    """
    request = rpc_pb2.criu_req(type=rpc_pb2.FEATURE_CHECK)
    request.features.mem_track = True
    request.features.lazy_pages = True
    request.features.pidfd_store = True
    with rpc.worker(command, start=start, cwd=cwd) as worker:
        try:
            reply = worker.connection.request(request, None, clock.Deadline.after(_ANSWER_S))
        except rpc.Gone as exc:
            raise errors.CriuMissing(
                f"{path} does not answer", hint="run it by hand: criu check", path=path
            ) from exc
    return reply.features
