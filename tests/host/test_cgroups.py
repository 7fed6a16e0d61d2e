"""Control groups as an agent sees them that has a cgroup namespace of its own, which every pod has
on version 2 that is not privileged; systemd makes such namespaces boundaries (nsdelegate).
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.host import cgroups

ROOT = Path(__file__).parents[2]
# The first process of a pid namespace, as a host's, and an agent below it.
FIRST = """
import subprocess, sys
agent, other = sys.argv[2:]
sleeper = subprocess.Popen(["sleep", "1000"])
with open(other + "/cgroup.procs", "w") as file:
    file.write(str(sleeper.pid))
try:
    subprocess.run([sys.executable, "-c", sys.argv[1], agent, other, str(sleeper.pid)], check=True)
finally:
    sleeper.kill()
    sleeper.wait()
"""
AGENT = """
import ctypes, os, subprocess, sys
from agent.host import cgroups
own, other, sleeper = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(own + "/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
assert ctypes.CDLL(None).unshare(0x02000000) == 0  # CLONE_NEWCGROUP
assert other in cgroups.directories(sleeper), cgroups.directories(sleeper)
assert cgroups.members(other) == [sleeper]
moved = subprocess.Popen(["sleep", "1000"])
try:
    cgroups.join(moved.pid, [other])
    assert cgroups.members(other) == sorted([sleeper, moved.pid])
    cgroups.join(moved.pid, [own])
    assert cgroups.members(other) == [sleeper]
finally:
    moved.kill()
    moved.wait()
"""


@pytest.fixture
def groups() -> Iterator[tuple[Path, Path]]:
    """Two new groups of one hierarchy, of version 2 where there is one."""
    found = [Path(each) for each in cgroups.directories(os.getpid())]
    parent = next((each for each in found if (each / "cgroup.controllers").exists()), found[0])
    name = f"ckpt-test-{secrets.token_hex(4)}"
    made = parent / f"{name}-agent", parent / f"{name}-other"
    for each in made:
        each.mkdir()
    try:
        yield made
    finally:
        for each in made:
            each.rmdir()


def test_processes_are_found_and_moved_across_the_boundary(groups: tuple[Path, Path]) -> None:
    in_new_namespace = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run(
        [*in_new_namespace, sys.executable, "-c", FIRST, AGENT, *map(str, groups)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
