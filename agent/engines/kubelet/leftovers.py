"""The archives in the kubelet's directory: which one a call made, and that none of ours stays.

The kubelet writes ``checkpoint-POD_NAMESPACE-CONTAINER-TIME.tar``, the time being when it began,
and never removes one. Before a call, a note of it is put into the same directory
(``.ckpt-agent-call-*.json``): what was there already, when was asked, who asks. The note goes when
the archive has been taken or the call has failed; whoever finds one later cleans up after it.

Promises: an archive is opened, found to be a plain file of root's, and removed from the directory
at once: the open descriptor keeps its content, and the kernel frees it whatever becomes of us.
What is removed without having been named by the kubelet appeared after a call of ours for that
container, carries a time at which that call can have begun, and is the only such archive. Where
there are several, somebody else asked too, and all of them stay.
Does not: touch any other archive, however old.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from typing import Any

from agent import errors
from agent.engines.kubelet import client
from agent.engines.kubelet.client import Target
from agent.host import clock, hold, namespaces, proc, system

log = logging.getLogger(__name__)

DIRECTORY = "/var/lib/kubelet/checkpoints"

_NOTE_PREFIX = ".ckpt-agent-call-"
_NOTE = re.compile(re.escape(_NOTE_PREFIX) + r"[0-9a-f]{16}\.json")
_NOTE_BYTES = 4 << 20
# The kubelet asks the API server who we are before it begins and names the archive; its time has
# whole seconds.
_EARLIEST_S = -1.0
_LATEST_S = 60.0
# How long after its deadline a call that nobody waits for may still leave an archive.
_LINGER_S = 3600.0


@dataclasses.dataclass(frozen=True)
class Call:
    """A note: the call, who made it, and what was in the directory. ``abandoned``: nobody waits
    for its end any more. With ``holds`` it is no call, but says that ``table`` holds the network of
    this process.
    """

    note: str
    target: Target
    before: tuple[str, ...]
    asked_at_s: float
    deadline_s: float
    agent: proc.Identity
    boot_id: str
    abandoned: bool = False
    holds: proc.Identity | None = None

    @property
    def table(self) -> str:
        """What the packet filter's table of a hold is called."""
        return f"ckpt-agent-apart-{self.note.removeprefix(_NOTE_PREFIX).removesuffix('.json')}"

    @property
    def living(self) -> bool:
        """Whether somebody waits for it."""
        return not self.abandoned and self.boot_id == system.boot_id() and proc.alive(self.agent)


class Checkpoints:
    """The kubelet's directory of archives, held open."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    @contextlib.contextmanager
    def hold(self, target: Target, who: proc.Identity) -> Iterator[str]:
        """Around a hold of the network of ``who``, the first process of ``target``: notes it under
        the name of a table, which is given, for the case that this program dies.
        """
        call = self._noted(target, 0.0, who)
        try:
            yield call.table
        finally:
            self._forget(call)

    @contextlib.contextmanager
    def call(self, target: Target, deadline_s: float) -> Iterator[Call]:
        """Around a call that has the kubelet checkpoint ``target``: notes it, and cleans up after
        one that fails.
        """
        call = self._noted(target, deadline_s)
        try:
            yield call
        except (errors.Refused, errors.EnvironmentUnfit):
            self._forget(call)  # the kubelet did not begin
            raise
        except (errors.DeadlineExceeded, client.Lost):
            # The kubelet may still be at it; the archive may come at any time.
            self._write(dataclasses.replace(call, abandoned=True))
            raise
        except errors.CkptError:
            self._clean(call)
            self._forget(call)
            raise
        except BaseException:
            self._write(dataclasses.replace(call, abandoned=True))
            raise
        self._forget(call)

    def take(self, call: Call, item: str) -> int:
        """Open the archive that the kubelet named as the result of ``call``, and remove it from
        the directory; return the descriptor.

        Raises:
            errors.DumpFailed: it is not there, or not what the kubelet would have written.
        """
        name = os.path.basename(item)
        if _made_at_s(call.target, name) is None or name in call.before:
            raise errors.DumpFailed(
                f"the kubelet names {item!r} as the archive of {call.target}",
                hint="check the kubelet's version",
            )
        try:
            # Not blocking: a pipe must not hold us up until somebody writes to it.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(name, flags, dir_fd=self._fd)
        except OSError as exc:
            raise errors.DumpFailed(
                f"cannot open the kubelet's archive {name} in {self._path}: {exc.strerror}",
                hint="mount the kubelet's directory of checkpoints into the agent's pod",
                path=self._path,
            ) from exc
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_nlink != 1:
            os.close(fd)
            raise errors.DumpFailed(
                f"{name} in {self._path} is not what a kubelet writes",
                hint="see who else may write there",
                path=self._path,
            )
        os.unlink(name, dir_fd=self._fd)
        return fd

    def clean(self) -> list[str]:
        """Remove what calls left that nobody waits for; return the archives removed."""
        removed = []
        for name in sorted(os.listdir(self._fd)):
            call = self._read(name) if _NOTE.fullmatch(name) else None
            if call is None:
                self._forget_broken(name)
                continue
            if call.living:
                continue
            if call.holds:
                _let_through(call)
                self._forget(call)
                continue
            found = self._clean(call)
            removed += found
            over_s = call.asked_at_s + call.deadline_s + _LINGER_S
            if found or clock.wall_s() > over_s or call.boot_id != system.boot_id():
                self._forget(call)
        return removed

    def _noted(self, target: Target, deadline_s: float, holds: proc.Identity | None = None) -> Call:
        call = Call(
            note=f"{_NOTE_PREFIX}{secrets.token_hex(8)}.json",
            target=target,
            before=tuple(sorted(self._archives(target))),
            asked_at_s=clock.wall_s(),
            deadline_s=deadline_s,
            agent=proc.identity(os.getpid()),
            boot_id=system.boot_id(),
            holds=holds,
        )
        self._write(call)
        return call

    def _archives(self, target: Target) -> dict[str, float]:
        """The archives of ``target``, and when each was begun."""
        found = {}
        for name in os.listdir(self._fd):
            made_at_s = _made_at_s(target, name)
            if made_at_s is not None:
                found[name] = made_at_s
        return found

    def _clean(self, call: Call) -> list[str]:
        ours = sorted(
            name
            for name, made_at_s in self._archives(call.target).items()
            if name not in call.before and _EARLIEST_S <= made_at_s - call.asked_at_s <= _LATEST_S
        )
        if len(ours) > 1:
            log.warning(
                "it cannot be told which archive is the agent's own; all stay",
                extra={"facts": {"archives": ours, "directory": self._path}},
            )
            return []
        for name in ours:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)
        return ours

    def _write(self, call: Call) -> None:
        raw = json.dumps(dataclasses.asdict(call)).encode()
        new = call.note + ".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(new, flags, 0o600, dir_fd=self._fd)
            with open(fd, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(fd)
            os.rename(new, call.note, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as exc:
            raise errors.EnvironmentUnfit(
                f"cannot write to {self._path}: {exc.strerror}",
                hint="mount the kubelet's directory of checkpoints writable, and free space there",
                path=self._path,
            ) from exc

    def _forget(self, call: Call) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(call.note, dir_fd=self._fd)

    def _forget_broken(self, name: str) -> None:
        """Remove what was to become a note of ours but was never finished."""
        if name.startswith(_NOTE_PREFIX):
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
                if info.st_mtime + _LINGER_S < clock.wall_s():
                    os.unlink(name, dir_fd=self._fd)

    def _read(self, name: str) -> Call | None:
        """The note; None if it is gone or no note of ours."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)
            with open(fd, "rb") as file:
                return _call(name, json.loads(file.read(_NOTE_BYTES)))
        except (OSError, ValueError, KeyError, TypeError, errors.InvalidInput):
            return None


@contextlib.contextmanager
def opened(path: str = DIRECTORY) -> Iterator[Checkpoints]:
    """The directory ``path``.

    Raises:
        errors.EnvironmentUnfit: it is not there, or others may write to it.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        raise errors.EnvironmentUnfit(
            f"cannot use {path}: {exc.strerror}",
            hint="mount the kubelet's directory of checkpoints into the agent's pod",
            path=path,
        ) from exc
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise errors.EnvironmentUnfit(
                f"{path} does not belong to root alone",
                hint="see who changed the kubelet's directory",
                path=path,
            )
        yield Checkpoints(path, fd)
    finally:
        os.close(fd)


def _made_at_s(target: Target, name: str) -> float | None:
    """When the archive ``name`` was begun, if it is one of ``target``."""
    prefix = f"checkpoint-{target.pod}_{target.namespace}-{target.container}-"
    if not name.startswith(prefix) or not name.endswith(".tar"):
        return None
    try:
        made_at = datetime.datetime.fromisoformat(name[len(prefix) : -len(".tar")])
    except ValueError:
        return None
    return made_at.timestamp() if made_at.tzinfo else None


def _call(note: str, raw: dict[str, Any]) -> Call:
    return Call(
        note=note,
        target=Target(*(str(raw["target"][key]) for key in ("namespace", "pod", "container"))),
        before=tuple(str(each) for each in raw["before"]),
        asked_at_s=float(raw["asked_at_s"]),
        deadline_s=float(raw["deadline_s"]),
        agent=_identity(raw["agent"]),
        boot_id=str(raw["boot_id"]),
        abandoned=bool(raw["abandoned"]),
        holds=_identity(raw["holds"]) if raw.get("holds") else None,
    )


def _identity(raw: dict[str, Any]) -> proc.Identity:
    return proc.Identity(int(raw["pid"]), int(raw["start_ticks"]))


def _let_through(call: Call) -> None:
    """Take away what is left of the hold of a dead agent; it holds nothing any more."""
    if call.holds is None or call.boot_id != system.boot_id():
        return
    with (
        contextlib.suppress(errors.NotFound),  # its network went with the container
        namespaces.opened(call.holds, "net") as network,
    ):
        hold.release(call.table, network=network)
