"""The kubelet's directory: our archives go in every case, nobody else's ever does."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import errors
from agent.engines.kubelet import client, leftovers
from agent.engines.kubelet.client import Target
from agent.host import clock, proc

TARGET = Target("team", "pod-1", "c")


def archive(folder: Path, offset_s: float = 0.0, of: Target = TARGET) -> str:
    """Put an archive there that the kubelet began ``offset_s`` from now; return its name."""
    at = datetime.datetime.fromtimestamp(int(clock.wall_s() + offset_s), datetime.UTC)
    stamp = at.isoformat().replace("+00:00", "Z")
    name = f"checkpoint-{of.pod}_{of.namespace}-{of.container}-{stamp}.tar"
    (folder / name).write_bytes(b"memory")
    return name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir(mode=0o700)
    return path


def test_an_archive_is_taken_and_its_name_is_gone(folder: Path) -> None:
    others = [archive(folder, -100), archive(folder, of=Target("team", "pod-1", "other"))]
    with leftovers.opened(str(folder)) as checkpoints:
        with checkpoints.call(TARGET, 30) as call:
            assert len(names(folder)) == 3  # the note is there before the call
            name = archive(folder)
            fd = checkpoints.take(call, f"/var/lib/kubelet/checkpoints/{name}")
        assert os.read(fd, 100) == b"memory"
        os.close(fd)
    assert names(folder) == sorted(others)


def fail(
    checkpoints: leftovers.Checkpoints,
    raised: BaseException,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """A call that ends so."""
    with checkpoints.call(TARGET, 30):
        meanwhile()
        raise raised


def test_what_a_failed_call_left_is_removed(folder: Path) -> None:
    old = archive(folder, -100)
    with leftovers.opened(str(folder)) as checkpoints, pytest.raises(errors.CriuFailed):
        fail(checkpoints, errors.CriuFailed("half of it was written"), lambda: archive(folder))
    assert names(folder) == [old]


@pytest.mark.parametrize(
    "refusal", [errors.PrivilegeMissing("403"), errors.Unreachable("down"), errors.NotFound("404")]
)
def test_a_call_that_was_refused_made_nothing(folder: Path, refusal: errors.CkptError) -> None:
    with leftovers.opened(str(folder)) as checkpoints:
        with pytest.raises(type(refusal)):
            fail(checkpoints, refusal, lambda: archive(folder))
        assert checkpoints.clean() == []
    (somebodys,) = names(folder)
    assert somebodys.endswith(".tar")


@pytest.mark.parametrize(
    "left", [errors.DeadlineExceeded("late"), client.Lost("broken"), KeyboardInterrupt()]
)
def test_an_archive_that_comes_later_is_removed_later(folder: Path, left: BaseException) -> None:
    with leftovers.opened(str(folder)) as checkpoints:
        with pytest.raises(type(left)):
            fail(checkpoints, left)
        assert checkpoints.clean() == []
        assert len(names(folder)) == 1  # the note waits
        late = archive(folder, 2)
        assert checkpoints.clean() == [late]
    assert names(folder) == []


def note_of_a_dead_agent(folder: Path, **changes: object) -> None:
    """What an agent leaves that is killed while the kubelet works for it."""
    with leftovers.opened(str(folder)) as checkpoints, pytest.raises(KeyboardInterrupt):
        fail(checkpoints, KeyboardInterrupt())
    (note,) = folder.glob(".ckpt-agent-call-*.json")
    raw = json.loads(note.read_text())
    raw |= {"abandoned": False, "agent": {"pid": os.getpid(), "start_ticks": 1}, **changes}
    note.write_text(json.dumps(raw))


def test_the_archive_of_a_killed_agent_is_removed_by_the_next(folder: Path) -> None:
    before = archive(folder, -5)
    note_of_a_dead_agent(folder)
    mine = archive(folder, 1)
    other = archive(folder, 1, Target("team-c", "pod-1", "c"))
    with leftovers.opened(str(folder)) as checkpoints:
        assert checkpoints.clean() == [mine]
    assert names(folder) == sorted([before, other])


def test_the_archive_of_a_living_agent_stays(folder: Path) -> None:
    me = dataclasses.asdict(proc.identity(os.getpid()))
    note_of_a_dead_agent(folder, agent=me)
    mine = archive(folder, 1)
    with leftovers.opened(str(folder)) as checkpoints:
        assert checkpoints.clean() == []
    assert mine in names(folder)


def test_a_note_from_before_a_reboot_is_of_a_dead_agent(folder: Path) -> None:
    me = dataclasses.asdict(proc.identity(os.getpid()))
    note_of_a_dead_agent(folder, agent=me, boot_id="another")
    archive(folder, 1)
    with leftovers.opened(str(folder)) as checkpoints:
        assert len(checkpoints.clean()) == 1
    assert names(folder) == []


def test_of_two_archives_none_is_taken_for_ours(folder: Path) -> None:
    note_of_a_dead_agent(folder)
    both = [archive(folder, 1), archive(folder, 3)]
    with leftovers.opened(str(folder)) as checkpoints:
        assert checkpoints.clean() == []
    assert set(both) <= set(names(folder))


@pytest.mark.parametrize("offset_s", [-60, 100])
def test_an_archive_of_another_time_is_somebody_elses(folder: Path, offset_s: float) -> None:
    note_of_a_dead_agent(folder)
    other = archive(folder, offset_s)
    with leftovers.opened(str(folder)) as checkpoints:
        assert checkpoints.clean() == []
    assert other in names(folder)


def test_a_note_is_forgotten_when_nothing_can_come_any_more(folder: Path) -> None:
    note_of_a_dead_agent(folder, asked_at_s=clock.wall_s() - 7200)
    with leftovers.opened(str(folder)) as checkpoints:
        assert checkpoints.clean() == []
    assert names(folder) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"target": 1}', '{"target": {"pod": "../x"}}'])
def test_a_note_that_is_none_removes_nothing(folder: Path, content: str) -> None:
    somebodys = archive(folder)
    (folder / ".ckpt-agent-call-0123456789abcdef.json").write_text(content)
    with leftovers.opened(str(folder)) as checkpoints:
        assert checkpoints.clean() == []
    assert somebodys in names(folder)


def test_only_the_archive_of_this_call_is_taken(folder: Path) -> None:
    earlier = archive(folder, -1)
    other = archive(folder, of=Target("team", "pod-1", "other"))
    outside = folder.parent / "outside.tar"
    outside.write_bytes(b"")
    link = archive(folder, 1)
    (folder / link).unlink()
    (folder / link).symlink_to(outside)
    with leftovers.opened(str(folder)) as checkpoints, checkpoints.call(TARGET, 30) as call:
        call = dataclasses.replace(call, before=(earlier,))
        for item in (earlier, other, link, "", "/etc/passwd", f"../{outside.name}"):
            with pytest.raises(errors.DumpFailed):
                checkpoints.take(call, item)
    assert outside.exists()
    assert {earlier, other} <= set(names(folder))


def test_a_file_with_two_names_is_not_the_kubelets(folder: Path) -> None:
    with leftovers.opened(str(folder)) as checkpoints, checkpoints.call(TARGET, 30) as call:
        name = archive(folder)
        os.link(folder / name, folder.parent / "second")
        with pytest.raises(errors.DumpFailed, match="not what"):
            checkpoints.take(call, name)


def test_a_note_that_was_never_finished_goes_in_time(folder: Path) -> None:
    unfinished = folder / ".ckpt-agent-call-0123456789abcdef.json.new"
    unfinished.write_text("{")
    with leftovers.opened(str(folder)) as checkpoints:
        checkpoints.clean()
        assert unfinished.exists()
        os.utime(unfinished, (1, 1))
        checkpoints.clean()
    assert not unfinished.exists()


def test_a_directory_that_others_may_write_to_is_refused(folder: Path) -> None:
    folder.chmod(0o777)
    with pytest.raises(errors.EnvironmentUnfit, match="root alone"), leftovers.opened(str(folder)):
        pass
    with (
        pytest.raises(errors.EnvironmentUnfit, match="cannot use"),
        leftovers.opened("/proc/nowhere"),
    ):
        pass
