"""A container's processes go on in another container, as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import errors
from agent.engines.base import CaptureOptions
from agent.host import cgroups, proc
from tests.host.boxes import Box, Boxes, stem
from tests.host.conftest import Cut
from tests.host.image import MemoryImage

FEATURES = (
    *("memory", "threads", "children", "pipes", "unix_sockets", "tcp", "unlinked"),
    *("shared_memory", "memfd", "timers", "pending_signals", "sessions", "stopped", "eventfd"),
    *("open_file", "hard_link"),
)
COUNTER = "i=0; while sleep 0.05; do i=$((i+1)); echo line $i; done"


def wait_for(predicate: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not predicate():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def lines(box: Box) -> list[str]:
    return box.log.read_text().splitlines()


def test_a_tree_goes_on_in_another_container(boxes: Boxes) -> None:
    source = boxes.tree("source", *FEATURES)
    image = boxes.dump(source)
    boxes.check(source)
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    boxes.check(target)
    boxes.check(source)
    boxes.assert_clean()


def test_three_generations(boxes: Boxes) -> None:
    """Restored, dumped and restored again: nothing of the way is remembered."""
    box = boxes.tree("first", *FEATURES)
    for name in ("second", "third", "fourth"):
        image = boxes.stop(box)
        box = boxes.placeholder(name)
        boxes.restore(image, box)
        boxes.check(box)
        boxes.assert_clean()


def test_a_stopped_container_waits_and_takes_its_own_image_back(boxes: Boxes) -> None:
    """It does not end: the kubelet would start it anew, from the beginning."""
    box = boxes.tree("source", *FEATURES)
    image = boxes.stop(box)
    time.sleep(0.3)
    assert box.popen.poll() is None
    assert box.pids() == [box.pid]
    boxes.assert_clean()
    boxes.restore(image, box)
    boxes.check(box)
    boxes.runc("kill", box.id, "TERM")
    assert box.wait() == 7


def test_a_failed_commit_lets_the_container_go_on(boxes: Boxes) -> None:
    source = boxes.tree("source", *FEATURES)

    def full() -> None:
        raise errors.VolumeFull("no room")

    with pytest.raises(errors.VolumeFull):
        boxes.dump(source, cut=Cut(captured=full), options=CaptureOptions(kill=True))
    boxes.check(source)
    boxes.assert_clean()


def test_output_goes_to_the_new_containers_log_without_a_gap(boxes: Boxes) -> None:
    source = boxes.start("source", "sh", "-c", COUNTER)
    wait_for(lambda: len(lines(source)) > 5, "no output")
    image = boxes.stop(source)
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    wait_for(lambda: len(lines(target)) > 5, "no output")
    first = int(lines(target)[0].split()[1])
    # runc may still be on the way to the log with what was said last.
    wait_for(lambda: len(lines(source)) >= first - 1, "lines are lost")
    together = lines(source) + lines(target)
    assert together == [f"line {n}" for n in range(1, len(together) + 1)]


def test_streams_opened_anew_lead_to_the_new_log_too(boxes: Boxes) -> None:
    script = "exec 7>/dev/stderr; while sleep 0.05; do echo out; echo err >&2; echo again >&7; done"
    source = boxes.start("source", "sh", "-c", script)
    wait_for(lambda: "again" in source.log.read_text(), "no output")
    image = boxes.dump(source)
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    wait_for(lambda: {"out", "err", "again"} <= set(lines(target)), "a stream is silent")


def test_a_placeholder_with_another_version_of_hold(boxes: Boxes) -> None:
    """After an upgrade of the agent; the tree keeps the version that it was started with."""
    source = boxes.tree("source", "memory", "children")
    image = boxes.dump(source)
    target = boxes.placeholder("target", hold_suffix=b"another version")
    for box in (target, boxes.placeholder("third")):
        boxes.restore(image, box)
        boxes.check(box)
        image = boxes.dump(box)


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_status_becomes_the_containers(boxes: Boxes, code: int) -> None:
    source = boxes.start(
        "source", "sh", "-c", f"while ! test -e /end; do sleep 0.05; done; exit {code}"
    )
    wait_for(lambda: "sleep" in proc_names(source), "no workload")
    image = boxes.dump(source)
    target = boxes.placeholder("target")
    tree = boxes.restore(image, target)
    with pytest.raises(errors.DeadlineExceeded):
        tree.wait(0.1)
    target.root("/end").touch()
    assert target.wait() == code
    with pytest.raises(errors.NotFound, match="has ended"):
        tree.wait(0)
    assert not source.root("/end").exists()


def test_signals_reach_the_workload_and_its_status_the_runtime(boxes: Boxes) -> None:
    source = boxes.tree("source", "memory", "children")
    image = boxes.dump(source)
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    boxes.runc("kill", target.id, "TERM")
    assert target.wait() == 7
    boxes.check(source)


def test_killing_a_restored_tree_leaves_a_placeholder(boxes: Boxes) -> None:
    """As when another member of the group could not be restored: the next try works."""
    source = boxes.tree("source", "children", "threads", "sessions", "stopped")
    image = boxes.dump(source)
    target = boxes.placeholder("target")
    for _ in range(2):
        tree = boxes.restore(image, target)
        boxes.check(target)
        tree.kill()
        wait_for(lambda: target.pids() == [target.pid], "a process stays")
        tree.kill()
        tree.signal(signal.SIGTERM)
        boxes.assert_clean()


def test_a_tree_that_ends_at_once_ends_its_container(boxes: Boxes) -> None:
    (boxes.folder / "shared").mkdir()
    bind = {"type": "bind", "options": ["rbind", "rw"], "source": str(boxes.folder / "shared")}
    mounts = {"mounts": [{"destination": "/shared", **bind}]}
    script = "while ! test -e /shared/end; do :; done; exit 5"
    source = boxes.start("source", "sh", "-c", script, **mounts)
    wait_for(lambda: "sh" in proc_names(source), "no workload")
    image = boxes.dump(source)
    (boxes.folder / "shared" / "end").touch()
    assert source.wait() == 5
    for name in ("one", "two", "three"):
        target = boxes.placeholder(name, **mounts)
        boxes.restore(image, target)
        assert target.wait() == 5


def test_processes_keep_their_numbers_and_new_ones_get_others(boxes: Boxes) -> None:
    source = boxes.tree("source", "children", "threads")
    image = boxes.dump(source)
    target = boxes.placeholder("target")
    boxes.restore(image, target)

    def numbers(box: Box) -> list[int]:
        return sorted(proc.status(pid).ns_pids[-1] for pid in box.pids())

    assert numbers(target) == numbers(source)
    started = int(target.exec("sh", "-c", "echo $$"))
    assert started > max(numbers(source))


def test_the_tree_is_in_the_new_containers_groups_and_keeps_to_its_limit(boxes: Boxes) -> None:
    script = (
        "import time,os\n"
        "while not os.path.exists('/eat'): time.sleep(0.05)\n"
        "hoard = []\n"
        "while True: hoard.append(bytearray(os.urandom(1 << 20)))\n"
    )
    source = boxes.start("source", "python3", "-c", script, memory_mib=400)
    wait_for(lambda: "python3" in proc_names(source), "no workload")
    image = boxes.dump(source)
    target = boxes.placeholder("target", memory_mib=96)
    boxes.restore(image, target)
    assert set(proc.tree(target.pid)) == set(target.pids())
    target.root("/eat").touch()
    # The kernel's out-of-memory killer, by the placeholder's own limit.
    assert target.wait(60) == 128 + signal.SIGKILL


def test_rootfs_changes_and_volumes_travel(boxes: Boxes) -> None:
    script = r"""
set -e
echo changed > /etc/hostname.new; echo more >> /etc/passwd
rm /etc/issue; rm -r /usr/share/doc; mkdir /usr/share/doc; echo only > /usr/share/doc/only
mkdir -m 2750 -p /data/deep; chown 12:34 /data/deep; echo x > /data/deep/file
chmod 4711 /data/deep/file
ln -s /nowhere /data/dangling; ln /data/deep/file /data/hard; mkfifo -m 640 /data/fifo
touch -d '2001-02-03 04:05:06.789' /data/deep /data/hard
truncate -s 100M /data/sparse; echo end >> /data/sparse
echo disk > /disk/file; mkdir /disk/sub; echo memory > /memory/file; echo shm > /dev/shm/file
chmod 1770 /disk; printf 'a\nb' > "/data/odd
name"
echo ready
exec sleep 1000
"""
    rights = ["CAP_CHOWN", "CAP_FOWNER", "CAP_FSETID", "CAP_DAC_OVERRIDE"]
    source = boxes.start("source", "sh", "-c", script, capabilities=rights)
    wait_for(lambda: "ready" in source.log.read_text(), "the script failed")
    os.setxattr(source.root("/data/hard"), "user.note", b"\0binary\xff")
    image = boxes.dump(source)
    target = boxes.placeholder("target", capabilities=rights)
    boxes.restore(image, target)
    look = r"""
cat /etc/hostname.new; tail -1 /etc/passwd; ls /etc/issue; ls -R /usr/share/doc
find /data /disk /memory /dev/shm -printf '%p %y %m %U:%G %s %n %l %T@\n' | sort
cat /data/deep/file /disk/file /memory/file /dev/shm/file; tail -c 4 /data/sparse
cat "/data/odd
name"
"""
    assert target.exec("sh", "-c", look).splitlines() == source.exec("sh", "-c", look).splitlines()
    assert os.getxattr(target.root("/data/hard"), "user.note") == b"\0binary\xff"
    assert os.stat(target.root("/data/hard")).st_nlink == 2
    assert os.stat(target.root("/data/sparse")).st_blocks * 512 < 1 << 20
    # What the runtime mounted is mounted still.
    assert "tmpfs" in target.exec("sh", "-c", "grep ' /dev/shm ' /proc/self/mounts")


def test_a_read_only_root_file_system(boxes: Boxes) -> None:
    source = boxes.tree("source", *FEATURES, folder="/disk/work", read_only=True)
    image = boxes.dump(source)
    target = boxes.placeholder("target", read_only=True)
    boxes.restore(image, target)
    boxes.check(target, "/disk/work")
    assert target.exec("sh", "-c", "touch /x || echo refused", check=False).strip() == "refused"


def test_files_open_in_volumes_and_shared_memory(boxes: Boxes) -> None:
    script = r"""
import mmap, os, time
shm = os.open('/dev/shm/segment', os.O_RDWR | os.O_CREAT)
os.ftruncate(shm, 1 << 20)
area = mmap.mmap(shm, 1 << 20)
area[:] = b'abcd' * (1 << 18)
journal = open('/disk/journal', 'a')
gone = os.open('/memory/gone', os.O_RDWR | os.O_CREAT)
os.write(gone, b'unlinked')
os.unlink('/memory/gone')
n = 0
while True:
    n += 1
    print(n, file=journal, flush=True)
    assert area[:8] == b'abcdabcd' and os.pread(gone, 99, 0) == b'unlinked'
    print('good', n, flush=True)
    time.sleep(0.05)
"""
    source = boxes.start("source", "python3", "-c", script)
    wait_for(lambda: len(lines(source)) > 5, "no output")
    image = boxes.stop(source)
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    wait_for(lambda: len(lines(target)) > 5, "no output")
    written = target.root("/disk/journal").read_text().split()
    assert written == [str(n) for n in range(1, len(written) + 1)]
    assert all(line.startswith("good") for line in lines(target))


def test_files_in_memory_are_charged_to_their_container(boxes: Boxes) -> None:
    script = "head -c 30000000 /dev/urandom > /memory/large; echo up; exec sleep 1000"
    source = boxes.start("source", "sh", "-c", script, memory_mib=200)
    wait_for(lambda: "up" in source.log.read_text(), "no output")
    image = boxes.dump(source)
    # Where its limit leaves no room, the files are put back all the same.
    for name, limit_mib, charged in (("large", 200, True), ("small", 60, False)):
        target = boxes.placeholder(name, memory_mib=limit_mib)
        boxes.restore(image, target)
        assert (memory_bytes(target) > 30_000_000) == charged
        assert (
            target.root("/memory/large").read_bytes() == source.root("/memory/large").read_bytes()
        )


def memory_bytes(box: Box) -> int:
    """What the kernel charges to the container."""
    for group in cgroups.directories(box.pid):
        for name in ("memory.usage_in_bytes", "memory.current"):
            with contextlib.suppress(FileNotFoundError):
                return int((Path(group) / name).read_text())
    raise AssertionError("no group counts memory")


def test_execs_come_and_go_meanwhile_and_stay_out_of_the_image(boxes: Boxes) -> None:
    source = boxes.tree("source", "memory", "children", "threads")
    shell = boxes.popen_exec(source, "sleep", "1000")
    wait_for(lambda: len(source.pids()) > len(proc.tree(source.pid)), "no exec")
    image = boxes.dump(source)
    assert shell.poll() is None
    comms = [each["comm"] for each in image.facts()["processes"]]
    assert "sleep" not in comms
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    boxes.check(target)
    boxes.check(source)


def test_daemons_below_the_main_process_travel_in_every_generation(boxes: Boxes) -> None:
    script = "(setsid sleep 1234 &) ; exec sleep 1000"
    box = boxes.start("first", "sh", "-c", script)
    wait_for(lambda: proc_names(box).count("sleep") == 2, "no daemon")
    for name in ("second", "third"):
        image = boxes.dump(box)
        box = boxes.placeholder(name)
        boxes.restore(image, box)
        assert proc_names(box).count("sleep") == 2
    # One that is made an orphan only after a restore stays below the stem as well.
    os.kill(stem(box), 0)


def proc_names(box: Box) -> list[str]:
    found = []
    for pid in box.pids():
        with contextlib.suppress(errors.NotFound):  # it has just ended
            found.append(proc.stat(pid).comm)
    return found


def test_few_rights_and_a_filter_of_system_calls(boxes: Boxes) -> None:
    seccomp = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["ptrace", "bpf"], "action": "SCMP_ACT_ERRNO"}],
    }
    source = boxes.tree("source", *FEATURES, capabilities=[], seccomp=seccomp)
    image = boxes.dump(source)
    target = boxes.placeholder("target", capabilities=[], seccomp=seccomp)
    boxes.restore(image, target)
    boxes.check(target)
    status = (target.root(f"/proc/{proc.status(stem(target)).ns_pids[-1]}/status")).read_text()
    assert "Seccomp:\t2" in status
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_a_container_stops_only_for_what_it_wrote_since(boxes: Boxes) -> None:
    """Its memory is copied while it runs, by its numbers on this host, and is CRIU's by those
    inside.
    """
    source = boxes.tree("source", *FEATURES, under=("env", "MEMORY_MIB=96"))
    image = MemoryImage()
    report = boxes.capture(source, image, options=CaptureOptions(precopy=True))
    how = report.engine_facts["stop"]
    assert how["path"] == "precopy", how
    assert how["tracked"].get("write-protect", 0) > 0, how
    assert how["hidden_from_criu"] > 0, how
    assert how["read_at_cut_bytes"] < image.drafted_bytes / 2
    assert how["shared_objects"] > 0, how
    boxes.check(source)
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    boxes.check(target)
    boxes.assert_clean()
