"""Starting CRIU inside a container, and finding the container's processes from outside.

CRIU joins the container's namespaces one by one but keeps this program's rights; it is this
program's own child, so that its end is seen at once. What it works with, it has as descriptors.

Promises: nothing is copied into the container; the worker ends with the context.
Does not: decide what CRIU is to do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence

from agent import errors
from agent.engines.container.bundle import Bundle
from agent.engines.criu import rpc
from agent.host import cgroups, namespaces, proc, subprocesses

# The others of a container's namespaces; CRIU is born in its pid namespace.
_JOINED = ("--uts", "--ipc", "--net", "--cgroup")
_COUNTER_S = 10.0


@contextlib.contextmanager
def worker(
    bundle: Bundle,
    init: proc.Identity,
    images: str,
    pass_fds: Sequence[int],
    *,
    groups: Iterable[str] = (),
    mounts: int | None = None,
    under: Sequence[str] = (),
) -> Iterator[tuple[rpc.Worker, str]]:
    """Start ``criu swrk`` in the container whose pid 1 is ``init``, and in the control groups
    ``groups``; gives it and its name for the folder ``images``. ``mounts`` is a descriptor of the
    mount namespace to be in instead of the container's, ``under`` a program to start CRIU by.

    Raises:
        errors.NotFound: the container has ended.
        errors.EnvironmentUnfit: a program or a right is missing.
    """
    with bundle.opened() as bundle_fd, _opened(images) as images_fd:
        environment = bundle.environment(bundle_fd)
        of_mounts = "--mount" if mounts is None else f"--mount=/proc/self/fd/{mounts}"
        enter = [_program("nsenter"), "--target", str(init.pid), of_mounts, *_JOINED]
        passed = [bundle_fd, images_fd, *([] if mounts is None else [mounts])]

        def start(argv: list[str], descriptors: list[int], cwd: str | None) -> subprocesses.Child:
            return namespaces.inside(
                init,
                ("pid",),
                lambda: subprocesses.start(
                    argv, pass_fds=[*descriptors, *passed], cwd=cwd, env=environment
                ),
            )

        command = [*under, *enter, "--", *bundle.command(bundle_fd)]
        bundle.lay_kernel_cache(images)
        with rpc.worker(command, pass_fds=pass_fds, start=start) as running:
            cgroups.join(running.child.pid, groups)
            if not proc.alive(init):
                raise errors.NotFound(f"container process {init.pid} has ended", pid=init.pid)
            yield running, f"/proc/self/fd/{images_fd}"


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def raise_counter(init: proc.Identity, last_pid: int) -> None:
    """Let the next process of the container's pid namespace get a number above ``last_pid``.

    Raises:
        errors.EnvironmentUnfit: the kernel refuses.
    """
    # The file is about the reader's own namespace, but a container's /proc/sys is read-only.
    script = f"mount -t proc proc /proc && echo {last_pid} > /proc/sys/kernel/ns_last_pid"
    argv = [_program("unshare"), "--mount", "sh", "-c", script]
    done = namespaces.inside(init, ("pid",), lambda: subprocesses.run(argv, timeout_s=_COUNTER_S))
    if done.status != 0:
        raise errors.EnvironmentUnfit(
            "cannot move the counter of pids inside the container: "
            + done.stderr.decode(errors="replace").strip(),
            hint="the agent needs CAP_SYS_ADMIN, unshare and mount",
        )


def host_pids(init: proc.Identity, numbers: Iterable[int]) -> dict[int, int]:
    """The numbers on this host of the container's processes that have ``numbers`` inside."""
    wanted = set(numbers)
    found = {}
    inside = proc.namespaces(init.pid)["pid"]
    for pid in proc.pids():
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
            number = proc.status(pid).ns_pids[-1]
            if number in wanted and proc.namespaces(pid)["pid"] == inside:
                found[number] = pid
    return found


def number(pid: int) -> int:
    """The number that a process has in its innermost pid namespace."""
    return proc.status(pid).ns_pids[-1]


def number_for(init: int, pid: int) -> int:
    """The number by which ``init``, a first process, knows one in its own pid namespace or in one
    below it; 0 if it does not.
    """
    numbers, depth = proc.status(pid).ns_pids, len(proc.status(init).ns_pids)
    return numbers[depth - 1] if len(numbers) >= depth else 0


def _program(name: str) -> str:
    path = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise errors.EnvironmentUnfit(f"there is no program {name}", hint="install util-linux")
    return path
