"""What a plan finds in the way of a dump, and what it estimates."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from agent import errors
from agent.model.plan import (
    Connection,
    Descriptor,
    Observer,
    Plan,
    Process,
    Rates,
    Written,
    decide,
    measured,
)
from agent.node.plan import plan_dump

_SPACES = {"pid": 1, "mnt": 2, "net": 3}
_CAPABILITIES = frozenset(("CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_NET_ADMIN"))
_OBSERVER = Observer(pid=900, ancestors=(800, 1), namespaces=_SPACES, capabilities=_CAPABILITIES)
_PROCESS = Process(
    pid=10,
    parent=1,
    program="job",
    state="S",
    threads=1,
    session=10,
    anonymous_bytes=1_000_000,
    shared_bytes=200_000,
    file_bytes=5_000_000,
    swapped_bytes=30_000,
    namespaces=_SPACES,
)


def planned(
    *descriptors: Descriptor,
    sockets: tuple[Connection, ...] = (),
    observer: Observer = _OBSERVER,
    **changes: object,
) -> Plan:
    process = dataclasses.replace(_PROCESS, descriptors=descriptors, **changes)  # type: ignore[arg-type]
    return decide([10], [process], sockets, observer, ghost_limit_bytes=1 << 20)


def codes(plan: Plan) -> list[str]:
    return [finding.code for finding in plan.blockers]


def test_an_ordinary_process_has_nothing_in_its_way() -> None:
    files = (
        Descriptor(0, "/dev/null", device=(1, 3)),
        Descriptor(1, "socket:[9]", socket=9, protocol="TCPv6"),
        Descriptor(2, "/var/log/job", writable=True, regular=True, size_bytes=7),
        Descriptor(3, "pipe:[123]"),
        Descriptor(8, "/dev/pts/3", device=(136, 3)),
        Descriptor(4, "anon_inode:[eventpoll]"),
        Descriptor(5, "anon_inode:inotify"),
    )
    plan = planned(*files, mappings=("/usr/lib/libc.so.6", "[heap]", "/dev/shm/x", "/dev/zero"))
    assert plan.blockers == ()
    assert plan.warnings == ()


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        (planned(kernel_thread=True), "kernel-thread"),
        (planned(state="Z", namespaces={}), "exited"),
        (planned(tracer=77), "traced"),
        (planned(pid=900), "own-ancestor"),
        (planned(pid=800), "own-ancestor"),
        (planned(namespaces=_SPACES | {"pid": 9}), "other-container"),
        (planned(namespaces=_SPACES | {"mnt": 9}), "other-container"),
        (planned(mappings=("/dev/nvidia0",)), "gpu"),
        (planned(mappings=("/dev/vfio/7",)), "device"),
        (planned(mappings=("anon_inode:[io_uring]",)), "device"),
        (planned(mappings=("/SYSV0052e2c1",)), "sysv-shared-memory"),
        (planned(Descriptor(3, "anon_inode:[io_uring]")), "io-uring"),
        (planned(Descriptor(3, "anon_inode:[perf_event]")), "kernel-object"),
        (planned(Descriptor(3, "anon_inode:kvm-vcpu:0")), "kernel-object"),
        (planned(Descriptor(3, "/dev/nvidia0", device=(195, 0))), "gpu"),
        (planned(Descriptor(3, "/dev/sda", device=(8, 0))), "device"),
        (planned(Descriptor(3, "/dev/net/tun", device=(10, 200))), "device"),
        (planned(Descriptor(3, "socket:[9]", socket=9, protocol="MPTCP")), "socket-protocol"),
        (planned(Descriptor(3, "socket:[9]", socket=9, protocol="AF_VSOCK")), "socket-protocol"),
        (
            planned(Descriptor(3, "/t (deleted)", regular=True, unlinked=True, size_bytes=2 << 20)),
            "unlinked-too-large",
        ),
    ],
)
def test_what_a_dump_cannot_do_is_named_with_subject_reason_and_way_out(
    plan: Plan, code: str
) -> None:
    assert codes(plan) == [code]
    (finding,) = plan.blockers
    assert str(plan.processes[0].pid) in finding.subject
    assert finding.reason
    assert finding.cure


def test_a_zombie_below_the_root_is_no_blocker() -> None:
    zombie = dataclasses.replace(_PROCESS, pid=11, parent=10, state="Z", namespaces={})
    plan = decide([10], [_PROCESS, zombie], (), _OBSERVER, ghost_limit_bytes=1)
    assert plan.blockers == ()


@pytest.mark.parametrize("missing", sorted(_CAPABILITIES))
def test_each_missing_capability_is_named(missing: str) -> None:
    observer = dataclasses.replace(_OBSERVER, capabilities=_CAPABILITIES - {missing})
    assert [finding.subject for finding in planned(observer=observer).blockers] == [missing]


def unix(inode: int, peer: int | None, kind: str = "unix-stream") -> Connection:
    return Connection(inode, kind, "established", "", "", peer)


def test_a_stream_socket_to_somebody_outside_of_the_tree_is_a_blocker() -> None:
    assert codes(planned(sockets=(unix(1, 2), unix(2, 1)))) == []
    assert codes(planned(sockets=(unix(1, 2),))) == ["external-unix-socket"]
    assert codes(planned(sockets=(unix(1, 2, "unix-seqpacket"),))) == ["external-unix-socket"]


def test_datagrams_listeners_and_unknown_peers_are_no_blockers() -> None:
    assert codes(planned(sockets=(unix(1, 2, "unix-dgram"), unix(3, 0), unix(4, None)))) == []


def test_only_connections_that_leave_the_tree_are_warned_of() -> None:
    inside = (
        Connection(1, "tcp", "established", "127.0.0.1:1", "127.0.0.1:2", None),
        Connection(2, "tcp", "established", "127.0.0.1:2", "127.0.0.1:1", None),
        Connection(3, "tcp", "listen", "0.0.0.0:9", "0.0.0.0:0", None),
    )
    outside = Connection(4, "tcp6", "established", "[::1]:1", "[2001:db8::1]:443", None)
    assert planned(sockets=inside).warnings == ()
    (warning,) = planned(sockets=(*inside, outside)).warnings
    assert warning.code == "outward-connection"
    assert "2001:db8::1" in warning.subject


@pytest.mark.parametrize(
    "outside",
    [
        Descriptor(1, "pipe:[5]", writable=True),
        Descriptor(1, "/dev/pts/3", writable=True, device=(136, 3)),
    ],
)
def test_a_stream_whose_other_end_is_outside_is_warned_of(outside: Descriptor) -> None:
    (warning,) = planned(outside).warnings
    assert warning.code == "outside-stream"
    assert "--stdout" in warning.cure


def test_a_pipe_between_processes_of_the_tree_is_not_warned_of() -> None:
    ends = (Descriptor(1, "pipe:[5]", writable=True), Descriptor(0, "pipe:[5]"))
    assert planned(*ends).warnings == ()


@pytest.mark.parametrize(("state", "code"), [("T", "stopped"), ("D", "uninterruptible")])
def test_a_process_that_stands_or_hangs_is_warned_of(state: str, code: str) -> None:
    assert [finding.code for finding in planned(state=state).warnings] == [code]


def test_what_no_file_holds_is_captured_and_the_stop_follows_from_the_named_rates() -> None:
    travels = Descriptor(3, "/out", writable=True, regular=True, size_bytes=70_000)
    stays = Descriptor(4, "/data", regular=True, size_bytes=1 << 40)
    rates = Rates(capture_bytes_per_s=1e6, fixed_s=0.5, process_s=0.25)
    process = dataclasses.replace(_PROCESS, descriptors=(travels, stays))
    plan = decide([10], [process], (), _OBSERVER, ghost_limit_bytes=1, rates=rates)
    assert plan.raw_bytes == 1_000_000 + 200_000 + 30_000 + 70_000
    assert plan.stop_s == pytest.approx(0.5 + 0.25 + 1.3)
    assert [(file.path, file.travels) for file in plan.files] == [("/out", True), ("/data", False)]


def test_a_file_that_several_processes_hold_travels_once() -> None:
    held = Descriptor(3, "/out", writable=True, regular=True, size_bytes=70_000)
    two = [dataclasses.replace(_PROCESS, pid=pid, descriptors=(held,)) for pid in (10, 11)]
    assert len(decide([10], two, (), _OBSERVER, ghost_limit_bytes=1).files) == 1


_JOB = """
import socket, sys, tempfile, time
held = tempfile.TemporaryFile(); held.write(b"x" * 4321); held.flush()
a, b = socket.socketpair()
server = socket.create_server(("127.0.0.1", 0))
memory = bytearray(b"y" * (8 << 20))
print("ready", flush=True)
time.sleep(100)
"""


@pytest.fixture
def job() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", _JOB],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


def test_a_real_process_is_read_without_being_stopped(job: subprocess.Popen[bytes]) -> None:
    plan = plan_dump([job.pid], ghost_limit_bytes=1 << 20)
    (process,) = plan.processes
    assert process.pid == job.pid
    assert process.anonymous_bytes > 8 << 20
    assert {s.kind for s in plan.sockets} == {"unix-stream", "tcp"}
    assert any(file.kind == "unlinked" and file.size_bytes == 4321 for file in plan.files)
    assert not {"own-ancestor", "external-unix-socket"} & set(codes(plan))
    os.kill(job.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, job.pid, os.WSTOPPED)
    warned = [found.code for found in plan_dump([job.pid], ghost_limit_bytes=1 << 20).warnings]
    # Its standard output is a pipe to this test.
    assert warned == ["outside-stream", "stopped"]


def test_one_end_of_a_socket_pair_kept_outside_is_seen() -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        subprocess.Popen(
            ["/bin/sleep", "100"], pass_fds=[theirs.fileno()], start_new_session=True
        ) as child,
    ):
        theirs.close()
        try:
            found = codes(plan_dump([child.pid], ghost_limit_bytes=1))
        finally:
            child.kill()
    assert "external-unix-socket" in found


def test_looking_at_ourselves_says_that_a_dump_would_stop_the_agent() -> None:
    assert "own-ancestor" in codes(plan_dump([os.getpid()], ghost_limit_bytes=1))


def test_a_process_that_does_not_run_is_not_found() -> None:
    with tempfile.TemporaryFile(), subprocess.Popen(["/bin/true"]) as ended:
        ended.wait()
    with pytest.raises(errors.NotFound):
        plan_dump([ended.pid], ghost_limit_bytes=1)


def test_a_gpu_is_one_blocker_a_process_with_all_its_files_and_no_other_device_is_hidden() -> None:
    plan = planned(
        Descriptor(3, "/dev/nvidiactl", device=(195, 255)),
        Descriptor(4, "/dev/nvidia0", device=(195, 0)),
        Descriptor(5, "/dev/net/tun", device=(10, 200)),
        mappings=("/dev/nvidia-uvm", "/dev/nvidia0", "/dev/vfio/7"),
    )
    assert codes(plan) == ["gpu", "device", "device"]
    assert "(/dev/nvidia-uvm, /dev/nvidia0, /dev/nvidiactl)" in plan.blockers[0].reason
    assert "cuda-checkpoint" in plan.blockers[0].cure


def test_what_is_written_last_makes_the_stop_where_memory_is_copied_ahead() -> None:
    rates = Rates(
        capture_bytes_per_s=1000.0, fixed_s=0.5, process_s=0.25, held_bytes_per_s=10_000.0
    )
    process = dataclasses.replace(
        _PROCESS, anonymous_bytes=9000, shared_bytes=1000, swapped_bytes=0
    )
    found = decide([10], [process], (), _OBSERVER, ghost_limit_bytes=1 << 20, rates=rates)
    assert found.stop_s == pytest.approx(0.75 + 10)
    written = Written(8000, 500, look_bytes=2000, span_bytes=5000, span_s=1.0)
    # 1500 bytes go through CRIU, 2000 and 500 are read beside it.
    assert measured(found, written).stop_s == pytest.approx(0.75 + 1.5 + 0.25)
    everything = Written(0, 100_000, look_bytes=0, span_bytes=0, span_s=1.0)
    assert measured(found, everything).stop_s == pytest.approx(10.75)
