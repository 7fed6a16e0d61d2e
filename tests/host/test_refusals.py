"""Dumps that are refused before anything is touched."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, RestoreOptions
from agent.engines.criu import preflight
from agent.engines.criu.engine import CriuEngine
from agent.engines.kubelet.engine import KubeletEngine
from agent.engines.tracking import areas
from agent.host import cgroups, clock, injection, proc, ptrace, system
from agent.model.container import Container
from agent.node.plan import plan_dump
from tests.conftest import NOT_TO_BE_HAD
from tests.host.conftest import Cut, Gate, Host
from tests.host.image import MemoryImage, MemorySource


def refused(host: Host, pid: int) -> errors.CkptError:
    with pytest.raises(errors.CkptError) as refusal:
        host.capture(pid, MemoryImage())
    assert isinstance(refusal.value, errors.Refused | errors.EnvironmentUnfit)
    assert refusal.value.hint
    host.assert_clean()
    return refusal.value


def test_no_such_process(host: Host) -> None:
    # Numbers end below this one: any other may be somebody's by now.
    assert isinstance(refused(host, system.last_pid_max()), errors.NotFound)


def test_a_kernel_thread(host: Host) -> None:
    threads = []
    for pid in proc.pids():
        with contextlib.suppress(errors.NotFound):  # it has ended since
            if proc.stat(pid).kernel_thread:
                threads.append(pid)
    if not threads:
        pytest.skip(f"{NOT_TO_BE_HAD}a pid namespace without kernel threads")
    refusal = refused(host, threads[0])
    assert isinstance(refusal, errors.TargetUnsuitable)
    assert "kernel thread" in refusal.message


def test_the_agent_itself_and_its_ancestors(host: Host) -> None:
    for pid in (os.getpid(), os.getppid()):
        refusal = refused(host, pid)
        assert isinstance(refusal, errors.TargetUnsuitable)
        assert "ancestors" in refusal.message


def test_a_process_that_has_ended_but_was_not_reaped(host: Host) -> None:
    popen = host.popen([sys.executable, "-c", ""])
    while proc.stat(popen.pid).state != "Z":
        time.sleep(0.01)
    assert isinstance(refused(host, popen.pid), errors.TargetUnsuitable)


@pytest.mark.parametrize("namespace", ["pid", "mnt"])
def test_a_process_of_another_container(host: Host, namespace: str) -> None:
    flags = {"pid": ["--pid", "--fork"], "mnt": ["--mount"]}[namespace]
    popen = host.popen(["unshare", *flags, "sleep", "1000"])
    own = proc.namespace(os.getpid(), namespace)

    def apart() -> bool:
        return proc.namespace(proc.tree(popen.pid)[-1], namespace) != own

    assert clock.wait_until(apart, clock.Deadline.after(20))
    pid = proc.tree(popen.pid)[-1]
    refusal = refused(host, pid)
    assert isinstance(refusal, errors.TargetUnsuitable)
    assert f"another {namespace} namespace" in refusal.message


def test_a_traced_process_names_its_tracer(host: Host) -> None:
    target = host.start("memory")
    script = (
        "import ctypes,os,time\n"
        f"assert ctypes.CDLL(None).ptrace(0x4206,{target.pid},0,0)==0\n"
        "time.sleep(1000)"
    )
    tracer = host.popen([sys.executable, "-c", script])
    while not proc.status(target.pid).tracer_pid:
        time.sleep(0.01)
    refusal = refused(host, target.pid)
    assert isinstance(refusal, errors.TargetBusy)
    assert str(tracer.pid) in refusal.message
    tracer.kill()
    tracer.wait()
    assert host.dump(target).memory_bytes
    host.assert_running(target)


@pytest.mark.parametrize("way", ["open", "mapped"])
def test_a_process_that_uses_a_gpu_is_refused_unfrozen_with_the_files_named(
    host: Host, way: str
) -> None:
    """In the place of a GPU's file there is one of /dev/zero under such a name."""
    device = Path(f"/dev/nvidia-test-{os.getpid()}")
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    try:
        script = (
            "import mmap,os,sys,time\n"
            f"fd=os.open('{device}',os.O_RDWR)\n"
            + ("area=mmap.mmap(fd,4096,mmap.MAP_PRIVATE);os.close(fd)\n" if way == "mapped" else "")
            + "open(sys.argv[1],'w').close();time.sleep(1000)"
        )
        ready = host.folder / "ready"
        popen = host.popen([sys.executable, "-c", script, str(ready)])
        while not ready.exists():
            assert popen.poll() is None
            time.sleep(0.01)
        refusal = refused(host, popen.pid)
        assert isinstance(refusal, errors.TargetUnsuitable)
        assert str(device) in refusal.message
        assert refusal.facts["devices"] == [str(device)]
        assert "cuda-checkpoint" in refusal.hint
        # The kubelet is not even asked: there is none.
        container = Container("c" * 64, "main", popen.pid, "")
        engine = KubeletEngine(cast("Any", None), "team", "pod-1", [container])
        with pytest.raises(errors.TargetUnsuitable, match="uses a GPU"):
            engine.capture(popen.pid, MemoryImage(), Cut(), CaptureOptions())
    finally:
        device.unlink()


def holder(host: Host, making: str) -> tuple[subprocess.Popen[bytes], int]:
    """A program that has made a descriptor ``fd``, and its number."""
    said = host.folder / "number"
    popen = host.popen(
        [
            *(sys.executable, "-c"),
            f"import ctypes,fcntl,os,struct,sys,time\n{making}\n"
            "with open(sys.argv[1]+'~','w') as file: file.write(str(fd))\n"
            "os.rename(sys.argv[1]+'~',sys.argv[1]);time.sleep(1000)",
            str(said),
        ]
    )
    while not said.exists():
        assert popen.poll() is None
        time.sleep(0.01)
    return popen, int(said.read_text())


@pytest.mark.parametrize("way", ["object", "device"])
def test_a_process_that_uses_userfaultfd_is_refused_unfrozen_by_every_engine(
    host: Host, way: str
) -> None:
    made = (
        "os.open('/dev/userfaultfd',os.O_RDWR)"
        if way == "device"
        else "ctypes.CDLL(None).syscall(323,os.O_CLOEXEC)"
    )
    popen, number = holder(host, f"fd={made}")
    refusal = refused(host, popen.pid)
    assert isinstance(refusal, errors.TargetUnsuitable)
    assert f"uses userfaultfd (descriptor {number})" in refusal.message
    found = plan_dump([popen.pid], ghost_limit_bytes=1 << 20)
    assert any("userfaultfd" in each.reason for each in found.blockers)
    container = Container("c" * 64, "main", popen.pid, "")
    engine = KubeletEngine(cast("Any", None), "team", "pod-1", [container])
    with pytest.raises(errors.TargetUnsuitable, match="uses userfaultfd"):
        engine.capture(popen.pid, MemoryImage(), Cut(), CaptureOptions())


@pytest.mark.parametrize(
    ("flag", "own", "escapes"),
    [
        (0x400, "descriptors", "one of its threads has descriptors of its own"),
        (0x200, "a working directory and umask", ""),
    ],
    ids=["CLONE_FILES", "CLONE_FS"],
)
def test_a_thread_that_shares_less_with_its_process_is_refused_unfrozen_by_every_engine(
    host: Host, flag: int, own: str, escapes: str
) -> None:
    popen, number = holder(
        host,
        "import threading\n"
        "ready=threading.Barrier(3)\n"
        "def run(apart):\n"
        f"    if apart: assert ctypes.CDLL(None).unshare({flag})==0\n"
        "    apart and tids.append(threading.get_native_id());ready.wait();time.sleep(1000)\n"
        "tids=[]\n"
        "for each in (0,1): threading.Thread(target=run,args=(each,)).start()\n"
        "ready.wait();(fd,)=tids",
    )
    refusal = refused(host, popen.pid)
    assert isinstance(refusal, errors.TargetUnsuitable)
    assert f"thread {number} of process {popen.pid}" in refusal.message
    found = plan_dump([popen.pid], ghost_limit_bytes=1 << 20)
    assert [each.code for each in found.blockers] == ["threads-apart"]
    assert f"thread {number} has {own} of its own" in found.blockers[0].reason
    assert areas.escapes(popen.pid).reason == escapes
    container = Container("c" * 64, "main", popen.pid, "")
    engine = KubeletEngine(cast("Any", None), "team", "pod-1", [container])
    with pytest.raises(errors.TargetUnsuitable, match=f"{own} of its own"):
        engine.capture(popen.pid, MemoryImage(), Cut(), CaptureOptions())


def test_a_thread_that_is_ending_is_not_taken_for_one_with_descriptors_of_its_own(
    host: Host,
) -> None:
    popen, number = holder(
        host,
        "import threading\n"
        "started=threading.Event()\n"
        "def run():\n"
        "    started.set()\n"
        "    while not os.path.exists(sys.argv[1]+'.end'): time.sleep(0.01)\n"
        "thread=threading.Thread(target=run);thread.start();started.wait();fd=thread.native_id",
    )
    ptrace.call(ptrace.SEIZE, number)  # its number stays until it is waited for
    (host.folder / "number.end").touch()

    def has_ended() -> bool:
        return proc.thread_stat(popen.pid, number).state == "Z"

    try:
        assert clock.wait_until(has_ended, clock.Deadline.after(20.0))
        assert number in proc.threads(popen.pid)
        preflight.refuse_apart(popen.pid)
        assert not areas.escapes(popen.pid).reason
    finally:
        os.waitpid(number, ptrace.WALL)


_HANDED_OUT = """
import array, mmap, socket
size = 32 << 20
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
at = libc.mmap(None, size, 3, 0x22, -1, 0)
other = ctypes.cast(libc.mmap(None, size, 3, 0x22, -1, 0), ctypes.POINTER(ctypes.c_char))
for page in range(0, size, 4096): other[page] = b"x"
fd = libc.syscall(323, os.O_CLOEXEC)
fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("QQQQ", at, size, 1, 0)))
away = socket.socket(socket.AF_UNIX)
away.connect(sys.argv[1] + ".socket")
socket.send_fds(away, [b"."], [fd])
os.close(fd); away.close()
"""


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("precopy", [False, True])
def test_a_process_whose_memory_another_one_fills_is_refused_unfrozen(
    host: Host, precopy: bool, kill: bool
) -> None:
    options = CaptureOptions(precopy=precopy, kill=kill)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(host.folder / "number.socket"))
        server.listen()
        popen, _ = holder(host, _HANDED_OUT)
        filler, _ = server.accept()
        _, (descriptor,), _, _ = socket.recv_fds(filler, 1, 1)
        filler.close()
    try:
        preflight.refuse_userfaultfds(popen.pid)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(errors.TargetUnsuitable, match="is filled by another process"):
            host.capture(popen.pid, MemoryImage(), options=options)
        assert os.listdir("/proc/self/fd") == before
    finally:
        os.close(descriptor)
    # Nobody does any more.
    host.capture(popen.pid, MemoryImage(), options=CaptureOptions(precopy=precopy))
    assert popen.poll() is None
    host.assert_clean()


@pytest.mark.parametrize("who", ["root", "child"])
def test_a_process_without_its_main_thread_is_refused_unfrozen(host: Host, who: str) -> None:
    popen, number = holder(
        host,
        "import signal,threading\n"
        "signal.signal(signal.SIGUSR1,lambda *_:ctypes.CDLL(None).syscall(60,0))\n"
        f"fd=os.{'getpid' if who == 'root' else 'fork'}()\n"
        "if fd in (0,os.getpid()): threading.Thread(target=time.sleep,args=(1000,)).start()\n"
        "if not fd: time.sleep(1000)",
    )
    deadline = clock.Deadline.after(20)
    assert clock.wait_until(lambda: proc.stat(number).threads == 2, deadline)
    os.kill(number, signal.SIGUSR1)
    assert clock.wait_until(lambda: proc.stat(number).state == "Z", deadline)
    refusal = refused(host, popen.pid)
    assert isinstance(refusal, errors.TargetUnsuitable)
    assert f"the main thread of process {number}" in refusal.message


def test_what_a_dump_puts_into_a_process_for_an_instant_is_no_use_of_userfaultfd(
    host: Host,
) -> None:
    popen, _ = holder(
        host,
        "fd=ctypes.CDLL(None).syscall(323,os.O_CLOEXEC)\n"
        "fcntl.ioctl(fd,0xC018AA3F,bytearray(struct.pack('QQQ',0xAA,1<<15|1<<13|4,0)))",
    )
    preflight.refuse_userfaultfds(popen.pid)


def in_child(before: Callable[[], None], act: Callable[[], object]) -> str:
    """Run both in a forked child; return the name and message of what ``act`` raised."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            before()
            act()
            said = "nothing"
        except errors.CkptError as exc:
            said = f"{type(exc).__name__}: {exc} / {exc.hint}"
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        return file.read()


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def drop_net_admin() -> None:
    # struct __user_cap_header_struct and two __user_cap_data_struct; version 3.
    header = struct.pack("<Ii", 0x20080522, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("<6I", data.raw))
    words[0] &= ~(1 << 12)
    assert libc.capset(header, struct.pack("<6I", *words)) == 0


@pytest.mark.parametrize(
    ("before", "says"),
    [(become_nobody, "this needs root"), (drop_net_admin, "root lacks CAP_NET_ADMIN")],
)
def test_missing_privileges(host: Host, before: Callable[[], None], says: str) -> None:
    target = host.start("memory")
    image = host.dump(target)
    dumping = in_child(before, lambda: host.capture(target.pid, MemoryImage()))
    restoring = in_child(
        before, lambda: host.engine.restore(MemorySource(image), RestoreOptions(), Gate())
    )
    assert dumping.startswith(f"PrivilegeMissing: {says}")
    assert restoring.startswith(f"PrivilegeMissing: {says}")
    host.assert_running(target)
    host.assert_clean()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'Version: 4.1'", "CRIU 4.1 at {path} is too old"),
        ("echo 'Version: 4.3'", "CRIU 4.3 at {path} is newer than this program knows"),
        ("echo 'Version: 4.2'", "{path} does not answer"),
        ("exit 1", "{path} does not tell its version"),
        (None, "there is no program {path}"),
    ],
)
def test_criu_missing_too_old_or_too_new(
    host: Host, tmp_path: Path, script: str | None, says: str
) -> None:
    path = tmp_path / "other-criu"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    target = host.start("memory")
    engine = CriuEngine(str(path), work_dir=str(host.work), runtime_dir=str(host.runtime))
    with pytest.raises(errors.CriuMissing) as refusal:
        engine.capture(target.pid, MemoryImage(), Cut(), CaptureOptions())
    assert says.format(path=path) in refusal.value.message
    assert refusal.value.hint
    host.assert_running(target)
    host.assert_clean()


def test_a_runtime_directory_of_somebody_else(host: Host) -> None:
    target = host.start("memory")
    host.runtime.mkdir()
    os.chown(host.runtime, 65534, 65534)
    with pytest.raises(errors.PrivilegeMissing, match="does not belong to this user alone"):
        host.dump(target)
    host.assert_running(target)


def test_what_criu_cannot_dump_is_named_with_its_log(host: Host) -> None:
    """System V shared memory needs an IPC namespace of its own."""
    target = host.start("sysv_shm")
    with pytest.raises(errors.CriuFailed) as failure:
        host.dump(target)
    assert failure.value.facts["log_tail"]
    assert "Error (" in failure.value.message
    assert "IPC namespace" in failure.value.hint
    host.assert_running(target)
    host.assert_clean()


@pytest.mark.parametrize("ahead", [False, True])
def test_sysv_shared_memory_in_an_ipc_namespace_of_its_own(host: Host, *, ahead: bool) -> None:
    target = host.start("memory", "sysv_shm", under=("unshare", "--ipc"), MEMORY_MIB="48")
    image = host.dump(target, options=CaptureOptions(precopy=ahead))
    assert image.facts()["stop"].get("shared_objects", 0) == ahead
    host.assert_running(target)
    host.kill(target)
    tree = host.restore(image)
    target.check(tree.pid)
    host.assert_clean()


def test_a_unix_socket_to_a_process_outside_is_named(host: Host) -> None:
    script = "import socket,time;a=socket.socket(fileno=0);time.sleep(1000)"
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        popen = subprocess.Popen(
            [sys.executable, "-c", script], stdin=theirs.fileno(), start_new_session=True
        )
        host.popens.append(popen)
        time.sleep(0.3)
        with pytest.raises(errors.CriuFailed) as failure:
            host.capture(popen.pid, MemoryImage())
        assert "outside the tree" in failure.value.hint
        assert proc.status(popen.pid).tracer_pid == 0
    host.assert_clean()


@pytest.fixture
def freezer() -> Iterator[Path]:
    """A control group of version 2, where a frozen process obeys ptrace and yet does not run."""
    for directory in cgroups.directories(os.getpid()):
        if (Path(directory) / "cgroup.controllers").exists():
            group = Path(directory) / f"ckpt-test-{secrets.token_hex(4)}"
            break
    else:
        pytest.skip(f"{NOT_TO_BE_HAD}control groups of version 2")
    group.mkdir()
    try:
        yield group
    finally:
        for pid in cgroups.members(str(group)):
            (group.parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def _frozen(group: Path, *, yes: bool) -> None:
    (group / "cgroup.freeze").write_text(str(int(yes)))
    deadline = clock.Deadline.after(10)
    assert clock.wait_until(lambda: cgroups.frozen([str(group)]) is yes, deadline)


def test_a_tree_that_is_frozen_is_refused_and_goes_on_with_who_thaws_it(
    host: Host, freezer: Path
) -> None:
    """CRIU would wait for its processes until it is killed, and they would be lost."""
    target = host.start("memory")
    (freezer / "cgroup.procs").write_text(str(target.pid))
    _frozen(freezer, yes=True)
    try:
        refusal = refused(host, target.pid)
    finally:
        _frozen(freezer, yes=False)
    assert isinstance(refusal, errors.TargetBusy)
    assert "frozen" in refusal.message
    assert host.dump(target).memory_bytes
    host.assert_running(target)


def test_who_is_frozen_while_a_call_is_put_into_it_is_as_before(host: Host, freezer: Path) -> None:
    target = host.start("memory")
    (freezer / "cgroup.procs").write_text(str(target.pid))
    _frozen(freezer, yes=True)
    try:
        with pytest.raises(injection.InjectionRefused, match="does not run"):
            injection.userfaultfd(proc.identity(target.pid))
    finally:
        _frozen(freezer, yes=False)
    host.assert_running(target)
    assert host.dump(target).memory_bytes
