"""Processes, programs and time as the rest of the agent sees them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent import errors
from agent.host import clock, proc, subprocesses


def test_this_process_is_described_as_it_is() -> None:
    me = os.getpid()
    now = proc.stat(me)
    assert (now.pid, now.ppid, now.session) == (me, os.getppid(), os.getsid(0))
    assert not now.kernel_thread
    assert proc.status(me).uid == os.getuid()
    assert proc.status(me).ns_pids[-1] == me
    assert proc.alive(proc.identity(me))
    assert os.path.realpath(sys.executable) == proc.exe(me)
    assert proc.cwd(me) == os.getcwd()
    assert os.getppid() in proc.ancestors(me)
    assert proc.resident(me).anon > 1 << 20
    assert proc.namespaces(me)["pid"] == os.stat("/proc/self/ns/pid").st_ino
    assert any("x" in each.perms and each.path for each in proc.maps(me))


def test_a_name_with_brackets_and_spaces_is_read_whole(tmp_path: Path) -> None:
    program = tmp_path / "a) R (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "100"]) as popen:
        deadline = time.monotonic() + 5
        while proc.stat(popen.pid).comm != "a) R (b":
            assert time.monotonic() < deadline
        assert proc.stat(popen.pid).ppid == os.getpid()
        popen.kill()


def test_open_files_show_position_flags_and_unlinked_ones(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.write(fd, b"12345")
        found = {each.number: each for each in proc.open_files(os.getpid())}[fd]
        assert (found.link, found.position, found.size_bytes) == (str(path), 5, 5)
        assert found.writable
        path.unlink()
        after = {each.number: each for each in proc.open_files(os.getpid())}[fd]
        assert (after.link, after.nlink) == (f"{path} (deleted)", 0)
    finally:
        os.close(fd)
    assert fd not in {each.number for each in proc.open_files(os.getpid())}


def test_a_vanished_process_is_not_found_by_any_question() -> None:
    with subprocess.Popen(["/bin/true"]) as popen:
        who = proc.identity(popen.pid)
    assert not proc.alive(who)
    for question in (
        *(proc.stat, proc.status, proc.threads, proc.children, proc.tree, proc.maps),
        *(proc.open_files, proc.cwd, proc.root, proc.exe, proc.resident),
        proc.namespaces,
    ):
        with pytest.raises(errors.NotFound):
            question(popen.pid)


def test_a_zombie_is_there_but_not_alive_and_has_nothing() -> None:
    with subprocess.Popen(["/bin/true"]) as popen:
        while proc.stat(popen.pid).state != "Z":
            time.sleep(0.01)
        assert not proc.alive(proc.identity(popen.pid))
        assert proc.exists(popen.pid)
        assert proc.maps(popen.pid) == []
        assert proc.open_files(popen.pid) == []
        assert proc.cwd(popen.pid) == ""
        assert proc.resident(popen.pid).anon == 0


def test_a_tree_lists_every_process_after_its_parent() -> None:
    script = "import os,time\nos.fork()\nos.fork()\ntime.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as popen:
        deadline = time.monotonic() + 30
        while len(proc.tree(popen.pid)) < 4:
            assert time.monotonic() < deadline
        tree = proc.tree(popen.pid)
        for pid in tree[1:]:
            assert tree.index(proc.stat(pid).ppid) < tree.index(pid)
        os.killpg(popen.pid, signal.SIGKILL)


def test_a_child_keeps_only_the_descriptors_it_was_given(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    script = f"import os;os.write({writer},' '.join(os.listdir('/proc/self/fd')).encode())"
    child = subprocesses.start([sys.executable, "-c", script], pass_fds=[writer])
    os.close(writer)
    assert child.wait(clock.Deadline.after(10)) == 0
    numbers = set(map(int, os.read(reader, 100).split()))
    os.close(reader)
    assert {0, 1, 2, writer} <= numbers
    assert reader not in numbers


def test_a_child_has_its_own_session_and_no_environment_of_ours() -> None:
    os.environ["CKPT_TEST_SECRET"] = "x"
    script = "import os;print(os.getsid(0)==os.getpid(), 'CKPT_TEST_SECRET' in os.environ)"
    done = subprocesses.run([sys.executable, "-c", script], timeout_s=10)
    assert (done.status, done.stdout) == (0, b"True False\n")
    del os.environ["CKPT_TEST_SECRET"]


def test_a_program_that_is_not_there_or_takes_too_long() -> None:
    with pytest.raises(errors.NotFound, match="/nonexistent"):
        subprocesses.run(["/nonexistent"], timeout_s=1)
    with pytest.raises(errors.NotFound):
        subprocesses.start(["/nonexistent"])
    with pytest.raises(errors.DeadlineExceeded):
        subprocesses.run(["/bin/sleep", "100"], timeout_s=0.1)


def test_leaving_the_context_ends_and_reaps_a_child() -> None:
    with subprocesses.running(["/bin/sleep", "100"]) as child:
        assert child.poll() is None
        assert not child.ended(clock.Deadline.after(0))
        with pytest.raises(errors.DeadlineExceeded):
            child.wait(clock.Deadline.after(0.05))
    assert not proc.exists(child.pid)


def test_a_child_that_does_not_stop_when_asked_is_killed() -> None:
    script = (
        "import signal,time;signal.signal(15,signal.SIG_IGN);print(1,flush=True);time.sleep(99)"
    )
    reader, writer = os.pipe()
    child = subprocesses.start([sys.executable, "-c", script], stdout=writer)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    assert child.stop(grace_s=0.1) == 128 + signal.SIGKILL


def test_what_a_dead_child_left_in_its_session_is_killed_before_it_is_reaped() -> None:
    script = "import os,time\nif os.fork()==0: time.sleep(100)\nos._exit(3)"
    child = subprocesses.start([sys.executable, "-c", script])
    assert child.ended(clock.Deadline.after(10))
    assert not child.reaped
    (left,) = child.kill_session()

    def gone() -> bool:
        try:
            return proc.stat(left).state == "Z"
        except errors.NotFound:
            return True

    assert clock.wait_until(gone, clock.Deadline.after(30))
    assert child.wait(clock.Deadline.after(30)) == 3
    assert child.kill_session() == []


def test_a_deadline_is_shared_and_never_negative() -> None:
    long = clock.Deadline.after(100)
    assert 99 < long.remaining_s <= 100
    assert long.sooner(1).remaining_s <= 1
    past = clock.Deadline.after(-1)
    assert past.remaining_s == 0
    assert past.expired
    with pytest.raises(errors.DeadlineExceeded, match="the step"):
        past.check("the step")
    assert not clock.wait_until(lambda: False, past)
    assert clock.wait_until(lambda: True, past)
