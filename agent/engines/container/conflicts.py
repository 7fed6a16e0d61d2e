"""What of a placeholder does not fit an image: everything at once, before anything is touched.

Promises: every reason is a sentence that names the thing and, where there is one, the way out.
Does not: change anything but the counter of pids in a placeholder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from agent import errors
from agent.engines.container import (
    connections,
    files,
    holding,
    inside,
    mountpoints,
    rights,
    target,
)
from agent.engines.criu import facts as criu_facts
from agent.engines.criu import supervisor
from agent.host import addresses, cgroups, clock, proc, system
from agent.model.container import LAYOUT, Container

# CRIU itself and page tables, while the tree comes up within the container's limit.
_SPARE_BYTES = 16 << 20
# A probe has a second by default; on a loaded node its start and end take as long again.
_EXEC_S = 5.0


def numbers(known: dict[str, Any]) -> set[int]:
    """Every pid and thread number inside that the tree will take.

    Raises:
        errors.UnknownFormat: another engine made the image, in a way of its own.
        errors.Corrupt: the facts do not make sense.
    """
    if known.get("layout") != LAYOUT:
        raise errors.UnknownFormat(
            f"the image has layout {known.get('layout')!r}, containers are restored from {LAYOUT}",
            hint="use the engine that made it",
        )
    try:
        return {int(tid) for _, tids in known["threads"] for tid in tids} | {
            int(pid) for pid, _ in known["threads"]
        }
    except (KeyError, TypeError, ValueError) as exc:
        raise incomplete() from exc


def whole(known: dict[str, Any]) -> bool:
    """Whether the tree has a container's first process, and so numbers of its own."""
    return bool(known["root"] == 1)


def incomplete() -> errors.Corrupt:
    """The error for facts that lack something."""
    return errors.Corrupt(
        "the facts of the image are incomplete", hint="use another image", part="facts"
    )


def find(
    known: dict[str, Any], memory_bytes: int, container: Container, moved: Mapping[str, str]
) -> list[str]:
    """The reasons why the tree of these facts cannot be restored into this container. ``moved`` are
    addresses of its group, old to new.

    Raises:
        errors.Corrupt: the facts do not make sense.
        errors.NotFound: the container has ended.
    """
    try:
        _complete(known)
        reasons = [
            *_state(container),
            *_image(known, container),
            *_machine(known),
            *_rights(known),
            *_mounts(known, container),
            *_memory(known, memory_bytes, container),
            *_stdio(known, container),
            *_addresses(known, container, moved),
        ]
        if not reasons:
            _let_execs_end(known, container)
        return [*reasons, *_numbers(known, container)]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise incomplete() from exc


def _complete(known: dict[str, Any]) -> None:
    """Raise one of what a missing or odd fact raises, for those that are looked at later."""
    if int(known["root"]) not in numbers(known):
        raise incomplete()
    if files.content_bytes(known) < 0:
        raise incomplete()
    about = known["container"]
    connections.Moved(about["addresses"], ()).lost(known)
    if not all(isinstance(link, str) for link in about["stdio"]):
        raise incomplete()


def _state(container: Container) -> Iterator[str]:
    if not holding.is_hold(container.pid):
        yield (
            f"container {container.name} is no placeholder: its first process is not hold (label "
            "the pod ckpt-agent.dev/checkpoint=enabled)"
        )
    elif not holding.waits(container.pid):
        yield (
            f"container {container.name} runs its own workload already (a placeholder's pod has "
            "the annotation ckpt-agent.dev/restore)"
        )
    elif proc.status(container.pid).ns_pids[-1] != 1:
        yield f"container {container.name} has no pid namespace of its own (shareProcessNamespace)"
    ours = proc.namespaces(os.getpid())
    if proc.namespaces(container.pid)["user"] != ours["user"]:
        yield f"container {container.name} has a user namespace of its own (hostUsers: false)"


def _image(known: dict[str, Any], container: Container) -> Iterator[str]:
    digest = known["container"]["image_digest"]
    if digest and container.image_digest and digest != container.image_digest:
        yield f"the container's image is {container.image_digest}, at the dump it was {digest}"


def _machine(known: dict[str, Any]) -> Iterator[str]:
    here = os.uname()
    if known["machine"] != here.machine:
        yield f"the image is of a {known['machine']} machine, this is {here.machine}"
        return
    missing = sorted(set(known["cpu_flags"]) - criu_facts.cpu_flags())
    if missing:
        yield f"this node's CPU lacks {', '.join(missing)}"
    if _release(here.release) < _release(known["kernel"]):
        yield f"this node's kernel is {here.release}, older than the image's {known['kernel']}"


def _release(text: str) -> tuple[int, ...]:
    """Version and major revision: within one, nothing is taken away from programs."""
    parts = text.split("-")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


def _rights(known: dict[str, Any]) -> Iterator[str]:
    users = {int(each["uid"]) for each in known["processes"]}
    lacking = rights.missing(users, int(known["container"]["capabilities"]))
    if lacking:
        yield f"the agent lacks {', '.join(lacking)}, which restoring this image takes"


def _mounts(known: dict[str, Any], container: Container) -> Iterator[str]:
    there = {mount.destination for mount in container.mounts}
    for path in known["container"]["mounts"]:
        if path not in there:
            yield f"nothing is mounted at {path}, where the image had a volume"
    try:
        travelling = mountpoints.look(container).volumes
    except errors.TargetUnsuitable as exc:
        yield exc.message
        return
    for volume in known["volumes"]:
        path = volume["destination"]
        if path in there and path not in travelling:
            yield f"{path} was an emptyDir or /dev/shm, and is another kind of volume here"
        elif (
            path in travelling
            and travelling[path].read_only
            and not volume.get("read_only")
            and volume["entries"] > 1
        ):
            yield f"{path} is mounted read-only here"
    if not os.path.isdir(container.rootfs):
        yield f"the agent does not see {container.rootfs}, the container's root file system"


def _memory(known: dict[str, Any], memory_bytes: int, container: Container) -> Iterator[str]:
    del known
    limit = cgroups.memory_limit_bytes(cgroups.directories(container.pid))
    needed = memory_bytes + _SPARE_BYTES
    if limit is not None and needed > limit:
        yield (
            f"the container's memory limit is {limit >> 20} MiB, the image needs {needed >> 20} MiB"
        )
    free = system.memory_available_bytes()
    if needed > free:
        yield f"the image needs {needed >> 20} MiB of memory, this node has {free >> 20} MiB free"


def _numbers(known: dict[str, Any], container: Container) -> Iterator[str]:
    if whole(known):
        return  # they are taken in a namespace of its own
    for number, pid in sorted(_taken(known, container).items()):
        yield f"pid {number} inside of the container is in use by {target.described([pid])}"


def _taken(known: dict[str, Any], container: Container) -> dict[int, int]:
    return inside.host_pids(proc.identity(container.pid), numbers(known))


def _let_execs_end(known: dict[str, Any], container: Container) -> None:
    """Keep the numbers free: probes come and go in a placeholder as in any container. Those to come
    get higher numbers, and those that are there have a moment to end.
    """
    if whole(known) or not holding.waits(container.pid):
        return
    init = proc.identity(container.pid)
    inside.raise_counter(init, supervisor.last_pid(numbers(known), system.last_pid_max()))
    clock.wait_until(
        lambda: not any(map(_is_exec, _taken(known, container).values())),
        clock.Deadline.after(_EXEC_S),
    )


def _is_exec(pid: int) -> bool:
    try:
        return target.executed(pid)
    except errors.NotFound:
        return False


def _addresses(
    known: dict[str, Any], container: Container, moved: Mapping[str, str]
) -> Iterator[str]:
    here = addresses.of(container.pid)
    found = connections.Moved(known["container"]["addresses"], here, moved)
    for address in found.homeless(known):
        yield f"sockets use the old pod's address {address}, and this pod has none of its kind"


def _stdio(known: dict[str, Any], container: Container) -> Iterator[str]:
    for number, link in enumerate(known["container"]["stdio"]):
        if not str(link).startswith("pipe:"):
            continue
        here = ""
        with contextlib.suppress(OSError):
            here = os.readlink(f"/proc/{container.pid}/fd/{number}")
        if not here.startswith("pipe:"):
            yield (
                f"standard stream {number} was the runtime's pipe, and is {here or 'closed'} here "
                "(stdin and tty must be set as in the old pod)"
            )
