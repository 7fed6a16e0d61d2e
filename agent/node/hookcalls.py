"""Carrying out one hook in a pod.

A command goes through the container runtime, as a probe's does: nobody else knows all that keeps a
container in its bounds. A request or a call is made from the pod's network, or to a socket in the
container with the rights of the container's own first process. What the agent does itself it does
from outside, by descriptors below the container's root.

Promises: a hook has no more rights than its container; it has ended by its deadline, and nothing
that it started is left; what it said travels with its failure and goes nowhere else.
Does not: choose hooks, or weigh their failures.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from agent import errors
from agent.cri.runtime import Executed
from agent.host import acting, clock, confine, filecaches, namespaces, proc, webcall
from agent.model.container import Container
from agent.model.hooks import Action, Builtin, Exec, Grpc, Hook, Http, Told, Unix
from agent.rpc import hookclient

# A killed command is gone at once, and the runtime has noticed soon after.
_KILLED_S = 10.0
_KILL_AGAIN_S = 0.05
# In the environment of everything that a command starts.
_MARK = "CKPT_AGENT_HOOK_RUN"
_SAID_CHARACTERS = 600
_SAID_LINES = 5
_LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class Executes(Protocol):
    """This node's container runtime (agent.cri.runtime)."""

    def execute(self, container_id: str, argv: Sequence[str], timeout_s: float) -> Executed:
        """Run a command in a container to its end."""


class Calls:
    """Hooks of any pod of this node."""

    def __init__(self, runtime: Executes) -> None:
        self._runtime = runtime

    def call(self, hook: Hook, containers: Sequence[Container], told: Told) -> None:
        """Run ``hook`` in the first of ``containers``, or the one that it names.

        Raises:
            errors.HookFailed: it failed, did not end in time, or could not be run.
        """
        deadline = clock.Deadline.after(hook.deadline_s)
        container = next((c for c in containers if c.name == (hook.container or c.name)), None)
        try:
            if container is None:
                raise errors.NotFound(
                    f"container {hook.container} does not take part",
                    hint="name one that is checkpointed",
                )
            self._carry_out(hook, container, told, deadline)
        except errors.DeadlineExceeded as exc:
            raise _failed(
                hook, f"did not end within {hook.deadline_s:g} s", "allow more deadlineSeconds", exc
            ) from exc
        except errors.CkptError as exc:
            raise _failed(hook, f"failed: {exc.message}", exc.hint, exc) from exc

    def _carry_out(
        self, hook: Hook, container: Container, told: Told, deadline: clock.Deadline
    ) -> None:
        match hook.means:
            case Exec(argv):
                self._execute(container, argv, told, deadline)
            case Http(port, path):
                _ask(_to_port(container, port, deadline), path, told, deadline)
            case Unix(place, path):
                _ask(_to_socket(container, place, deadline), path, told, deadline)
            case Grpc(port, ""):
                _call(_to_port(container, port, deadline), told, deadline)
            case Grpc(_, place):
                _call(_to_socket(container, place, deadline), told, deadline)
            case Builtin(action, path):
                _act(container, action, path, deadline)

    def _execute(
        self, container: Container, argv: Sequence[str], told: Told, deadline: clock.Deadline
    ) -> None:
        mark = secrets.token_hex(16)
        given = {**told.environment(), _MARK: mark}
        command = ["env", *(f"{name}={value}" for name, value in given.items()), *argv]
        init = proc.identity(container.pid)
        longest_s = deadline.remaining_s + _KILLED_S
        with ThreadPoolExecutor(1, thread_name_prefix="hook") as pool:
            running = pool.submit(self._runtime.execute, container.id, command, longest_s)
            with contextlib.suppress(TimeoutError):
                running.exception(deadline.remaining_s)
            late = not running.done()
            _end_all(init, mark, running)
        done = running.result()
        if late:
            raise errors.DeadlineExceeded("it was killed", output=_said(done.stderr or done.stdout))
        if done.status != 0:
            raise errors.DumpFailed(
                f"it ended with status {done.status}",
                hint="there is no such program in the container, or no env"
                if done.status == 127
                else "see what it said",
                output=_said(done.stderr or done.stdout),
            )


def _end_all(init: proc.Identity, mark: str, running: Future[Executed]) -> None:
    """Kill what a command has left in its container, and the command itself, until the runtime
    knows of its end and nothing is left.
    """

    def quiet() -> bool:
        return not _kill_marked(init, mark) and running.done()

    clock.wait_until(quiet, clock.Deadline.after(_KILLED_S), every_s=_KILL_AGAIN_S)


def _kill_marked(init: proc.Identity, mark: str) -> bool:
    """Kill what has ``mark`` in its environment; whether there was any."""
    wanted = f"{_MARK}={mark}".encode()
    found = False
    try:
        inside = proc.namespaces(init.pid)["pid"]
    except errors.NotFound:
        return False  # and all that was in the container with it
    for pid in proc.pids():
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing, OSError):
            if proc.namespaces(pid)["pid"] != inside:
                continue
            # By a descriptor: the number could be another's by the time of the signal.
            which = os.pidfd_open(pid)
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    if wanted in file.read().split(b"\0"):
                        signal.pidfd_send_signal(which, signal.SIGKILL)
                        found = True
            finally:
                os.close(which)
    return found


def _ask(connected: socket.socket, path: str, told: Told, deadline: clock.Deadline) -> None:
    answer = webcall.post(connected, path, json.dumps(told.document()).encode(), deadline)
    if not 200 <= answer.status < 300:
        raise errors.DumpFailed(
            f"it was answered with {answer.status}",
            hint="see what the answer said",
            output=_said(answer.tail),
        )


def _call(connected: socket.socket, told: Told, deadline: clock.Deadline) -> None:
    answer = hookclient.call(connected, told, deadline)
    if answer.status != hookclient.OK:
        raise errors.DumpFailed(
            f"it was answered with {answer.status}",
            hint="does it serve agent.rpc.v1.Hooks?"
            if answer.status == "UNIMPLEMENTED"
            else "see what the answer said",
            output=_said(answer.said.encode()),
        )


def _to_port(container: Container, port: int, deadline: clock.Deadline) -> socket.socket:
    """A connection to a port of the pod's loopback, by whichever version of IP it listens on."""
    init = proc.identity(container.pid)
    refused: OSError | None = None
    for family, address in _LOOPBACKS:
        try:
            # The socket is of the network namespace that it is made in, whoever uses it then.
            made = namespaces.inside(init, ("net",), functools.partial(socket.socket, family))
            return _connected(made, (address, port), deadline)
        except OSError as exc:
            refused = refused or exc
    raise errors.Unreachable(
        f"nothing answers on port {port} of the pod's loopback"
        + (f": {refused.strerror}" if refused and refused.strerror else ""),
        hint="does the workload listen on localhost?",
    )


def _to_socket(container: Container, place: str, deadline: clock.Deadline) -> socket.socket:
    with confine.root_of(proc.identity(container.pid)) as root:

        def connect() -> socket.socket:
            found = confine.open_inside(root, place, os.O_PATH)
            try:
                if not stat.S_ISSOCK(os.fstat(found).st_mode):
                    raise errors.InvalidInput(f"{place} is no socket", hint="check the path")
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                return _connected(made, f"/proc/self/fd/{found}", deadline)
            finally:
                os.close(found)

        try:
            return acting.acting_as(container.pid, connect)
        except OSError as exc:
            raise errors.Unreachable(
                f"nothing answers at {place} of container {container.name}: {exc.strerror}",
                hint="does the workload listen there?",
            ) from exc


def _connected(
    made: socket.socket, address: str | tuple[str, int], deadline: clock.Deadline
) -> socket.socket:
    """``made`` when it is connected; it is closed if that fails."""
    try:
        made.settimeout(max(deadline.remaining_s, _KILL_AGAIN_S))
        made.connect(address)
        made.settimeout(None)
    except TimeoutError as exc:
        made.close()
        raise errors.DeadlineExceeded("nobody accepts the connection") from exc
    except BaseException:
        made.close()
        raise
    return made


def _act(container: Container, action: Action, path: str, deadline: clock.Deadline) -> None:
    """Do it in a thread that is left behind where the kernel does not come back in time."""
    done: Future[None] = Future()

    def work() -> None:
        try:
            _on_files(container, action, path, deadline)
        except BaseException as exc:  # noqa: BLE001 - raised where the result is asked for
            done.set_exception(exc)
        else:
            done.set_result(None)

    threading.Thread(target=work, name="hook", daemon=True).start()
    try:
        done.result(deadline.remaining_s)
    except TimeoutError as exc:
        raise errors.DeadlineExceeded("a disk or a file server does not answer") from exc


def _on_files(container: Container, action: Action, path: str, deadline: clock.Deadline) -> None:
    with confine.root_of(proc.identity(container.pid)) as root:
        if action is Action.DROP_CACHES:
            filecaches.drop(root, container.pid, path, deadline)
        elif path:
            filecaches.sync(root, container.pid, path, deadline)
        else:
            with _opened(root, "/") as whole:
                # What the container changed in its root: an overlay writes no other's files.
                filecaches.sync_file_system(whole)
            for volume in container.volumes:
                filecaches.sync(root, container.pid, volume, deadline)


@contextlib.contextmanager
def _opened(root: int, path: str) -> Iterator[int]:
    fd = confine.open_inside(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _said(output: bytes) -> str:
    """The last lines of what a hook said, without what a terminal would obey."""
    text = output.decode(errors="replace")
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return "\n".join(clean.strip().splitlines()[-_SAID_LINES:])[-_SAID_CHARACTERS:]


def _failed(hook: Hook, what: str, hint: str, cause: errors.CkptError) -> errors.HookFailed:
    facts = {"hook": hook.name, "output": cause.facts.get("output", "")}
    return errors.HookFailed(f"the hook {hook.name!r} {what}", hint=hint, **facts)
