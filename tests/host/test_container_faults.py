"""Whatever dies or fails: a dumped container runs on, a placeholder waits, the next try works.

Every fault is planned, and each test asserts that it was met.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent import errors
from agent.engines.base import CaptureOptions
from agent.engines.container import holding
from agent.engines.criu import pour
from agent.host import proc
from tests.host.boxes import Box, Boxes
from tests.host.conftest import Cut, Gate
from tests.host.image import MemoryImage
from tests.host.test_container_engine import wait_for
from tests.host.test_faults import Spoiled, at_stage

FEATURES = ("memory", "threads", "children", "tcp", "shared_memory")


def criu_pid(boxes: Boxes) -> int:
    (entry,) = (json.loads(path.read_text()) for path in (boxes.runtime / "ops").glob("*.json"))
    return int(entry["criu"]["pid"])


def kill_criu(boxes: Boxes) -> None:
    pid = criu_pid(boxes)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: proc.stat(pid).state == "Z", "CRIU does not die")


def assert_unharmed(boxes: Boxes, box: Box) -> None:
    """The container runs, nothing is left, and the next dump works."""
    for pid in proc.tree(box.pid):
        assert proc.status(pid).tracer_pid == 0
    boxes.check(box)
    boxes.assert_clean()
    assert boxes.dump(box).memory_bytes > 0
    boxes.check(box)
    boxes.assert_clean()


def assert_waits(boxes: Boxes, image: MemoryImage, placeholder: Box) -> None:
    """Nothing of the image is in the container, nothing is left, and a second try works."""
    assert placeholder.pids() == [placeholder.pid]
    assert holding.waits(placeholder.pid)
    boxes.assert_clean()
    boxes.restore(image, placeholder)
    boxes.check(placeholder)


@pytest.mark.parametrize("stage", ["pre-dump", "query-ext-files", "post-dump"])
def test_criu_killed_during_a_dump(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    box = boxes.tree("source", *FEATURES)
    met = at_stage(monkeypatch, stage, lambda: kill_criu(boxes))
    with pytest.raises(errors.CriuFailed, match="signal 9"):
        boxes.dump(box)
    assert met == [stage]
    assert_unharmed(boxes, box)


@pytest.mark.parametrize("kind", ["pages", "metadata", "file", "facts"])
def test_a_volume_that_fails_during_a_dump(boxes: Boxes, kind: str) -> None:
    def full() -> None:
        raise errors.VolumeFull("no room")

    box = boxes.tree("source", *FEATURES)
    image = Spoiled(kind, 2 if kind != "facts" else 1, full)
    with pytest.raises(errors.VolumeFull):
        boxes.capture(box, image)
    assert image.met == 1
    assert_unharmed(boxes, box)


def test_a_dump_that_takes_too_long(boxes: Boxes) -> None:
    box = boxes.tree("source", *FEATURES)
    slept = []

    def sleep() -> None:
        slept.append(1)
        time.sleep(9)

    # Long enough to come so far.
    with pytest.raises(errors.DeadlineExceeded):
        boxes.capture(box, Spoiled("pages", 2, sleep), options=CaptureOptions(deadline_s=8))
    assert slept
    assert_unharmed(boxes, box)


@pytest.mark.parametrize("stage", ["frozen", "captured"])
def test_another_member_that_fails(boxes: Boxes, stage: str) -> None:
    def fail() -> None:
        raise errors.DumpFailed("another member failed")

    box = boxes.tree("source", *FEATURES)
    cut = Cut(frozen=fail) if stage == "frozen" else Cut(captured=fail)
    with pytest.raises(errors.DumpFailed, match="another member"):
        boxes.dump(box, cut=cut)
    assert_unharmed(boxes, box)


def test_a_container_that_is_killed_during_its_dump(boxes: Boxes) -> None:
    box = boxes.tree("source", *FEATURES)
    with pytest.raises(errors.CkptError):
        boxes.dump(box, cut=Cut(frozen=lambda: os.kill(box.pid, signal.SIGKILL)))
    assert box.wait() == 128 + signal.SIGKILL
    boxes.assert_clean()


def test_a_container_that_is_killed_when_all_of_it_was_read_is_refused_or_whole(
    boxes: Boxes,
) -> None:
    """Whether CRIU lets go of it before it has died is a race."""
    box = boxes.tree("source", *FEATURES)
    image = None
    with contextlib.suppress(errors.CkptError):
        image = boxes.dump(box, cut=Cut(captured=lambda: os.kill(box.pid, signal.SIGKILL)))
    assert box.wait() == 128 + signal.SIGKILL
    boxes.assert_clean()
    if image is not None:
        target = boxes.placeholder("target")
        boxes.restore(image, target)
        boxes.check(target)


def leave_orphan(box: Box) -> int:
    """Let an exec leave a process behind, which becomes hold's child; its number here."""
    box.exec("sh", "-c", "setsid sleep 1234 >/dev/null 2>&1 </dev/null &")

    def found() -> list[int]:
        return [pid for pid in proc.children(box.pid) if proc.stat(pid).comm == "sleep"]

    wait_for(lambda: bool(found()), "no orphan")
    return found()[0]


def test_an_orphan_outside_of_the_tree_is_refused_by_its_number(boxes: Boxes) -> None:
    box = boxes.tree("source", "memory", "children")
    orphan = leave_orphan(box)
    with pytest.raises(errors.TargetUnsuitable, match=rf"{orphan} \(sleep\)") as refusal:
        boxes.dump(box)
    assert refusal.value.facts["pids"] == [orphan]
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: not proc.exists(orphan), "the orphan stays")
    assert_unharmed(boxes, box)


def test_an_orphan_that_comes_at_the_last_moment_fails_the_dump(boxes: Boxes) -> None:
    box = boxes.tree("source", "memory", "children")

    orphans: list[int] = []
    with pytest.raises(errors.DumpFailed, match="sleep"):
        boxes.dump(box, cut=Cut(frozen=lambda: orphans.append(leave_orphan(box))))
    os.kill(orphans[0], signal.SIGKILL)
    wait_for(lambda: not proc.exists(orphans[0]), "the orphan stays")
    assert_unharmed(boxes, box)


def test_a_gate_that_raises_leaves_the_placeholder_waiting(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", *FEATURES))
    target = boxes.placeholder("target")

    def refuse() -> None:
        raise errors.RestoreFailed("another member failed")

    with pytest.raises(errors.RestoreFailed, match="another member"):
        boxes.restore(image, target, Gate(refuse))
    assert_waits(boxes, image, target)


@pytest.mark.parametrize("stage", ["pre-restore", "post-restore"])
def test_criu_killed_during_a_restore(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    image = boxes.dump(boxes.tree("source", *FEATURES))
    target = boxes.placeholder("target")
    met = at_stage(monkeypatch, stage, lambda: kill_criu(boxes))
    with pytest.raises(errors.Failed):
        boxes.restore(image, target)
    assert met == [stage]
    monkeypatch.undo()
    assert_waits(boxes, image, target)


def test_a_tree_that_vanishes_while_it_is_restored(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = boxes.dump(boxes.tree("source", *FEATURES))
    target = boxes.placeholder("target")

    def vanish() -> None:
        made = [pid for pid in target.pids() if pid not in (target.pid, criu_pid(boxes))]
        assert len(made) > 2
        for pid in made:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: all(dead(pid) for pid in made), "they do not die")

    met = at_stage(monkeypatch, "post-restore", vanish)
    with pytest.raises(errors.Failed):
        boxes.restore(image, target)
    assert met == ["post-restore"]
    monkeypatch.undo()
    assert_waits(boxes, image, target)


def dead(pid: int) -> bool:
    try:
        return proc.stat(pid).state in "ZX"
    except errors.NotFound:
        return True


def test_a_kernel_that_refuses_to_be_poured_into(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = boxes.dump(boxes.tree("source", *FEATURES))
    target = boxes.placeholder("target")
    refused = []

    def refuse(*_: object) -> int:
        refused.append(1)
        raise pour.PourRefused("not allowed")

    with monkeypatch.context() as patch:
        patch.setattr(pour, "pour", refuse)
        boxes.restore(image, target)
    assert refused == [1]
    boxes.check(target)
    boxes.assert_clean()


def test_a_placeholder_that_is_killed_during_a_restore(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", *FEATURES))
    target = boxes.placeholder("target")

    def kill() -> None:
        os.kill(target.pid, signal.SIGKILL)

    with pytest.raises(errors.Failed):
        boxes.restore(image, target, Gate(kill))
    assert target.wait() == 128 + signal.SIGKILL
    boxes.assert_clean()


AGENT = """
import os, pickle, signal, sys
sys.path.insert(0, {root!r})
from tests.host.conftest import Cut, Gate
from tests.host.image import MemoryImage, MemorySource
from agent.engines.base import CaptureOptions, RestoreOptions
from agent.engines.container import holding
from agent.engines.container.engine import ContainerEngine
from agent.host import proc
with open({path!r}, "rb") as file:
    container, image = pickle.load(file)
engine = ContainerEngine(
    [container], bundle={bundle!r}, work_dir={work!r}, runtime_dir={runtime!r}
)
def die():
    if {with_criu}:
        os.kill(proc.children(os.getpid())[0], signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
if {stage!r} == "adopted":
    adopt = holding.adopt
    holding.adopt = lambda *about: (adopt(*about), die())
if image is None:
    cut = Cut(**{{ {stage!r}: die }})
    engine.capture(container.pid, MemoryImage(), cut, CaptureOptions())
else:
    gate = Gate(die) if {stage!r} == "gate" else Gate()
    engine.restore(MemorySource(image), RestoreOptions(), gate)
"""


def run_agent(
    boxes: Boxes, box: Box, image: MemoryImage | None, stage: str, *, with_criu: bool = False
) -> int:
    if image is not None:
        del image._lock
    path = boxes.folder / "handed"
    path.write_bytes(pickle.dumps((box.container, image)))
    script = AGENT.format(
        root=str(Path(__file__).parents[2]),
        path=str(path),
        bundle=str(boxes.bundle),
        work=str(boxes.work),
        runtime=str(boxes.runtime),
        stage=stage,
        with_criu=with_criu,
    )
    return subprocess.run([sys.executable, "-c", script], timeout=60).returncode


@pytest.mark.parametrize("with_criu", [False, True])
@pytest.mark.parametrize("stage", ["frozen", "captured"])
def test_the_agent_killed_during_a_dump(boxes: Boxes, stage: str, with_criu: bool) -> None:
    box = boxes.tree("source", *FEATURES)
    status = run_agent(boxes, box, None, stage, with_criu=with_criu)
    assert status == -signal.SIGKILL
    boxes.engine().recover()
    assert_unharmed(boxes, box)


@pytest.mark.parametrize("with_criu", [False, True])
def test_the_agent_killed_during_a_restore(boxes: Boxes, with_criu: bool) -> None:
    image = boxes.dump(boxes.tree("source", *FEATURES))
    target = boxes.placeholder("target")
    status = run_agent(boxes, target, image, "gate", with_criu=with_criu)
    assert status == -signal.SIGKILL
    boxes.engine().recover()
    wait_for(lambda: target.pids() == [target.pid], "a half-restored process stays")
    assert_waits(boxes, image, target)


def test_the_agent_killed_when_all_was_done(boxes: Boxes) -> None:
    """Nobody takes back what hold follows already."""
    image = boxes.dump(boxes.tree("source", *FEATURES))
    target = boxes.placeholder("target")
    assert run_agent(boxes, target, image, "adopted") == -signal.SIGKILL
    assert boxes.engine().recover().operations
    boxes.check(target)
    boxes.assert_clean()


def test_a_restored_tree_outlives_the_agent_that_restored_it(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", *FEATURES))
    target = boxes.placeholder("target")
    assert run_agent(boxes, target, image, "") == 0
    boxes.check(target)
    boxes.assert_clean()


def test_one_operation_a_container_at_a_time(boxes: Boxes) -> None:
    box = boxes.tree("source", "memory")
    busy: list[type[BaseException]] = []

    def again() -> None:
        with pytest.raises(errors.TargetBusy) as refusal:
            boxes.dump(box)
        busy.append(refusal.type)

    boxes.dump(box, cut=Cut(frozen=again))
    assert busy == [errors.TargetBusy]
    assert_unharmed(boxes, box)
