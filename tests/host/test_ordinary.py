"""Containers that were never opted in: their first process is the job's own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, Disposition
from agent.engines.container import newproc
from agent.engines.container.tree import ContainerTree
from agent.engines.criu import rpc
from agent.host import mounts, proc
from tests.host.boxes import Box, Boxes, stem
from tests.host.conftest import Cut
from tests.host.test_container_engine import wait_for
from tests.host.test_container_faults import (
    assert_unharmed,
    assert_waits,
    criu_pid,
    kill_criu,
    run_agent,
)
from tests.host.test_faults import at_stage
from tests.host.test_kubelet_restore import FEATURES, checkpoint, restore

# Says how it sees itself when it is asked to, and ends with 7 when it is told to.
JOB = """
import json, os, signal, sys
def say(*_):
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status"))
    seen = {"pid": os.getpid(), "proc": int(status["Pid"]), "first": open("/proc/1/comm").read()}
    seen["numbers"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    seen["host"] = os.uname().nodename
    print(json.dumps(seen), flush=True)
signal.signal(signal.SIGUSR1, say)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
while True:
    signal.pause()
"""


def started(boxes: Boxes) -> Box:
    box = Box(boxes, "source", ["python3", "-c", JOB])
    said(box, 1)
    return box


def said(box: Box, lines: int) -> list[str]:
    """The first ``lines`` lines of the box's log."""
    deadline = time.monotonic() + 20
    while len(found := box.log.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline, found
        assert box.popen.poll() is None, found
        time.sleep(0.02)
    return found


def test_its_first_process_is_number_one_again_with_a_proc_that_says_so(boxes: Boxes) -> None:
    image = checkpoint(started(boxes))
    target = boxes.placeholder("target")
    before = proc_mounts(target.pid)
    restore(boxes, image, target)
    os.kill(stem(target), signal.SIGUSR1)
    seen = json.loads(said(target, 1)[0])
    assert seen == {
        "pid": 1,
        "proc": 1,
        "first": "python3\n",
        "numbers": [1],
        "host": "target",
    }
    # What the runtime hid is hidden, what was read-only is; the placeholder's own is as it was.
    restored = proc_mounts(stem(target))
    assert proc_mounts(target.pid) == before
    assert sorted(restored) == sorted(before)
    assert {path for path, (_, read_only) in restored.items() if read_only} == {
        path for path, (_, read_only) in before.items() if read_only
    }
    for path, (kind, _) in before.items():
        assert restored[path][0] == kind
    with pytest.raises(OSError, match="Read-only"):
        Path(f"/proc/{stem(target)}/root/proc/sys/kernel/domainname").write_text("x")


def proc_mounts(pid: int) -> dict[str, tuple[str, bool]]:
    """What is mounted at and below /proc."""
    found = {m.point: (m.kind, m.read_only) for m in mounts.of(pid)}
    return {point: what for point, what in found.items() if point.startswith("/proc")}


def test_the_container_ends_with_its_status_after_its_own_sigterm(boxes: Boxes) -> None:
    image = checkpoint(started(boxes))
    target = boxes.placeholder("target")
    restore(boxes, image, target)
    assert "python3" in target.exec("sh", "-c", "cat /proc/[0-9]*/comm")
    boxes.runc("kill", target.id, "TERM")
    assert target.wait() == 7


def test_a_deleted_container_takes_the_tree_along(boxes: Boxes) -> None:
    image = checkpoint(boxes.ordinary("source", "children"))
    target = boxes.placeholder("target")
    restore(boxes, image, target)
    everyone = [proc.identity(pid) for pid in target.pids()]
    assert len(everyone) > 2
    boxes.runc("kill", target.id, "KILL")
    target.wait()
    deadline = time.monotonic() + 10
    while any(proc.alive(who) for who in everyone):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stage", ["setup-namespaces", "post-restore"])
def test_criu_killed_during_a_restore_leaves_nothing_and_another_follows(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    image = boxes.dump(boxes.ordinary("source", *FEATURES))
    target = boxes.placeholder("target")
    met = at_stage(monkeypatch, stage, lambda: kill_criu(boxes))
    with pytest.raises(errors.Failed):
        boxes.restore(image, target)
    assert met == [stage]
    monkeypatch.undo()
    assert_waits(boxes, image, target)


@pytest.mark.parametrize("with_criu", [False, True])
def test_the_agent_killed_during_a_restore_leaves_nothing(boxes: Boxes, with_criu: bool) -> None:
    image = boxes.dump(boxes.ordinary("source", *FEATURES))
    target = boxes.placeholder("target")
    status = run_agent(boxes, target, image, "gate", with_criu=with_criu)
    assert status == -signal.SIGKILL
    boxes.engine().recover()
    wait_for(lambda: target.pids() == [target.pid], "a half-restored process stays")
    assert_waits(boxes, image, target)


def test_the_agent_killed_when_all_was_done(boxes: Boxes) -> None:
    image = boxes.dump(boxes.ordinary("source", *FEATURES))
    target = boxes.placeholder("target")
    assert run_agent(boxes, target, image, "adopted") == -signal.SIGKILL
    assert boxes.engine().recover().operations
    boxes.check(target)
    boxes.assert_clean()


def test_the_agent_and_criu_killed_during_a_dump(boxes: Boxes) -> None:
    box = boxes.ordinary("source", *FEATURES)
    assert run_agent(boxes, box, None, "captured", with_criu=True) == -signal.SIGKILL
    boxes.engine().recover()
    assert_unharmed(boxes, box)


def test_a_proc_that_cannot_be_made_fails_the_restore(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = checkpoint(started(boxes))
    target = boxes.placeholder("target")
    broken = tmp_path / "newproc.py"
    broken.write_text("import sys; sys.exit('no such luck')")
    monkeypatch.setattr(newproc, "__file__", str(broken))
    with pytest.raises(errors.RestoreFailed, match="no such luck"):
        restore(boxes, image, target)
    assert target.pids() == [target.pid]


def test_three_generations_by_the_agents_own_dumps(boxes: Boxes) -> None:
    first = boxes.ordinary("first", *FEATURES, "unlinked", "stopped", "hard_link", folder="/memory")
    image = boxes.dump(first)
    boxes.check(first, "/memory")
    second = boxes.placeholder("second")
    boxes.restore(image, second)
    boxes.check(second, "/memory")
    image = boxes.dump(second, options=CaptureOptions(precopy=True))
    boxes.check(second, "/memory")
    third = boxes.placeholder("third")
    boxes.restore(image, third)
    boxes.check(third, "/memory")
    boxes.check(first, "/memory")
    boxes.assert_clean()


def test_a_stopped_one_stands_still_until_it_is_killed(boxes: Boxes) -> None:
    source = boxes.ordinary("source", *FEATURES)
    cut = Cut(disposition=Disposition.KILL)
    image = boxes.dump(source, cut=cut, options=CaptureOptions(kill=True))
    source.root("/work/answer").unlink(missing_ok=True)
    os.kill(source.pid, signal.SIGUSR1)
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    boxes.check(target)
    with pytest.raises(errors.TargetUnsuitable, match="is frozen"):
        boxes.dump(source)
    # Long enough for the restored one to answer, and the same question came before.
    assert not source.root("/work/answer").exists()
    boxes.assert_clean()
    boxes.runc("kill", source.id, "KILL")
    assert source.wait() == 128 + signal.SIGKILL


# A process with several threads counts as ended when its first one has.
@pytest.mark.parametrize(("answered", "features"), [(False, FEATURES), (True, ("children",))])
def test_a_restored_one_that_is_stopped_leaves_a_placeholder(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch, answered: bool, features: tuple[str, ...]
) -> None:
    """CRIU is in the namespace whose first process is killed; it may fail before it is killed."""
    first = boxes.placeholder("first")
    boxes.restore(boxes.dump(boxes.ordinary("source", *features)), first)
    about_to_stop, request = ContainerTree.about_to_stop, rpc.Connection.request
    met = []

    def with_criu(self: ContainerTree) -> bool:
        pid = criu_pid(boxes)
        stops = about_to_stop(self)
        wait_for(lambda: proc.stat(pid).state == "Z", "CRIU does not die")
        return stops

    def ask(self: rpc.Connection, *about: Any) -> Any:
        try:
            return request(self, *about)
        except rpc.Gone as exc:
            met.append(exc)
            raise (errors.CriuFailed("a process is gone") if answered else exc) from exc

    monkeypatch.setattr(ContainerTree, "about_to_stop", with_criu)
    monkeypatch.setattr(rpc.Connection, "request", ask)
    image = boxes.stop(first)
    assert len(met) == 1
    monkeypatch.undo()
    boxes.restore(image, first)
    boxes.check(first)
    second = boxes.placeholder("second")
    boxes.restore(image, second)
    boxes.check(second)
    boxes.assert_clean()
