"""What an operation leaves for its successor to find: locks, scratch folders, a journal.

Below the runtime directory (tmpfs or at least emptied at boot):
``locks/PID-START`` is held by flock while that process is dumped; ``ops/NAME.json`` says what an
operation may leave behind, from before it begins until after it ended; ``tables/NAME`` marks an
nft table that is kept on purpose, since a killed tree's connections wait behind it;
``strays/NAME`` one that is to be removed as soon as it is certain that no CRIU uses it;
``filled/PID-START`` says which image's files are in the container with that pid 1.
Below the work directory (a real disk): ``NAME/`` is the operation's scratch folder.

Promises: two operations never hold the same process; a dead agent's locks are void; a journal
entry whose agent lives is never touched. What cannot be written is told by ``EnvironmentUnfit``,
and nothing of it stays.
Does not: undo anything; ``recovery`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from agent import errors
from agent.host import clock, proc

RUNTIME_DIR = "/run/ckpt-agent"
WORK_DIR = "/var/tmp/ckpt-agent"  # noqa: S108 - a folder of our own, mode 0700, checked to be ours

_SUBS = ("locks", "ops", "tables", "strays", "filled")

# A lock that is looked at, or just taken, names no holder for a few system calls.
_LOOKED_AT_S = 1.0
_AGAIN_S = 0.002

_counter = itertools.count()


@dataclasses.dataclass(frozen=True)
class About:
    """What an operation may leave behind depends on. ``programs`` are the names of the processes
    that a restore makes. ``container`` is pid 1 of the container that the operation is about, by
    its number on this host, and ``network`` the inode number of its network namespace, where rules
    may be; ``numbers`` are then the pids inside that a restore makes, and that were free at
    ``began_ticks`` since boot. ``nested``: it makes them in a pid namespace of their own below the
    container's.
    """

    programs: tuple[str, ...] = ()
    container: proc.Identity | None = None
    network: int = 0
    numbers: tuple[int, ...] = ()
    began_ticks: int = 0
    nested: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """One running operation. ``table`` is its CRIU's nft table as soon as the name is known;
    until then ``tables_before`` are those that others had when CRIU was about to make its own,
    and None before that.
    """

    name: str
    action: str
    agent: proc.Identity
    criu: proc.Identity | None
    pids: tuple[proc.Identity, ...]
    scratch: str
    tables_before: tuple[str, ...] | None = None
    table: str = ""
    about: About = About()


class Places:
    """The two directories; made and checked when first used."""

    def __init__(self, runtime_dir: str = RUNTIME_DIR, work_dir: str = WORK_DIR) -> None:
        self.runtime_dir = runtime_dir
        self.work_dir = work_dir

    def prepare(self) -> None:
        """Make the directories, for root alone.

        Raises:
            errors.PrivilegeMissing: not allowed, or somebody else owns them.
        """
        for path in (
            self.work_dir,
            self.runtime_dir,
            *(os.path.join(self.runtime_dir, sub) for sub in _SUBS),
        ):
            try:
                os.makedirs(path, mode=0o700, exist_ok=True)
                info = os.lstat(path)
            except OSError as exc:
                raise errors.PrivilegeMissing(
                    f"cannot use {path}: {exc.strerror}", hint="run as root", path=path
                ) from exc
            # In a folder that everybody may write to, a stranger may have been there first.
            if info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise errors.PrivilegeMissing(
                    f"{path} does not belong to this user alone",
                    hint="remove it, or run as its owner",
                    path=path,
                )

    def entries(self) -> list[Entry]:
        """The journal: every operation that runs or died, in order of names. Entries that cannot
        be read (being written, or cut short by a crash) are left out.
        """
        found = []
        ops = os.path.join(self.runtime_dir, "ops")
        names = sorted(os.listdir(ops)) if os.path.isdir(ops) else []
        for name in names:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                found.append(_entry(json.loads(_content(os.path.join(ops, name)))))
        return found

    def write(self, entry: Entry) -> None:
        """Put ``entry`` into the journal, or replace it."""
        path = self.entry_path(entry.name)
        with _written(path):
            try:
                with open(path + ".new", "w", encoding="utf-8") as file:
                    json.dump(dataclasses.asdict(entry), file)
                os.rename(path + ".new", path)
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + ".new")
                raise

    def remove(self, name: str) -> None:
        """Strike an operation off; a no-op if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.entry_path(name))

    def entry_path(self, name: str) -> str:
        """The file of an operation's entry."""
        return os.path.join(self.runtime_dir, "ops", name + ".json")

    def keep_table(self, name: str) -> None:
        """Mark an nft table as kept on purpose."""
        with open(os.path.join(self.runtime_dir, "tables", name), "w", encoding="utf-8"):
            pass

    def forget_table(self, name: str) -> None:
        """Take the mark off; a no-op without one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.runtime_dir, "tables", name))

    def note_stray(self, name: str) -> None:
        """Mark an nft table that nobody may need any more, but that cannot be told for sure yet."""
        with open(os.path.join(self.runtime_dir, "strays", name), "w", encoding="utf-8"):
            pass

    def forget_stray(self, name: str) -> None:
        """Take that mark off; a no-op without one."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.runtime_dir, "strays", name))

    def strays(self) -> set[str]:
        """The tables marked as strays."""
        with contextlib.suppress(FileNotFoundError):
            return set(os.listdir(os.path.join(self.runtime_dir, "strays")))
        return set()

    def kept_tables(self) -> set[str]:
        """The tables that are kept on purpose."""
        with contextlib.suppress(FileNotFoundError):
            return set(os.listdir(os.path.join(self.runtime_dir, "tables")))
        return set()

    def scratch_names(self) -> list[str]:
        """The scratch folders there are."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self.work_dir))
        return []

    def remove_scratch(self, name: str) -> None:
        """Remove a scratch folder with all in it; a no-op without one."""
        shutil.rmtree(os.path.join(self.work_dir, name), ignore_errors=True)

    def note_filled(self, init: proc.Identity, image: str) -> None:
        """Write down whose files are in the container with this pid 1."""
        path = os.path.join(self.runtime_dir, "filled", f"{init.pid}-{init.start_ticks}")
        with open(path + ".new", "w", encoding="utf-8") as file:
            file.write(image)
        os.rename(path + ".new", path)

    def filled(self, init: proc.Identity) -> str:
        """Whose files are in the container with this pid 1; "" if none were put there."""
        name = f"{init.pid}-{init.start_ticks}"
        with contextlib.suppress(FileNotFoundError):
            return _content(os.path.join(self.runtime_dir, "filled", name))
        return ""

    def forget_ended(self) -> None:
        """Forget about containers that have ended."""
        folder = os.path.join(self.runtime_dir, "filled")
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            pid, _, start = name.removesuffix(".new").partition("-")
            if not proc.alive(proc.Identity(int(pid), int(start))):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))

    def forget_unwritten(self) -> None:
        """Remove what agents were writing into the journal when they died."""
        folder = os.path.join(self.runtime_dir, "ops")
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if not name.endswith(".json.new"):
                continue
            with contextlib.suppress(FileNotFoundError, ValueError):
                _, pid, start, _ = name.rsplit("-", 3)
                if not proc.alive(proc.Identity(int(pid), int(start))):
                    os.unlink(os.path.join(folder, name))

    def forget_void_locks(self) -> None:
        """Remove the locks of dead agents; those that are held stay."""
        folder = os.path.join(self.runtime_dir, "locks")
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _same_file(fd, path):
                        os.unlink(path)
                finally:
                    os.close(fd)

    @contextlib.contextmanager
    def operation(
        self, action: str, pids: Iterable[proc.Identity], *, about: About | None = None
    ) -> Iterator[Operation]:
        """Begin an operation: its scratch folder and journal entry exist inside the context."""
        me = proc.identity(os.getpid())
        name = f"{action}-{me.pid}-{me.start_ticks}-{next(_counter)}"
        scratch = os.path.join(self.work_dir, name)
        entry = Entry(name, action, me, None, tuple(pids), scratch, about=about or About())
        self.write(entry)
        try:
            with _written(scratch):
                os.mkdir(scratch, 0o700)
            yield Operation(self, entry)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            self.remove(name)

    @contextlib.contextmanager
    def locked(self, identities: Iterable[proc.Identity]) -> Iterator[None]:
        """Hold the processes against other operations of this host.

        Raises:
            errors.TargetBusy: another operation holds one of them.
        """
        with contextlib.ExitStack() as held:
            for who in sorted(identities):
                self._lock(who, held)
            yield

    def _lock(self, who: proc.Identity, held: contextlib.ExitStack) -> None:
        path = os.path.join(self.runtime_dir, "locks", f"{who.pid}-{who.start_ticks}")
        looked_at = clock.Deadline.after(_LOOKED_AT_S)
        while True:
            with _written(path):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(fd, 32).decode(errors="replace").strip()
                os.close(fd)
                if not holder and not looked_at.expired:
                    # Nobody's, but just looked at (forget_void_locks).
                    clock.wait_until(lambda: False, looked_at.sooner(_AGAIN_S))
                    continue
                holder = holder or "?"
                raise errors.TargetBusy(
                    f"process {who.pid} is being dumped or restored by the agent with pid {holder}",
                    hint="wait until that has ended",
                    pid=who.pid,
                    holder=holder,
                ) from None
            # The last holder removes the file: a lock on a file without a name guards nothing.
            if _same_file(fd, path):
                break
            os.close(fd)
        held.callback(os.close, fd)
        held.callback(os.unlink, path)
        with _written(path):
            os.ftruncate(fd, 0)
            os.write(fd, str(os.getpid()).encode())


class Operation:
    """A running operation's own view of its journal entry."""

    def __init__(self, places: Places, entry: Entry) -> None:
        self._places = places
        self.entry = entry

    @property
    def scratch(self) -> str:
        """The folder for its files."""
        return self.entry.scratch

    def folder(self, name: str) -> str:
        """Make a folder inside the scratch folder and return its path."""
        path = os.path.join(self.scratch, name)
        with _written(path):
            os.mkdir(path, 0o700)
        return path

    def note_tables_before(self, names: Iterable[str]) -> None:
        """Write down which nft tables are others'."""
        self.entry = dataclasses.replace(self.entry, tables_before=tuple(sorted(names)))
        self._places.write(self.entry)

    def note_table(self, name: str) -> None:
        """Write down which nft table is its own."""
        self.entry = dataclasses.replace(self.entry, table=name)
        self._places.write(self.entry)

    def note_criu(self, pid: int) -> None:
        """Write down which CRIU works for it."""
        self.entry = dataclasses.replace(self.entry, criu=proc.identity(pid))
        self._places.write(self.entry)


@contextlib.contextmanager
def _written(path: str) -> Iterator[None]:
    """Foreign errors become ours."""
    try:
        yield
    except OSError as exc:
        raise errors.EnvironmentUnfit(
            f"cannot write {path}: {exc.strerror}",
            hint="see to it that there is room and that it may be written to",
            path=path,
        ) from exc


def _content(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _same_file(fd: int, path: str) -> bool:
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)


def _entry(raw: dict[str, Any]) -> Entry:
    before = raw["tables_before"]
    return Entry(
        name=str(raw["name"]),
        action=str(raw["action"]),
        agent=_identity(raw["agent"]),
        criu=_identity(raw["criu"]) if raw["criu"] else None,
        pids=tuple(_identity(each) for each in raw["pids"]),
        scratch=str(raw["scratch"]),
        tables_before=None if before is None else tuple(str(each) for each in before),
        table=str(raw["table"]),
        about=_about(raw["about"]),
    )


def _about(raw: dict[str, Any]) -> About:
    return About(
        programs=tuple(str(each) for each in raw["programs"]),
        container=_identity(raw["container"]) if raw["container"] else None,
        network=int(raw["network"]),
        numbers=tuple(int(each) for each in raw["numbers"]),
        began_ticks=int(raw["began_ticks"]),
        nested=bool(raw.get("nested")),
    )


def _identity(raw: dict[str, Any]) -> proc.Identity:
    return proc.Identity(int(raw["pid"]), int(raw["start_ticks"]))
