"""The container engine's parts that need no container."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.container import connections, rights
from agent.host import cgroups, confine, hold, mounts
from agent.model.container import Container, Mount

POD = "/var/lib/kubelet/pods/1234"


def container(*found: Mount) -> Container:
    return Container("id", "main", 1, "/rootfs", found)


def test_volumes_that_live_and_die_with_the_pod_travel() -> None:
    assert container(
        Mount("/dev/shm", "/run/sandbox/shm", "bind"),
        Mount("/cache", f"{POD}/volumes/kubernetes.io~empty-dir/cache", "bind"),
        Mount("/.ckpt-agent", f"{POD}/volumes/kubernetes.io~empty-dir/ckpt-agent", "bind"),
        Mount("/etc/hosts", f"{POD}/etc-hosts", "bind"),
        Mount("/data", f"{POD}/volumes/kubernetes.io~csi/data/mount", "bind"),
        Mount("/config", f"{POD}/volumes/kubernetes.io~configmap/config", "bind"),
        Mount("/proc", "proc", "proc"),
    ).volumes == ("/cache", "/dev/shm")


@pytest.mark.parametrize(
    ("line", "point", "upper"),
    [
        (
            r"1 2 0:30 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/up\040per/fs,workdir=/w",
            "/",
            "/up per/fs",
        ),
        (r"1 2 0:30 /a\011b /with\134b ro shared:1 master:2 - ext4 /dev/vda ro", r"/with\b", ""),
    ],
)
def test_a_line_of_mountinfo(line: str, point: str, upper: str) -> None:
    found = mounts._mount(line)
    assert found.point == point
    assert found.option("upperdir") == upper


def group(root: Path, **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name.replace("__", ".")).write_text(content)
    return root


@pytest.mark.parametrize("name", ["memory__max", "memory__limit_in_bytes"])
def test_the_tightest_memory_limit_counts(tmp_path: Path, name: str) -> None:
    none = "max" if name == "memory__max" else str((1 << 63) - 4096)
    inner = tmp_path / "pods" / "pod" / "container"
    group(inner, **{name: none})
    group(inner.parent, **{name: str(300 << 20)})
    group(inner.parent.parent, **{name: str(900 << 20)})
    assert cgroups.memory_limit_bytes([str(tmp_path), str(inner)]) == 300 << 20
    group(inner, **{name: str(100 << 20)})
    assert cgroups.memory_limit_bytes([str(inner)]) == 100 << 20
    assert cgroups.memory_limit_bytes([str(tmp_path)]) is None


def test_the_members_of_a_group_are_those_of_the_groups_below_too(tmp_path: Path) -> None:
    group(tmp_path, cgroup__procs="3\n1\n")
    group(tmp_path / "below", cgroup__procs="2\n")
    assert cgroups.members(str(tmp_path)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("root", "path", "found"),
    [
        ("/", "/pods/a", "/sys/fs/cgroup/pods/a"),
        ("/", "/", "/sys/fs/cgroup"),
        ("/node", "/node/pods/a", "/sys/fs/cgroup/pods/a"),
        ("/node", "/node2/pods/a", ""),
        ("/node", "/pods/a", ""),
    ],
)
def test_where_a_group_is_mounted(root: str, path: str, found: str) -> None:
    mount = mounts.Mount(1, "0:1", root, "/sys/fs/cgroup", "cgroup2", "", False, ())
    assert cgroups._below(mount, path) == found


@pytest.fixture
def arranged(tmp_path: Path) -> Path:
    """A directory that somebody arranged, beside a secret."""
    (tmp_path / "secret").write_text("secret")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "secret").write_text("own")
    (root / "out").symlink_to("../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "own").symlink_to("/etc/secret")
    (root / "way").symlink_to("etc")
    return root


def read(fd: int) -> str:
    with open(fd) as file:
        return file.read()


def test_paths_inside_are_resolved_as_a_process_with_that_root_would(arranged: Path) -> None:
    root = os.open(arranged, os.O_PATH | os.O_DIRECTORY)
    try:
        for path in ("own", "/own", "way/secret", "../../etc/secret", "/etc/../../etc/secret"):
            assert read(confine.open_inside(root, path, os.O_RDONLY)) == "own"
        for path in ("out", "absolute"):
            with pytest.raises(FileNotFoundError):
                confine.open_inside(root, path, os.O_RDONLY)
    finally:
        os.close(root)


def test_paths_beneath_follow_no_link_at_all(arranged: Path) -> None:
    root = os.open(arranged, os.O_PATH | os.O_DIRECTORY)
    try:
        assert read(confine.open_beneath(root, "etc/secret", os.O_RDONLY)) == "own"
        for path in ("own", "way/secret", "out", "absolute", "/etc/secret", "../secret"):
            with pytest.raises(OSError, match=r"symbolic links|cross-device"):
                confine.open_beneath(root, path, os.O_RDONLY)
        proc = os.open("/", os.O_PATH | os.O_DIRECTORY)
        with pytest.raises(OSError, match="cross-device") as crossed:
            confine.open_beneath(proc, "proc/self", os.O_PATH, one_file_system=True)
        os.close(proc)
        assert crossed.value.errno == errno.EXDEV
    finally:
        os.close(root)


def known(*sockets: tuple[str, str, str]) -> dict[str, Any]:
    return {
        "sockets": [
            {"pid": 7, "fd": fd, "kind": kind, "local": local, "remote": remote, "state": "x"}
            for fd, (kind, local, remote) in enumerate(sockets)
        ]
    }


def test_only_connections_to_outside_from_a_changed_address_are_lost() -> None:
    facts = known(
        ("tcp", "10.1.0.5:1", "10.9.9.9:80"),
        ("tcp6", "[::ffff:10.1.0.5]:2", "[::ffff:10.9.9.9]:80"),
        ("tcp", "10.1.0.5:3", "10.1.0.5:80"),
        ("tcp", "10.1.0.5:80", "10.1.0.5:3"),
        ("tcp", "127.0.0.1:4", "127.0.0.1:80"),
        ("tcp6", "[::1]:5", "[::1]:80"),
        ("tcp6", "[fd00::5]:6", "[fd00::9]:80"),
        ("udp", "10.1.0.5:7", "10.9.9.9:53"),
    )
    moved = connections.Moved(["10.1.0.5", "fd00::5"], ["10.1.0.77", "fd00::77"])
    assert [(lost.fd, lost.remote) for lost in moved.lost(facts)] == [
        (0, "10.9.9.9:80"),
        (1, "10.9.9.9:80"),
        (6, "[fd00::9]:80"),
    ]
    assert moved("10.1.0.5") == "10.1.0.77"
    assert moved("fd00::5") == "fd00::77"
    assert moved("10.9.9.9") == "10.9.9.9"
    same = connections.Moved(["10.1.0.5", "fd00::5"], ["10.1.0.5", "fd00::5"])
    assert same.lost(facts) == []
    # The new pod has no address of one family: what used it has nowhere to go on.
    single = connections.Moved(["10.1.0.5", "fd00::5"], ["10.1.0.5"])
    assert single.homeless(facts) == ["fd00::5"]
    assert moved.homeless(facts) == same.homeless(facts) == []


def test_what_moves_together_stays_connected_and_addresses_may_be_exchanged() -> None:
    facts = known(
        ("tcp", "10.1.0.5:1", "10.1.0.6:80"),
        ("tcp6", "[::ffff:10.1.0.5]:2", "[::ffff:10.1.0.7]:80"),
        ("tcp", "10.1.0.5:3", "10.9.9.9:80"),
        ("tcp6", "[fd00::5]:4", "[fd00::6]:80"),
    )
    group = {
        "10.1.0.5": "10.1.0.6",
        "10.1.0.6": "10.1.0.5",
        "10.1.0.7": "10.1.0.7",
        "fd00::5": "fd00::77",
        "fd00:0::6": "fd00::78",
    }
    moved = connections.Moved(["10.1.0.5", "fd00::5"], ["10.1.0.6", "fd00::77"], group)
    assert set(moved.connections(facts)) >= {
        hold.Connection("10.1.0.6", 1, "10.1.0.5", 80),
        hold.Connection("10.1.0.6", 2, "10.1.0.7", 80),
        hold.Connection("10.1.0.6", 3, "10.9.9.9", 80),
        hold.Connection("fd00::77", 4, "fd00::78", 80),
    }
    assert [lost.remote for lost in moved.lost(facts)] == ["10.9.9.9:80"]
    assert moved.homeless(facts) == []
    # Where the pod itself stays, so does what it has with others.
    here = ["10.1.0.5", "fd00::5"]
    stays = connections.Moved(here, here, {each: each for each in here})
    assert stays.lost(facts) == []
    # A map that is not of this pod is noticed before anything is made.
    wrong = connections.Moved(["10.1.0.5"], ["10.1.0.9"], {"10.1.0.5": "10.1.0.6"})
    assert wrong.homeless(facts) == ["10.1.0.5"]


def test_a_connection_in_the_group_that_nobody_had_accepted_is_lost() -> None:
    facts = known(
        ("tcp", "10.1.0.5:1", "10.1.0.6:80"),
        ("tcp", "10.1.0.5:2", "10.1.0.6:80"),
        ("tcp6", "[::ffff:10.1.0.5]:3", "[::ffff:10.1.0.6]:80"),
        ("tcp", "127.0.0.1:4", "127.0.0.1:80"),
        ("tcp", "127.0.0.1:80", "127.0.0.1:4"),
    )
    for each in facts["sockets"]:
        each["state"] = "established"
    facts["sockets"][1]["state"] = "close-wait"  # its peer has closed it, which it will read
    group = {"10.1.0.5": "10.1.0.15", "10.1.0.6": "10.1.0.16"}
    halves = {f"10.1.0.5:{port} -> 10.1.0.6:80" for port in (2, 3)}
    # Of another pod's own, which looks the same.
    halves.add("127.0.0.1:4 -> 127.0.0.1:80")
    moved = connections.Moved(["10.1.0.5"], ["10.1.0.15"], group, frozenset(halves))
    assert [lost.fd for lost in moved.lost(facts)] == [2]
    # Where it stays as well: the one who was to accept it knows nothing of it.
    same = {each: each for each in group}
    stays = connections.Moved(["10.1.0.5"], ["10.1.0.5"], same, frozenset(halves))
    assert [lost.fd for lost in stays.lost(facts)] == [2]


def test_an_address_of_an_image_is_replaced_in_every_form() -> None:
    words = {connections._words("10.1.0.5"): connections._words("10.1.0.77")}

    def replaced(field: list[int]) -> list[int]:
        connections._replace(field, words)
        return field

    assert connections._words("10.1.0.5") == (0x0500010A,)
    assert replaced([0x0500010A]) == [0x4D00010A]
    assert replaced([0, 0, 0xFFFF0000, 0x0500010A]) == [0, 0, 0xFFFF0000, 0x4D00010A]
    assert replaced([1, 0, 0xFFFF0000, 0x0500010A]) == [1, 0, 0xFFFF0000, 0x0500010A]
    assert replaced([0x0600010A]) == [0x0600010A]


def test_missing_capabilities_are_named() -> None:
    assert rights.missing([0], 0) == []
    assert rights.missing([0], 1 << 60) == ["capability 60"]
    assert set(rights.missing([0, 1000], 0)) <= {"CAP_SYS_RESOURCE"}


def test_errors_of_the_caller_are_not_swallowed_inside() -> None:
    from agent.host import namespaces, proc

    def fail() -> None:
        raise errors.Conflict("mine")

    with pytest.raises(errors.Conflict, match="mine"):
        namespaces.within([], fail)
    with pytest.raises(errors.NotFound):
        namespaces.inside(proc.Identity(os.getpid(), 1), ("net",), fail)
