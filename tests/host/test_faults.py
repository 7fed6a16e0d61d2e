"""Whatever dies or fails during a dump: the tree runs on, nothing is left, the next dump works.

Every fault is planned, and each test asserts that it was met.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, Disposition
from agent.engines.criu import probe, rpc
from agent.host import netfilter, proc
from agent.model.streams import AddressSpace, FileEntry, PageRun
from tests.host.conftest import Cut, Host, Target
from tests.host.image import MemoryImage

FEATURES = ("memory", "threads", "children", "tcp", "shared_memory")
STAGES = ("pre-dump", "query-ext-files", "post-dump")


class Spoiled(MemoryImage):
    """A sink that lets something happen at the n-th call of a kind, counted from one."""

    def __init__(self, kind: str, at: int, what: Callable[[], None]) -> None:
        super().__init__()
        self._kind = kind
        self._left = at
        self._what = what
        self.met = 0

    def _call(self, kind: str) -> None:
        if kind == self._kind:
            self._left -= 1
            if self._left == 0:
                self.met += 1
                self._what()

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        self._call("pages")
        super().pages(space, run, data)

    def metadata(self, name: str, content: BinaryIO) -> None:
        self._call("metadata")
        super().metadata(name, content)

    def file(self, entry: FileEntry, content: BinaryIO | None) -> None:
        self._call("file")
        super().file(entry, content)

    def facts(self, facts: dict[str, Any] | None = None) -> Any:
        if facts is not None:
            self._call("facts")
        return super().facts(facts)


def criu_pid(host: Host) -> int:
    (entry,) = (json.loads(path.read_text()) for path in (host.runtime / "ops").glob("*.json"))
    return int(entry["criu"]["pid"])


def kill_criu(host: Host) -> None:
    """Kill it and wait until it is dead: what it held is let go by then."""
    pid = criu_pid(host)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while proc.stat(pid).state != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.001)


def assert_unharmed(host: Host, target: Target) -> None:
    """The tree runs, nothing is left, and the next dump works."""
    host.assert_running(target)
    image = host.dump(target)
    assert image.memory_bytes > 0
    host.assert_running(target)
    host.assert_clean()


def at_stage(monkeypatch: pytest.MonkeyPatch, stage: str, what: Callable[[], None]) -> list[str]:
    """Let ``what`` happen when CRIU announces ``stage``; returns the list of stages met."""
    met: list[str] = []
    request = rpc.Connection.request

    def spoiled(self: Any, message: Any, handler: Any, deadline: Any) -> Any:
        def on(name: str, pid: int, descriptor: int | None) -> None:
            if name == stage and not met:
                met.append(name)
                what()
            handler(name, pid, descriptor)

        return request(self, message, on if handler else None, deadline)

    monkeypatch.setattr(rpc.Connection, "request", spoiled)
    return met


@pytest.mark.parametrize("stage", STAGES)
def test_criu_killed_at_each_stage(host: Host, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    target = host.start(*FEATURES)
    met = at_stage(monkeypatch, stage, lambda: kill_criu(host))
    with pytest.raises(errors.CriuFailed, match="signal 9") as failure:
        host.dump(target)
    assert met == [stage]
    assert failure.value.hint
    assert_unharmed(host, target)


# CRIU sends large mappings in runs of what one of its pipes holds.
_CRIU_RUN_BYTES = 1 << 20


class Streaming(MemoryImage):
    """A sink that kills CRIU at the n-th full run of memory, when CRIU waits for the reader.

    While this takes nothing the buffers before it fill up, and then CRIU can be nowhere but in a
    call on the stream: writing more, or waiting for the answer to the next address space.
    """

    def __init__(self, host: Host, at: int) -> None:
        super().__init__()
        self._host = host
        self._left = at
        self.met = 0

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        if len(data) == _CRIU_RUN_BYTES:
            self._left -= 1
            if self._left == 0:
                self.met += 1
                wait_until_blocked(criu_pid(self._host))
                kill_criu(self._host)
        super().pages(space, run, data)


def wait_until_blocked(pid: int) -> None:
    """Wait until the process has slept in one and the same system call for 100 ms."""
    deadline = time.monotonic() + 10
    call, since = "", time.monotonic()
    while time.monotonic() - since < 0.1:
        assert time.monotonic() < deadline, f"process {pid} was never blocked"
        seen = Path(f"/proc/{pid}/syscall").read_text()
        if seen != call or proc.stat(pid).state != "S":
            call, since = seen, time.monotonic()
        time.sleep(0.005)


def test_criu_killed_again_and_again_while_memory_flows(host: Host) -> None:
    """Not at any moment at all: where CRIU makes a process run its code by ptrace, before and
    after that process's memory, its death can end the process, and nobody else could prevent it.
    """
    target = host.start(*FEATURES, MEMORY_MIB="192")
    for at in (1, 2, 3, 5, 8, 13, 34, 70):
        image = Streaming(host, at)
        with pytest.raises(errors.CriuFailed):
            host.capture(target.pid, image, options=CaptureOptions(held_bytes=0, precopy=False))
        assert image.met == 1
        host.assert_running(target)
    assert_unharmed(host, target)


AGENT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from agent.host import proc
from tests.host.conftest import Cut
from tests.host.image import MemoryImage
from {module} import {sink} as Sink
from agent.engines.base import CaptureOptions
from agent.engines.criu.engine import CriuEngine
from agent.engines.criu import rpc

def die():
    if {with_criu}:
        os.kill(proc.children(os.getpid())[0], signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

if {group!r}:
    with open({group!r} + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
stage = {stage!r}
kind, _, at = stage.partition(":")
sink = Sink(kind, int(at), die) if at else MemoryImage()
request = rpc.Connection.request
def spoiled(self, message, handler, deadline):
    def on(name, pid, descriptor):
        if name == stage:
            die()
        handler(name, pid, descriptor)
    return request(self, message, on if handler else None, deadline)
rpc.Connection.request = spoiled
engine = CriuEngine(work_dir={work!r}, runtime_dir={runtime!r})
cut = Cut(captured=die if stage == "captured" else lambda: None)
engine.capture({pid}, sink, cut, {options!r})
"""


def run_dying_agent(
    host: Host,
    target: Target,
    options: CaptureOptions,
    stage: str = "",
    *,
    sink: type[Spoiled] = Spoiled,
    group: str = "",
    with_criu: bool = False,
) -> None:
    """Have an agent dump that dies at ``stage``, with CRIU maybe, or of the control group that it
    is in.
    """
    script = AGENT.format(
        root=str(Path(__file__).parents[2]),
        module=sink.__module__,
        sink=sink.__name__,
        group=group,
        stage=stage,
        work=str(host.work),
        runtime=str(host.runtime),
        pid=target.pid,
        options=options,
        with_criu=with_criu,
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize(
    "stage", [*STAGES, "pages:1", "pages:6", "metadata:1", "facts:1", "captured"]
)
def test_agent_killed_at_each_stage(host: Host, stage: str, kill: bool) -> None:
    target = host.start(*FEATURES)
    run_dying_agent(host, target, CaptureOptions(kill=kill, held_bytes=0), stage)
    # CRIU notices by itself that its agent is gone: nobody helps it.
    deadline = time.monotonic() + 10
    while any(proc.status(pid).tracer_pid for pid in proc.tree(target.pid)):
        assert time.monotonic() < deadline, "the tree stays frozen"
        time.sleep(0.01)
    assert_unharmed(host, target)


@pytest.mark.parametrize(
    ("kind", "at"),
    [("pages", 1), ("pages", 8), ("pages", -1), ("metadata", 1), ("metadata", 5), ("facts", 1)],
)
def test_a_full_volume_gives_the_dump_up_with_its_own_error(host: Host, kind: str, at: int) -> None:
    target = host.start(*FEATURES)
    if at < 0:
        counting = Spoiled("pages", 0, lambda: None)
        host.capture(target.pid, counting)
        at = -counting._left

    def full() -> None:
        raise errors.VolumeFull("the volume is full", hint="prune")

    image = Spoiled(kind, at, full)
    with pytest.raises(errors.VolumeFull, match="the volume is full"):
        host.capture(target.pid, image)
    assert image.met == 1
    assert_unharmed(host, target)


@pytest.mark.parametrize("moment", ["frozen", "captured"])
def test_a_cut_that_raises_gives_the_dump_up(host: Host, moment: str) -> None:
    target = host.start(*FEATURES)

    def refuse() -> None:
        raise errors.Conflict("somebody else committed first")

    with pytest.raises(errors.Conflict):
        host.dump(target, Cut(**{moment: refuse}))  # type: ignore[arg-type]
    assert_unharmed(host, target)


def test_a_commit_that_fails_leaves_a_tree_running_that_was_to_be_killed(host: Host) -> None:
    target = host.start(*FEATURES)

    def fail() -> None:
        raise errors.VolumeFull("no room for the manifest")

    with pytest.raises(errors.VolumeFull):
        host.dump(
            target, Cut(captured=fail, disposition=Disposition.KILL), CaptureOptions(kill=True)
        )
    assert_unharmed(host, target)


def test_a_cut_may_let_a_tree_run_on_that_it_might_have_killed(host: Host) -> None:
    target = host.start(*FEATURES)
    image = host.dump(target, Cut(), CaptureOptions(kill=True))
    assert image.facts()["processes"][0]["pid"] == target.pid
    assert_unharmed(host, target)


def test_a_kill_that_was_not_announced_is_refused(host: Host) -> None:
    target = host.start(*FEATURES)
    with pytest.raises(errors.InvalidInput):
        host.dump(target, Cut(disposition=Disposition.KILL))
    assert_unharmed(host, target)


def test_a_deadline_that_passes_gives_the_dump_up(host: Host) -> None:
    target = host.start(*FEATURES)
    with pytest.raises(errors.DeadlineExceeded):
        host.dump(target, Cut(frozen=lambda: time.sleep(1.5)), CaptureOptions(deadline_s=1.2))
    assert_unharmed(host, target)


def test_an_interrupt_while_memory_flows_leaves_the_tree_running(host: Host) -> None:
    target = host.start(*FEATURES)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

    image = Spoiled("pages", 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        host.capture(target.pid, image)
    assert image.met == 1
    assert_unharmed(host, target)


@pytest.mark.parametrize("moment", ["pre-dump", "query-ext-files"])
def test_a_target_that_exits_during_the_dump_is_named(
    host: Host, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = host.start(*FEATURES)
    other = host.start("memory")

    def end() -> None:
        os.kill(target.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while proc.stat(target.pid).state != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.001)

    met = at_stage(monkeypatch, moment, end)
    with pytest.raises(errors.TargetExited, match=str(target.pid)):
        host.dump(target)
    assert met == [moment]
    monkeypatch.undo()
    assert_unharmed(host, other)


def test_a_target_that_exits_when_its_memory_has_been_read_leaves_a_good_image(host: Host) -> None:
    target = host.start(*FEATURES)
    pids = proc.tree(target.pid)

    def end() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    image = host.dump(target, Cut(captured=end))
    host.kill(target)
    tree = host.restore(image)
    target.check(tree.pid)
    host.assert_clean()


def test_two_dumps_of_one_tree_at_once(host: Host) -> None:
    target = host.start(*FEATURES)
    refusals: list[errors.CkptError] = []

    def second() -> None:
        with pytest.raises(errors.TargetBusy) as refusal:
            host.engine.capture(target.pid, MemoryImage(), Cut(), CaptureOptions())
        refusals.append(refusal.value)

    image = host.dump(target, Cut(frozen=second))
    assert image.memory_bytes > 0
    assert len(refusals) == 1
    assert str(target.pid) in refusals[0].message
    assert refusals[0].retryable
    assert_unharmed(host, target)


def test_two_dumps_of_different_trees_at_once(host: Host) -> None:
    targets = [host.start(*FEATURES), host.start(*FEATURES)]
    barrier = threading.Barrier(2)
    images = [MemoryImage(), MemoryImage()]
    failures: list[BaseException] = []

    def meet() -> None:
        barrier.wait(20)

    def one(at: int) -> None:
        try:
            host.capture(targets[at].pid, images[at], Cut(frozen=meet))
        except errors.CkptError as exc:
            failures.append(exc)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(image.memory_bytes for image in images)
    for target in targets:
        assert_unharmed(host, target)


def wait_until_stopped(pid: int) -> None:
    """A process that was let go of stops again by itself, as soon as it has a processor."""
    deadline = time.monotonic() + 20
    while proc.stat(pid).state != "T":
        assert time.monotonic() < deadline, "it is not stopped"
        time.sleep(0.001)


def test_a_stopped_tree_stays_stopped_and_comes_back_stopped(host: Host) -> None:
    target = host.start("memory")
    os.kill(target.pid, signal.SIGSTOP)
    wait_until_stopped(target.pid)
    image = host.dump(target)
    wait_until_stopped(target.pid)
    assert image.facts()["processes"][0]["state"] == "T"
    host.kill(target)
    tree = host.restore(image)
    wait_until_stopped(tree.pid)
    tree.signal(signal.SIGCONT)
    target.check()
    host.assert_clean()


def test_a_failed_dump_of_a_stopped_tree_leaves_it_stopped(host: Host) -> None:
    target = host.start("memory")
    os.kill(target.pid, signal.SIGSTOP)
    wait_until_stopped(target.pid)

    def refuse() -> None:
        raise errors.Conflict("no")

    with pytest.raises(errors.Conflict):
        host.dump(target, Cut(captured=refuse))
    wait_until_stopped(target.pid)
    os.kill(target.pid, signal.SIGCONT)
    assert_unharmed(host, target)


@pytest.mark.parametrize("kill", [False, True])
def test_leftover_tables_and_scratch_of_a_dead_agent_are_removed(host: Host, kill: bool) -> None:
    """Connections of a tree that runs on are held by a table of ours, else by CRIU's."""
    target = host.start("tcp")
    # CRIU dies with its agent: nobody is left to undo what it did.
    options = CaptureOptions(kill=kill, held_bytes=0)
    run_dying_agent(host, target, options, "captured", with_criu=True)
    (entry,) = (json.loads(path.read_text()) for path in (host.runtime / "ops").glob("*.json"))
    table = entry["table"] if kill else f"ckpt-agent-{entry['name']}"
    assert table in netfilter.tables("")
    assert len(list(host.work.iterdir())) == 1
    # The next operation begins by undoing it, the connection's repair mode included.
    findings = host.engine.recover()
    assert findings.tables == [table]
    assert findings.sockets == 2
    assert findings.operations == [entry["name"]]
    assert host.engine.recover().clean
    assert_unharmed(host, target)
    assert table not in netfilter.tables("")


def test_empty_tables_that_any_criu_left_are_removed(host: Host) -> None:
    """Each makes every later freeze longer."""
    target = host.start("memory")
    criu = probe.probe().path
    images = host.folder / "images"
    images.mkdir()
    subprocess.run(
        [criu, "dump", "-t", str(target.pid), "-D", str(images), "--network-lock", "nftables"],
        check=True,
        timeout=60,
        capture_output=True,
    )
    assert len(netfilter.tables("CRIU-")) == 1
    other = host.start("memory")
    assert_unharmed(host, other)
