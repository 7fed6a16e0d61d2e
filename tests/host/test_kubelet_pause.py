"""How long a container stood still, as its control group's freezer shows it."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.engines.kubelet import pause
from agent.host import cgroups
from tests.conftest import NOT_TO_BE_HAD


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
        deadline = time.monotonic() + 5
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


def test_the_stop_is_from_the_first_to_the_last_sight_of_it_frozen(group: Group) -> None:
    with pause.watched(group.process.pid) as watch:
        time.sleep(0.1)
        began = time.monotonic()
        group.freeze(True)
        time.sleep(0.2)
        group.freeze(False)  # CRIU thaws the group for a while and holds the processes itself
        time.sleep(0.1)
        group.freeze(True)
        time.sleep(0.2)
        group.freeze(False)
        ended = time.monotonic()
        time.sleep(0.1)
    assert watch.stop_s is not None
    assert 0.4 < watch.stop_s <= ended - began


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
