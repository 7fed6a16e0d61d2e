"""What a plan says about the objects a process holds is what the real CRIU then does."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import NOT_TO_BE_HAD

_HOLD = """
import ctypes, os, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
try:
    {body}
except OSError as exc:
    print(exc, flush=True)
    sys.exit()
print("held", flush=True)
time.sleep(1000)
"""

# System calls by number: io_uring_setup has one everywhere, bpf two.
_BLOCKING = {
    "io-uring": "call(425, 8, (ctypes.c_char * 120)())",
    "kernel-object": "call(280 if os.uname().machine == 'aarch64' else 321, 0,"
    " ctypes.create_string_buffer(struct.pack('=IIIII', 2, 4, 8, 4, 0), 72), 72)",
    "device": "held = os.open('/dev/net/tun', os.O_RDWR)",
    "socket-protocol": "held = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)",
    "sysv-shared-memory": "libc.shmat.restype = ctypes.c_void_p;"
    " key = libc.shmget(0, 4096, 0o1600); libc.shmat(key, None, 0); libc.shmctl(key, 0, None)",
}
_HARMLESS = {
    "inotify": "held = libc.inotify_init1(0)",
    "pidfd": "held = os.pidfd_open(os.getpid())",
    "memfd": "held = os.memfd_create('x')",
    "netlink": "held = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); held.bind((0, 0))",
    "udp": "held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "listener": "held = socket.create_server(('127.0.0.1', 0))",
    "unlinked": "import tempfile; held = tempfile.TemporaryFile(); held.write(b'x' * 9999)",
}


@contextlib.contextmanager
def holding(body: str, **more: Any) -> Iterator[int]:
    """A process that holds what ``body`` makes; skips where this kernel has no such thing."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD.format(body=body)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **more,
    ) as process:
        assert process.stdout
        said = process.stdout.readline().decode().strip()
        try:
            if said != "held":
                pytest.skip(f"{NOT_TO_BE_HAD}this kernel does not offer it: {said}")
            yield process.pid
            assert process.poll() is None
        finally:
            process.kill()


def agent(folder: pathlib.Path, verb: str, pid: int) -> subprocess.CompletedProcess[str]:
    program = os.path.join(os.path.dirname(sys.executable), "ckpt-agent")
    places = ["--store", str(folder / "store"), "--work-dir", str(folder / "work")]
    return subprocess.run(
        [program, verb, "--pid", str(pid), *places, "-o", "json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def blockers(ran: subprocess.CompletedProcess[str]) -> list[str]:
    return [finding["code"] for finding in json.loads(ran.stdout)["blockers"]]


@pytest.mark.parametrize("code", _BLOCKING)
def test_what_the_plan_calls_a_blocker_criu_refuses_and_the_job_runs_on(
    tmp_path: pathlib.Path, code: str
) -> None:
    with holding(_BLOCKING[code]) as pid:
        plan = agent(tmp_path, "plan", pid)
        assert (plan.returncode, blockers(plan)) == (3, [code])
        assert agent(tmp_path, "dump", pid).returncode in (3, 4)


@pytest.mark.parametrize("kind", _HARMLESS)
def test_what_the_plan_lets_pass_criu_captures(tmp_path: pathlib.Path, kind: str) -> None:
    with holding(_HARMLESS[kind]) as pid:
        plan = agent(tmp_path, "plan", pid)
        assert (plan.returncode, blockers(plan)) == (0, [])
        dump = agent(tmp_path, "dump", pid)
        assert dump.returncode == 0, dump.stderr


def test_a_stream_socket_shared_with_this_test_is_in_the_way_of_both(
    tmp_path: pathlib.Path,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, holding("pass", pass_fds=[theirs.fileno()]) as pid:
        theirs.close()
        plan = agent(tmp_path, "plan", pid)
        assert (plan.returncode, blockers(plan)) == (3, ["external-unix-socket"])
        assert agent(tmp_path, "dump", pid).returncode in (3, 4)
