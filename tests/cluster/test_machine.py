"""A machine of the cluster leaves nothing, however it ends; its services behave as a node's do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import cache_directory, state_directory
from tests.cluster.machine import ClusterError, NodeMachine, poll

COUNT_STARTS = "echo start >> /var/log/starts; exec sleep 600"


@pytest.fixture
def state() -> Iterator[Path]:
    """A directory on the disk that the cluster's own state is on."""
    directory = state_directory().with_name(f"ckpt-agent-machine-{os.getpid()}")
    directory.mkdir()
    yield directory
    directory.rmdir()


@pytest.fixture
def machine(state: Path, tmp_path: Path) -> Iterator[NodeMachine]:
    machine = NodeMachine("m", state)
    cache = cache_directory()
    machine.boot("node", cache / "roots/node", tmp_path, cache / "bin")
    yield machine
    machine.remove()


def first_processes(machine: NodeMachine) -> list[int]:
    own = os.fsencode(machine.state)
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if own in words:
            found.append(int(directory.name))
    return found


def test_a_killed_service_comes_back_and_a_stopped_one_does_not(machine: NodeMachine) -> None:
    starts = machine.log / "starts"
    machine.start("sleeper", "sh", "-c", COUNT_STARTS)
    poll(starts.exists, "the first start", 5)

    machine.kill("sleeper")
    poll(lambda: starts.read_text().count("start") == 2, "the second start", 5)
    machine.stop("sleeper")

    assert not machine.alive("sleeper")
    with pytest.raises(ClusterError):
        poll(lambda: machine.alive("sleeper"), "a start of its own", 1)
    machine.resume("sleeper")
    poll(lambda: starts.read_text().count("start") == 3, "the third start", 5)
    assert machine.alive("sleeper")


def test_a_machine_has_namespaces_of_its_own(machine: NodeMachine) -> None:
    for kind in ("net", "mnt", "pid", "uts", "ipc"):
        assert os.readlink(f"/proc/{machine.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    assert machine.exec("hostname").stdout.strip() == "m"
    assert "PRETTY_NAME=" in machine.exec("cat", "/etc/os-release").stdout


def test_halting_ends_processes_that_ignore_signals_and_their_control_groups(
    machine: NodeMachine,
) -> None:
    group = Path("/sys/fs/cgroup/memory", machine.control_group, "pod")
    script = f"trap '' TERM INT HUP; mkdir {group}; echo $$ > {group}/cgroup.procs; sleep 600"
    machine.start("stubborn", "sh", "-c", script)
    poll(lambda: group.exists() and (group / "cgroup.procs").read_text(), "the group", 5)

    machine.halt()

    assert not machine.running()
    assert not group.parent.exists()
    assert first_processes(machine) == []


def test_a_start_that_crashed_before_it_wrote_its_pid_down_is_removed_too(
    machine: NodeMachine,
) -> None:
    (machine.state / "pid").unlink()
    assert not machine.running()
    assert first_processes(machine) != []

    machine.halt()

    poll(lambda: first_processes(machine) == [], "the end of the first process", 5)


def test_a_pid_that_came_to_somebody_else_is_not_taken_for_the_machine(
    machine: NodeMachine,
) -> None:
    _, started = (machine.state / "pid").read_text().split()
    (machine.state / "pid").write_text(f"{os.getpid()} {started}")

    assert not machine.running()
    with pytest.raises(ClusterError, match="not running"):
        machine.exec("true")
    machine.halt()
    # We have that pid, and are still here.
