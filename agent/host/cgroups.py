"""Control groups: which directories are a process's, who is in them, putting a process there.

Promises: version 1 (one directory a controller) and version 2 (one directory) are treated alike;
a group's members include those of the groups below it.
Does not: make, remove or limit groups.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator

from agent import errors
from agent.host import clock, mounts, namespaces, proc

# What a controller of version 1 says for "no limit": the largest multiple of a page below 2^63.
_NO_LIMIT = 1 << 62
# Of version 1 and of version 2: the file and what freezes, the file and the line that tell of it.
_FREEZERS = (
    ("freezer.state", "FROZEN", "freezer.state", "FROZEN"),
    ("cgroup.freeze", "1", "cgroup.events", "frozen 1"),
)
_FREEZE_S = 5.0
_SYSTEM_UNIT = re.compile(r"(?:^|/)(?:system\.slice/([^/]+)|(init\.scope))(?:/|$)")


def directories(pid: int) -> list[str]:
    """The directories of the groups that a process is in, where this program sees them: one of
    each hierarchy that is mounted here.

    Raises:
        errors.NotFound: there is no such process.
        errors.EnvironmentUnfit: no hierarchy is mounted here.
    """
    found = _directories(pid)
    if not found or any(".." in path for _, path in _memberships(pid)):
        # Paths are shown relative to the reader's cgroup namespace: the whole is seen from init's.
        found = namespaces.inside(proc.identity(1), ("cgroup",), lambda: _directories(pid))
    if not found:
        raise errors.EnvironmentUnfit(
            "no cgroup hierarchy is mounted", hint="mount the host's /sys/fs/cgroup here"
        )
    return found


def _directories(pid: int) -> list[str]:
    hierarchies = [m for m in mounts.of("thread-self") if m.kind in ("cgroup", "cgroup2")]
    found = []
    for controllers, path in _memberships(pid):
        for mount in hierarchies:
            if controllers:
                suits = mount.kind == "cgroup" and set(controllers) <= set(mount.options)
            else:
                suits = mount.kind == "cgroup2"
            if not suits:
                continue
            directory = _below(mount, path)
            if directory and os.path.isdir(directory):
                found.append(directory)
                break
    return found


def _memberships(pid: int) -> Iterator[tuple[list[str], str]]:
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise errors.NotFound(f"there is no process {pid}", pid=pid) from exc
    for line in lines:
        _, controllers, path = line.split(":", 2)
        yield [name for name in controllers.split(",") if name], path


def _below(mount: mounts.Mount, path: str) -> str:
    """Where the group with this path lies below a mount of its hierarchy; "" if it does not."""
    root = "" if mount.root == "/" else mount.root
    if path != root and not path.startswith(root + "/"):
        return ""
    return mount.point + path.removeprefix(root).rstrip("/")


def system_unit(pid: int) -> str:
    """The unit of the system's service manager that a process belongs to, such as ``ssh.service``;
    "" if it belongs to a user or to none. Raises ``errors.NotFound`` if it is gone.
    """
    for controllers, path in _memberships(pid):
        found = _SYSTEM_UNIT.search(path) if controllers in ([], ["name=systemd"]) else None
        # A user's own manager has an init.scope too, below user.slice.
        if found and "user.slice/" not in path:
            return found[1] or found[2]
    return ""


def members(directory: str) -> list[int]:
    """The processes in a group and in all groups below it, ascending, by their numbers here."""
    found: set[int] = set()
    for folder, _, names in os.walk(directory):
        if "cgroup.procs" in names:
            # A group may be removed while it is looked at.
            with contextlib.suppress(FileNotFoundError, OSError):
                found.update(_numbers(os.path.join(folder, "cgroup.procs")))
    return sorted(found)


def _numbers(path: str) -> list[int]:
    with open(path, encoding="ascii") as file:
        return [int(line) for line in file]


def join(pid: int, groups: Iterable[str]) -> None:
    """Move a process into these groups.

    Raises:
        errors.EnvironmentUnfit: the kernel refuses.
    """
    for group in groups:
        try:
            _join(pid, group)
        except OSError as exc:
            raise errors.EnvironmentUnfit(
                f"cannot move a process into {group}: {exc.strerror}",
                hint="mount the host's /sys/fs/cgroup here, writable",
                path=group,
            ) from exc


def _join(pid: int, group: str) -> None:
    def write() -> None:
        with open(os.path.join(group, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write(str(pid))

    try:
        write()
    except FileNotFoundError:
        # What version 2 says, mounted with nsdelegate as systemd does, of groups outside of the
        # writer's own cgroup namespace, which a pod that is not privileged has.
        if not os.path.isdir(group):
            raise
        namespaces.inside(proc.identity(1), ("cgroup",), write)


def freeze(groups: Iterable[str]) -> None:
    """Let all processes in these groups of one process stand still until somebody thaws them; they
    can still be killed. Returns when they stand.

    Raises:
        errors.EnvironmentUnfit: none of the groups can freeze, or the kernel refuses.
        errors.DeadlineExceeded: they do not stand still in time.
    """
    for group in groups:
        for name, value, report, sign in _FREEZERS:
            if not os.path.exists(os.path.join(group, name)):
                continue
            try:
                with open(os.path.join(group, name), "w", encoding="ascii") as file:
                    file.write(value)
            except OSError as exc:
                raise errors.EnvironmentUnfit(
                    f"cannot freeze {group}: {exc.strerror}",
                    hint="mount the host's /sys/fs/cgroup here, writable",
                    path=group,
                ) from exc
            _await_frozen(group, report, sign)
            return
    raise errors.EnvironmentUnfit(
        "no control group of the container can freeze it",
        hint="mount the host's freezer hierarchy (/sys/fs/cgroup) here",
    )


def _await_frozen(group: str, report: str, sign: str) -> None:
    if not clock.wait_until(lambda: _says(group, report, sign), clock.Deadline.after(_FREEZE_S)):
        raise errors.DeadlineExceeded(f"{group} does not become {sign!r}", path=group)


def frozen(groups: Iterable[str]) -> bool:
    """Whether the processes in one of these groups stand still."""
    return any(_says(group, *telling) for group in groups for _, _, *telling in _FREEZERS)


def _says(group: str, report: str, sign: str) -> bool:
    try:
        with open(os.path.join(group, report), encoding="ascii") as file:
            return sign in file.read().splitlines()
    except FileNotFoundError:
        return False


def memory_limit_bytes(groups: Iterable[str]) -> int | None:
    """The memory limit of a process in these groups, those above them included; None without."""
    limits = []
    for group in groups:
        for name in ("memory.limit_in_bytes", "memory.max"):
            folder = group
            while os.path.exists(os.path.join(folder, name)):
                with contextlib.suppress(ValueError, OSError):
                    limits.append(_limit(os.path.join(folder, name)))
                folder = os.path.dirname(folder)
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def _limit(path: str) -> int:
    with open(path, encoding="ascii") as file:
        text = file.read().strip()
    return _NO_LIMIT if text == "max" else int(text)
