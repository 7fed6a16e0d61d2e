"""What cannot be dumped or restored is refused before anything was touched, with the way out."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.base import CaptureOptions
from agent.engines.container import conflicts, holding, inside
from agent.host import proc
from tests.conftest import NOT_TO_BE_HAD
from tests.host.boxes import Box, Boxes
from tests.host.conftest import Cut
from tests.host.image import MemoryImage
from tests.host.test_container_engine import wait_for
from tests.host.test_container_faults import assert_waits

IO_URING = """
import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(425, 4, ctypes.create_string_buffer(120))
print('ring' if fd >= 0 else 'none', flush=True)
time.sleep(1000)
"""
SYSV = """
import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat(libc.shmget(0, 1 << 20, 0o1600), None, 0)
print('up', flush=True)
time.sleep(1000)
"""
MULTICAST = """
import socket, struct, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
group = struct.pack('=4s4si', socket.inet_aton('239.77.0.1'), bytes(4), 1)
sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
print('up', flush=True)
time.sleep(1000)
"""


def refused(boxes: Boxes, box: Box, match: str, kind: type[errors.Refused]) -> errors.Refused:
    """The dump is refused and the container was not touched."""
    before = [(pid, proc.stat(pid).state) for pid in box.pids()]
    image = MemoryImage()
    with pytest.raises(kind, match=match) as refusal:
        boxes.capture(box, image)
    assert refusal.value.hint
    assert image.known is None
    assert not image.images
    assert len(box.pids()) == len(before)
    boxes.assert_clean()
    assert boxes.engine(box).examine(box.container)
    return refusal.value


def test_a_placeholder_cannot_be_dumped(boxes: Boxes) -> None:
    box = boxes.placeholder("target")
    # Until it is hold, it is the runtime's own first process.
    wait_for(lambda: holding.waits(box.pid), "hold does not wait")
    refused(boxes, box, "placeholder that waits", errors.TargetUnsuitable)


def test_a_container_that_has_ended(boxes: Boxes) -> None:
    box = boxes.start("source", "sleep", "1000")
    container = box.container
    box.boxes.runc("kill", box.id, "KILL")
    box.wait()
    with pytest.raises(errors.NotFound):
        boxes.engine(box).capture(container.pid, MemoryImage(), Cut(), CaptureOptions())


def test_io_uring(boxes: Boxes) -> None:
    box = boxes.start("source", "python3", "-c", IO_URING)
    wait_for(lambda: "ring" in box.log.read_text(), box.log.read_text())
    refused(boxes, box, "io_uring", errors.TargetUnsuitable)


def test_a_gpu(boxes: Boxes) -> None:
    """In the place of a GPU's file there is one of /dev/null under such a name."""
    script = (
        "until [ -c /dev/nvidia0 ]; do sleep 0.05; done; exec 3<>/dev/nvidia0; echo up;"
        " exec sleep 1000"
    )
    box = boxes.start("source", "sh", "-c", script)
    os.mknod(box.root("/dev/nvidia0"), 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    wait_for(lambda: "up" in box.log.read_text(), box.log.read_text())
    refused(boxes, box, r"uses a GPU \(/dev/nvidia0\)", errors.TargetUnsuitable)


def test_sysv_shared_memory(boxes: Boxes) -> None:
    box = boxes.start("source", "python3", "-c", SYSV)
    wait_for(lambda: "up" in box.log.read_text(), "no output")
    refused(boxes, box, "System V", errors.TargetUnsuitable)


def test_a_multicast_group(boxes: Boxes) -> None:
    box = boxes.start("source", "python3", "-c", MULTICAST)
    wait_for(lambda: "up" in box.log.read_text(), box.log.read_text())
    found = refused(boxes, box, r"multicast group 239\.77\.0\.1", errors.TargetUnsuitable)
    assert "leave the group" in found.hint


def test_a_workload_that_mounted_something_by_itself(boxes: Boxes) -> None:
    script = "mount -t tmpfs tmpfs /mnt && echo up && exec sleep 1000"
    box = boxes.start("source", "sh", "-c", script, capabilities=["CAP_SYS_ADMIN"])
    wait_for(lambda: "up" in box.log.read_text(), box.log.read_text())
    refused(boxes, box, "mounted something at /mnt", errors.TargetUnsuitable)


def test_a_workload_with_namespaces_of_its_own(boxes: Boxes) -> None:
    script = "unshare --uts sh -c 'echo up; exec sleep 1000'"
    box = boxes.start("source", "sh", "-c", script, capabilities=["CAP_SYS_ADMIN"])
    wait_for(lambda: "up" in box.log.read_text(), box.log.read_text())
    refused(boxes, box, "uts namespace of its own", errors.TargetUnsuitable)


def test_the_agents_own_network(boxes: Boxes) -> None:
    path = {"network": {"path": f"/proc/{os.getpid()}/ns/net"}}
    box = boxes.start("source", "sleep", "1000", namespaces=path)
    wait_for(lambda: any(proc.stat(pid).comm == "sleep" for pid in box.pids()), "no workload")
    refused(boxes, box, "own network", errors.TargetUnsuitable)


def test_a_terminal(boxes: Boxes) -> None:
    box = boxes.start("source", "sleep", "1000", terminal=True)
    wait_for(lambda: any(proc.stat(pid).comm == "sleep" for pid in box.pids()), "no workload")
    refused(boxes, box, "terminal", errors.TargetUnsuitable)


def test_a_debugger(boxes: Boxes) -> None:
    box = boxes.tree("source", "memory")
    script = (
        "import ctypes,sys,time;l=ctypes.CDLL(None);"
        f"l.ptrace(0x4206,{box.inside(7)},None,None);print('on',flush=True);time.sleep(1000)"
    )
    tracer = subprocess.Popen(["python3", "-c", script], stdout=subprocess.PIPE)
    try:
        assert tracer.stdout
        tracer.stdout.readline()
        error = refused(boxes, box, f"traced by process {tracer.pid}", errors.TargetBusy)
        assert error.retryable
    finally:
        tracer.kill()
        tracer.communicate()
    boxes.dump(box)


def test_another_user_without_the_right_to_restore_it(boxes: Boxes) -> None:
    if proc.status(os.getpid()).caps_effective >> 24 & 1:
        pytest.skip(f"{NOT_TO_BE_HAD}a root without CAP_SYS_RESOURCE")
    script = "import os,time;os.setgid(1000);os.setuid(1000);print('up',flush=True);time.sleep(999)"
    rights = ["CAP_SETUID", "CAP_SETGID"]
    box = boxes.start("source", "python3", "-c", script, capabilities=rights)
    wait_for(lambda: "up" in box.log.read_text(), box.log.read_text())
    refused(boxes, box, "user 1000 .* lacks CAP_SYS_RESOURCE", errors.TargetUnsuitable)


def changed(image: MemoryImage, **container: Any) -> MemoryImage:
    """The image with other facts of its container."""
    found = copy.copy(image)
    found.known = copy.deepcopy(image.known)
    assert found.known is not None
    found.known["container"].update(container)
    return found


def reasons(boxes: Boxes, image: MemoryImage, target: Box) -> list[str]:
    """Why the restore is refused; nothing was touched."""
    with pytest.raises(errors.RestoreConflict) as refusal:
        boxes.restore(image, target)
    assert refusal.value.hint
    boxes.assert_clean()
    found = refusal.value.facts["reasons"]
    assert isinstance(found, list)
    return found


def test_every_reason_is_listed_at_once_and_nothing_was_touched(boxes: Boxes) -> None:
    source = boxes.tree("source", "memory", "children")
    image = boxes.dump(source)
    assert image.known is not None
    worse = changed(image, mounts=[*image.known["container"]["mounts"], "/data"])
    assert worse.known is not None
    worse.known["cpu_flags"] = [*worse.known["cpu_flags"], "flux_capacitor"]
    worse.known["kernel"] = "99.1.0"
    target = boxes.placeholder("target", digest="sha256:" + "2" * 64, memory_mib=8)
    number = max(pid for pid, _ in image.known["threads"])
    squatter = squat(boxes, target, number)
    found = "\n".join(reasons(boxes, worse, target))
    assert f"image is sha256:{'2' * 64}" in found
    assert "CPU lacks flux_capacitor" in found
    assert "older than the image's 99.1.0" in found
    assert "nothing is mounted at /data" in found
    assert "memory limit is 8 MiB" in found
    assert f"pid {number} inside of the container is in use" in found
    assert len(found.splitlines()) == 6
    squatter.kill()
    assert list((target.folder / EMPTY_DISK).iterdir()) == []


def test_another_architecture_is_told_as_such_and_not_by_its_features(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    assert image.known is not None
    image.known |= {"machine": "riscv64", "cpu_flags": ["c", "d", "v"], "kernel": "99.1.0"}
    (found,) = reasons(boxes, image, boxes.placeholder("target"))
    assert found == f"the image is of a riscv64 machine, this is {os.uname().machine}"


EMPTY_DISK = Path("volumes/kubernetes.io~empty-dir/disk")


def squat(boxes: Boxes, box: Box, number: int) -> subprocess.Popen[bytes]:
    """An exec that has this number inside."""
    inside.raise_counter(proc.identity(box.pid), number - 1)
    popen = boxes.popen_exec(box, "sleep", "1000")
    wait_for(lambda: taken(box, number), "the exec got another number")
    return popen


def taken(box: Box, number: int) -> bool:
    for pid in box.pids():
        with contextlib.suppress(errors.NotFound):  # runc's own come and go
            if proc.status(pid).ns_pids[-1] == number:
                return True
    return False


def test_a_probe_that_has_a_number_of_the_tree_is_waited_for(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = boxes.dump(boxes.tree("source", "memory", "children"))
    assert image.known is not None
    target = boxes.placeholder("target")
    number = max(pid for pid, _ in image.known["threads"])
    probe = squat(boxes, target, number)
    met: list[int] = []
    is_exec = conflicts._is_exec

    def ends_once_seen(pid: int) -> bool:
        found = is_exec(pid)
        if found and not met:
            met.append(proc.status(pid).ns_pids[-1])
            os.kill(pid, signal.SIGKILL)
        return found

    monkeypatch.setattr(conflicts, "_is_exec", ends_once_seen)
    boxes.restore(image, target)
    assert met == [number]
    assert probe.wait(20) == 128 + signal.SIGKILL
    boxes.check(target)


def test_a_container_that_runs_already(boxes: Boxes) -> None:
    source = boxes.tree("source", "memory")
    image = boxes.dump(source)
    found = "\n".join(reasons(boxes, image, source))
    assert "runs its own workload already" in found
    assert "in use" in found
    boxes.check(source)


def test_an_image_that_was_restored_already_is_refused_in_the_same_container(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    reasons(boxes, image, target)
    boxes.check(target)


def test_a_placeholder_that_holds_another_images_files(boxes: Boxes) -> None:
    """Of a restore that failed, or of a workload that was stopped."""
    source = boxes.tree("source", "memory")
    older = boxes.dump(source)
    newer = boxes.stop(source)
    assert "files of another image" in "\n".join(reasons(boxes, older, source))
    boxes.restore(newer, source)
    boxes.check(source)


def test_a_container_without_hold(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    target = Box(boxes, "plain", ["sleep", "1000"])
    assert "no placeholder" in "\n".join(reasons(boxes, image, target))


def test_a_container_of_another_name(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    target = boxes.placeholder("target", container="other")
    with pytest.raises(errors.NotFound, match="no container main"):
        boxes.restore(image, target)


def test_a_volume_of_another_kind(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    target = boxes.placeholder("target", disk="/opt")
    assert "/disk was an emptyDir" in "\n".join(reasons(boxes, image, target))


def test_an_image_of_another_layout(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    assert image.known is not None
    image.known["layout"] = "criu-4"
    target = boxes.placeholder("target")
    with pytest.raises(errors.UnknownFormat, match="criu-4"):
        boxes.restore(image, target)


@pytest.mark.parametrize("key", ["threads", "container", "rootfs", "volumes", "processes", "root"])
def test_an_image_with_incomplete_facts(boxes: Boxes, key: str) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    target = boxes.placeholder("target")
    assert image.known is not None
    kept = image.known.pop(key)
    with pytest.raises(errors.Corrupt):
        boxes.restore(image, target)
    boxes.assert_clean()
    image.known[key] = kept
    assert_waits(boxes, image, target)


def test_an_image_with_a_hostile_archive(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    target = boxes.placeholder("target")
    good = image.contents["/rootfs-diff.tar"]
    image.contents["/rootfs-diff.tar"] = good[:600]
    with pytest.raises(errors.Corrupt, match=r"rootfs-diff\.tar"):
        boxes.restore(image, target)
    assert not target.root("/work").exists()
    image.contents["/rootfs-diff.tar"] = good
    assert_waits(boxes, image, target)


def test_a_damaged_image_of_criu(boxes: Boxes) -> None:
    image = boxes.dump(boxes.tree("source", "memory"))
    target = boxes.placeholder("target")
    good = image.images["pstree.img"]
    image.images["pstree.img"] = good[:-3]
    with pytest.raises(errors.Corrupt):
        boxes.restore(image, target)
    image.images["pstree.img"] = good
    assert_waits(boxes, image, target)
