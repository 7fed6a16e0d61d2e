"""How long a container stood still, as its control group's freezer shows it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.engines.kubelet import pause, resume
from agent.host import cgroups
from agent.model.container import Container
from tests.conftest import NOT_TO_BE_HAD
from tests.host.nodes import wait_for


class Group:
    """A control group with a freezer, and a process in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.process = subprocess.Popen(["sleep", "60"])
        (path / "cgroup.procs").write_text(str(self.process.pid))

    def freeze(self, yes: bool) -> None:
        if (self.path / "freezer.state").exists():
            (self.path / "freezer.state").write_text("FROZEN" if yes else "THAWED")
        else:
            (self.path / "cgroup.freeze").write_text("1" if yes else "0")

    def end(self) -> None:
        self.freeze(False)
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + 20
        while True:
            try:
                self.path.rmdir()
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            else:
                return


@pytest.fixture
def group() -> Iterator[Group]:
    for directory in cgroups.directories(os.getpid()):
        candidate = Path(directory)
        if (candidate / "freezer.state").exists() or "freezer" in candidate.parts:
            break
        if (candidate / "cgroup.events").exists():
            break
    else:
        pytest.skip(f"{NOT_TO_BE_HAD}a freezer of this kernel")
    made = Group(candidate / f"ckpt-test-{secrets.token_hex(4)}")
    try:
        yield made
    finally:
        made.end()


def test_the_stop_is_from_the_first_to_the_last_sight_of_it_frozen(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    look = pause.Freezer.frozen

    def noted(self: pause.Freezer) -> bool:
        looks.append(look(self))
        return looks[-1]

    def looked(frozen: bool) -> None:
        """Wait for a look that begins from now on and finds that."""
        before = len(looks) + 1
        wait_for(lambda: frozen in looks[before:])

    monkeypatch.setattr(pause.Freezer, "frozen", noted)
    began = time.monotonic()
    with pause.watched(group.process.pid) as watch:
        looked(False)
        group.freeze(True)
        looked(True)
        first = time.monotonic()
        group.freeze(False)  # CRIU thaws the group for a while and holds the processes itself
        looked(False)
        group.freeze(True)
        time.sleep(0.2)
        last = time.monotonic()
        looked(True)
        group.freeze(False)
        ended = time.monotonic()
        looked(False)
    assert watch.stop_s is not None
    assert last - first <= watch.stop_s <= ended - began


def test_what_never_stood_still_has_no_figure(group: Group) -> None:
    with pause.watched(group.process.pid) as watch:
        time.sleep(0.1)
    assert watch.stop_s is None


def test_a_container_that_ends_meanwhile_is_no_error(group: Group) -> None:
    with pause.watched(group.process.pid) as watch:
        group.process.kill()
        group.process.wait()
        time.sleep(0.1)
    assert watch.stop_s is None
    with pause.watched(group.process.pid) as gone:
        pass
    assert gone.stop_s is None


# With one child it is a container's parent. With a second one, called "criu", it has just lost its
# containerd in the middle of a checkpoint: the runc that it asked is gone, and what that left holds
# the container by other means than the freezer, which it closes at its end as it had found it. Like
# runc, it lets nothing go on whose freezer is open.
SHIM = """
import os, signal, socket, struct, sys, time
path, group, api, criu = sys.argv[1:]
v1 = os.path.exists(group + "/freezer.state")
def frozen():
    file, sign = ("freezer.state", "FROZEN") if v1 else ("cgroup.events", "frozen 1")
    return sign in open(f"{group}/{file}").read()
def freeze(yes):
    file, texts = ("freezer.state", ("THAWED", "FROZEN")) if v1 else ("cgroup.freeze", "01")
    open(f"{group}/{file}", "w").write(texts[yes])
child = os.fork()
if child == 0:
    os.execvp("sleep", ["sleep", "60"])
open(group + "/cgroup.procs", "w").write(str(child))
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
signal.signal(signal.SIGCHLD, lambda *_: (os.wait(), freeze(True), print("ended", flush=True)))
if criu and not (left := os.fork()):
    os.execv(criu, ["criu", "30"])
while criu and open(f"/proc/{left}/comm").read() != "criu\\n":
    time.sleep(0.01)
print(child, flush=True)
while True:
    client, _ = server.accept()
    with client:
        size, stream, kind, flags = struct.unpack(">IIBB", client.recv(10))
        message = client.recv(size)
        if api.encode() not in message:
            said, status = "unknown", b"\\x0a\\x02\\x08\\x0c"
        elif not frozen():
            said, status = "not paused", b"\\x0a\\x02\\x08\\x02"
        else:
            freeze(False)
            said, status = "resumed", b""
        print(stream, kind, message, said, flush=True)
        client.sendall(struct.pack(">IIBB", len(status), stream, 2, 0) + status)
    if criu and said == "resumed":
        os.kill(left, signal.SIGTERM)
"""


class Paused:
    """A shim with one container of this id, whose group can be frozen."""

    id = "c" * 64

    def __init__(self, group: Group, folder: Path, api: str = "v3", criu: str = "") -> None:
        self.folder = folder / "containerd/s"
        self.folder.mkdir(parents=True)
        path = str(self.folder / ("a" * 64))
        assert len(path) < 108
        argv = [sys.executable, "-c", SHIM, path, str(group.path), api, criu]
        self.popen = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.popen.stdout
        self.out = self.popen.stdout
        pid = int(self.out.readline())
        self.container = Container(id=self.id, name="c", pid=pid, rootfs="")

    def end(self) -> list[str]:
        """What it was asked and said."""
        if self.popen.poll() is None:  # the container is nobody's to wait for, and may be gone then
            self.popen.kill()
            self.popen.wait()
            os.kill(self.container.pid, signal.SIGKILL)
        return [] if self.out.closed else self.popen.communicate()[0].splitlines()

    def said(self, version: int, answer: str) -> str:
        """Asked as containerd asks: task API, method, the container's id."""
        task = b"\x0a\x17containerd.task.v%d.Task\x12\x06Resume\x1aB\x0a@%s"
        return f"1 1 {task % (version, self.id.encode())!r} {answer}"


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own folders have names that are too long for a socket's.
    with tempfile.TemporaryDirectory(prefix="shim-") as made:
        yield Path(made)


def fail(group: Group) -> None:
    """A runtime that ends in the middle of a checkpoint."""
    group.freeze(True)
    assert pause.Freezer(group.process.pid).frozen()
    raise errors.DumpFailed("the runtime has gone")


@pytest.mark.parametrize("api", ["v3", "v2"])
def test_a_container_that_a_failed_checkpoint_left_paused_goes_on(
    group: Group, folder: Path, api: str
) -> None:
    paused = Paused(group, folder, api)
    try:
        with pytest.raises(errors.DumpFailed), resume.guarded(paused.container):
            fail(group)
        assert not pause.Freezer(paused.container.pid).frozen()
    finally:
        said = paused.end()
    unknown = [] if api == "v3" else [paused.said(3, "unknown")]
    assert said == [*unknown, paused.said(int(api[1]), "resumed")]


def test_a_container_that_an_abandoned_criu_holds_is_paused_to_nobody_and_goes_on_after_it(
    group: Group, folder: Path
) -> None:
    criu = folder / "criu"
    criu.symlink_to("/bin/sleep")
    paused = Paused(group, folder, criu=str(criu))
    try:
        with pytest.raises(errors.DumpFailed), resume.guarded(paused.container):
            raise errors.DumpFailed("the runtime has gone")
        assert not pause.Freezer(paused.container.pid).frozen()
    finally:
        said = paused.end()
    # Containerd's successor asks long before such a CRIU ends.
    assert said == [paused.said(3, "resumed"), "ended"]


def test_without_a_shim_the_freezer_itself_is_opened(group: Group) -> None:
    container = Container(id="c", name="c", pid=group.process.pid, rootfs="")
    with pytest.raises(errors.DumpFailed), resume.guarded(container):
        fail(group)
    assert not pause.Freezer(container.pid).frozen()


def test_what_stood_still_before_stays_so_and_a_success_changes_nothing(group: Group) -> None:
    container = Container(id="c", name="c", pid=group.process.pid, rootfs="")
    with resume.guarded(container):
        group.freeze(True)
    assert pause.Freezer(container.pid).frozen()
    with pytest.raises(errors.DumpFailed), resume.guarded(container):
        fail(group)
    assert pause.Freezer(container.pid).frozen()
