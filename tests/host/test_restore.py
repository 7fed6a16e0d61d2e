"""Restores: refused with every reason before a process is started, or whole, or undone."""

from __future__ import annotations

import contextlib
import os
import pickle
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, Disposition, FilePolicy, RestoreOptions
from agent.engines.criu import conflicts, pour
from agent.host import proc, system
from tests.host.conftest import Cut, Gate, Host, Target
from tests.host.image import MemoryImage, MemorySource
from tests.host.test_faults import FEATURES, at_stage, criu_pid, kill_criu


def reasons(refusal: pytest.ExceptionInfo[errors.RestoreConflict]) -> list[str]:
    found = refusal.value.facts["reasons"]
    assert isinstance(found, list)
    return found


def assert_nothing_started(host: Host, image: MemoryImage, target: Target) -> None:
    """No process of the image runs, nothing is left, and a restore without the fault works."""
    for number in conflicts.numbers(image.facts()):
        assert not proc.exists(number)
    host.assert_clean()
    tree = host.restore(image)
    target.check(tree.pid)


def test_the_exit_status_of_the_restored_root_is_the_callers(host: Host) -> None:
    for isolate in (False, True):
        target = host.start("memory", "children")
        image = host.dump(target)
        host.kill(target)
        tree = host.restore(image, RestoreOptions(isolate=isolate))
        with pytest.raises(errors.DeadlineExceeded):
            tree.wait(0.1)
        tree.signal(signal.SIGTERM)
        assert tree.wait(10) == 7
        assert tree.wait(0) == 7
        tree.signal(signal.SIGTERM)


def test_a_root_ended_by_a_signal_gives_128_and_its_number(host: Host) -> None:
    for isolate in (False, True):
        target = host.start("memory")
        image = host.dump(target)
        host.kill(target)
        tree = host.restore(image, RestoreOptions(isolate=isolate))
        tree.signal(signal.SIGKILL)
        assert tree.wait(10) == 128 + signal.SIGKILL


def test_killing_a_tree_leaves_none_of_it(host: Host) -> None:
    for isolate in (False, True):
        target = host.start("children", "threads", "sessions", "stopped")
        image = host.dump(target)
        host.kill(target)
        tree = host.restore(image, RestoreOptions(isolate=isolate))
        pids = proc.tree(tree.pid)
        assert len(pids) > 3
        tree.kill()
        assert [pid for pid in pids if proc.exists(pid) and proc.stat(pid).state != "Z"] == []
        assert tree.wait(0) == 128 + signal.SIGKILL


def test_the_same_image_restored_twice_in_place_is_refused(host: Host) -> None:
    target = host.start(*FEATURES)
    image = host.dump(target)
    host.kill(target)
    host.restore(image)
    with pytest.raises(errors.RestoreConflict) as refusal:
        host.restore(image)
    used = [reason for reason in reasons(refusal) if "in use" in reason]
    assert len(used) == len(conflicts.numbers(image.facts()))
    target.check()
    host.assert_clean()


def test_the_same_image_restored_twice_isolated_gives_two_trees(host: Host) -> None:
    target = host.start("memory", "threads", "children", "shared_memory")
    image = host.dump(target)
    # Even beside the original.
    trees = [host.restore(image, RestoreOptions(isolate=True)) for _ in range(2)]
    for pid in (target.pid, *(tree.pid for tree in trees)):
        target.check(pid)
    assert proc.namespaces(trees[0].pid)["pid"] != proc.namespaces(trees[1].pid)["pid"]
    host.assert_clean()


def test_every_reason_is_listed_at_once(host: Host, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.write_bytes(b"x" * 10000)
    gone = tmp_path / "gone"
    gone.mkdir()
    script = (
        "import mmap,os,signal,sys,socket,time;"
        f"a=open({str(library)!r},'rb');m=mmap.mmap(a.fileno(),0,prot=1,flags=2);"
        f"s=socket.create_server(('127.0.0.1',0));os.chdir({str(gone)!r});"
        f"open({str(tmp_path / 'port')!r},'w').write(str(s.getsockname()[1]));"
        "time.sleep(1000)"
    )
    popen = host.popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 10
    while not (tmp_path / "port").exists() or not (tmp_path / "port").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    image = MemoryImage()
    host.capture(popen.pid, image)
    popen.kill()
    popen.wait()
    port = int((tmp_path / "port").read_text())
    library.write_bytes(b"y" * 10001)
    gone.rmdir()

    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(errors.RestoreConflict) as refusal,
    ):
        host.restore(image)
    text = "\n".join(reasons(refusal))
    assert f"{library} has 10001 bytes, 10000 at the dump" in text
    assert f"the directory {gone} is missing" in text
    assert f"127.0.0.1:{port} is being listened on" in text
    assert len(reasons(refusal)) == 3
    assert not proc.exists(popen.pid)
    host.assert_clean()


_LOCKING = """
import fcntl, os, sys, time
file = open(sys.argv[1], "r+")
if sys.argv[2] == "flock": fcntl.flock(file, fcntl.LOCK_EX)
else: fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)
open(sys.argv[3], "w").close()
time.sleep(1000)
"""


@pytest.mark.parametrize("kind", ["flock", "posix"])
def test_a_lock_that_somebody_else_holds_now_is_named_and_not_waited_for(
    host: Host, tmp_path: Path, kind: str
) -> None:
    locked = tmp_path / "locked"
    locked.touch()

    def locking(ready: str) -> int:
        path = tmp_path / ready
        argv = [sys.executable, "-c", _LOCKING, str(locked), kind, str(path)]
        popen = host.popen(argv)
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline, "it does not lock"
            time.sleep(0.01)
        return popen.pid

    target = Target(tmp_path, locking("first"))
    image = host.dump(target)
    host.kill(target)
    other = Target(tmp_path, locking("second"))
    with pytest.raises(errors.RestoreConflict) as refusal:
        host.restore(image, RestoreOptions(files=FilePolicy.KEEP, deadline_s=15.0))
    assert refusal.value.facts["reasons"] == [f"{locked} is locked by process {other.pid}"]
    host.assert_clean()
    host.kill(other)
    host.restore(image, RestoreOptions(files=FilePolicy.KEEP)).kill()


def test_a_missing_and_a_rewritten_library_are_named(host: Host, tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy2(shutil.which("sleep") or "", program)
    popen = host.popen([str(program), "1000"])
    time.sleep(0.2)
    image = MemoryImage()
    host.capture(popen.pid, image)
    popen.kill()
    popen.wait()
    info = program.stat()
    os.utime(program, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    with pytest.raises(errors.RestoreConflict, match="was written since the dump"):
        host.restore(image)
    program.rename(tmp_path / "away")
    with pytest.raises(errors.RestoreConflict, match="is missing"):
        host.restore(image)
    (tmp_path / "away").rename(program)
    tree = host.restore(image, RestoreOptions(accept_changed=True))
    assert proc.stat(tree.pid).comm == "program"
    host.assert_clean()


def test_too_little_memory_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    target = host.start("memory")
    image = host.dump(target)
    host.kill(target)
    with monkeypatch.context() as little:
        little.setattr(system, "memory_available_bytes", lambda: 30 << 20)
        with pytest.raises(errors.RestoreConflict, match="MiB of memory"):
            host.restore(image)
    assert_nothing_started(host, image, target)


def test_a_file_that_differs_is_refused_rolled_back_or_kept(host: Host) -> None:
    target = host.start("open_file")
    journal = target.folder / "journal"
    image = host.dump(target)
    os.kill(target.pid, signal.SIGHUP)
    deadline = time.monotonic() + 20
    while journal.read_text() != "line 1\nmore\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    host.kill(target)
    with pytest.raises(errors.RestoreConflict, match="journal has 12 bytes here, 7 in the image"):
        host.restore(image)
    assert journal.read_text() == "line 1\nmore\n"
    tree = host.restore(image, RestoreOptions(files=FilePolicy.ROLLBACK))
    target.check(tree.pid)
    assert journal.read_text() == "line 1\n"
    (aside,) = target.folder.glob("journal.before-restore-*")
    assert aside.read_text() == "line 1\nmore\n"


def test_a_missing_file_of_the_job_is_put_back(host: Host) -> None:
    target = host.start("open_file")
    image = host.dump(target)
    host.kill(target)
    (target.folder / "journal").unlink()
    tree = host.restore(image)
    target.check(tree.pid)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_gate_that_raises_leaves_nothing(host: Host, isolate: bool) -> None:
    target = host.start(*FEATURES, "open_file")
    image = host.dump(target)
    host.kill(target)
    (target.folder / "journal").unlink()

    def refuse() -> None:
        raise errors.RestoreFailed("another member failed")

    with pytest.raises(errors.RestoreFailed, match="another member"):
        host.restore(image, RestoreOptions(isolate=isolate), Gate(refuse))
    assert not (target.folder / "journal").exists()
    assert_nothing_started(host, image, target)


def test_at_the_gate_nothing_has_run(host: Host) -> None:
    target = host.start("memory", "threads")
    image = host.dump(target)
    host.kill(target)
    used: list[int] = []

    def look() -> None:
        with open(f"/proc/{target.pid}/stat") as file:
            used.append(int(file.read().rsplit(") ", 1)[1].split()[11]))
        os.kill(target.pid, signal.SIGUSR1)
        time.sleep(0.3)
        assert not (target.folder / "answer").exists()

    (target.folder / "answer").unlink()
    host.restore(image, gate=Gate(look))
    assert used
    deadline = time.monotonic() + 10
    while not (target.folder / "answer").exists():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("isolate", [False, True])
def test_a_tree_that_vanishes_before_its_memory_is_in_fails_the_restore(
    host: Host, monkeypatch: pytest.MonkeyPatch, isolate: bool
) -> None:
    target = host.start("memory", "children")
    image = host.dump(target)
    host.kill(target)

    def vanish() -> None:
        made = [pid for pid in proc.pids() if os.getpid() in proc_ancestors(pid)]
        for pid in made:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(living(pid) for pid in made):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    met = at_stage(monkeypatch, "post-restore", vanish)
    with pytest.raises(errors.Failed):
        host.restore(image, RestoreOptions(isolate=isolate))
    assert met == ["post-restore"]
    monkeypatch.undo()
    assert_nothing_started(host, image, target)


def proc_ancestors(pid: int) -> list[int]:
    with contextlib.suppress(errors.NotFound):
        return proc.ancestors(pid)
    return []


def living(pid: int) -> bool:
    with contextlib.suppress(errors.NotFound):
        return proc.stat(pid).state not in "ZX"
    return False


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("stage", ["pre-restore", "post-restore"])
def test_criu_killed_during_a_restore_leaves_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, stage: str, isolate: bool
) -> None:
    target = host.start(*FEATURES)
    image = host.dump(target)
    host.kill(target)

    def kill() -> None:
        if isolate:
            os.kill(criu_pid(host), signal.SIGKILL)
        else:
            kill_criu(host)

    met = at_stage(monkeypatch, stage, kill)
    with pytest.raises(errors.Failed):
        host.restore(image, RestoreOptions(isolate=isolate))
    assert met == [stage]
    monkeypatch.undo()
    assert_nothing_started(host, image, target)


AGENT = """
import os, pickle, signal, sys
sys.path.insert(0, {root!r})
from tests.host.conftest import Gate
from tests.host.image import MemorySource
from agent.engines.base import RestoreOptions
from agent.engines.criu.engine import CriuEngine
with open({image!r}, "rb") as file:
    image = pickle.load(file)
engine = CriuEngine(work_dir={work!r}, runtime_dir={runtime!r})
def die():
    if {gate}:
        os.kill(os.getpid(), signal.SIGKILL)
tree = engine.restore(MemorySource(image), RestoreOptions(isolate={isolate}), Gate(die))
print(tree.pid, flush=True)
"""


def run_agent(host: Host, image: MemoryImage, *, gate: bool, isolate: bool) -> tuple[int, str]:

    path = host.folder / "image"
    del image._lock
    path.write_bytes(pickle.dumps(image))
    script = AGENT.format(
        root=str(Path(__file__).parents[2]),
        image=str(path),
        work=str(host.work),
        runtime=str(host.runtime),
        gate=gate,
        isolate=isolate,
    )
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=60, capture_output=True, text=True
    )
    return done.returncode, done.stdout or done.stderr


@pytest.mark.parametrize("isolate", [False, True])
def test_agent_killed_at_the_gate_leaves_nothing_after_the_next_operation(
    host: Host, isolate: bool
) -> None:
    target = host.start(*FEATURES)
    image = host.dump(target)
    host.kill(target)
    status, _ = run_agent(host, image, gate=True, isolate=isolate)
    assert status == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(proc.exists(number) for number in conflicts.numbers(image.facts())):
        assert time.monotonic() < deadline, "a half-restored process stays"
        time.sleep(0.05)
    tree = host.restore(image)
    target.check(tree.pid)
    host.assert_clean()


@pytest.mark.parametrize("isolate", [False, True])
def test_a_restored_tree_outlives_the_agent_that_restored_it(host: Host, isolate: bool) -> None:
    target = host.start("memory", "children")
    image = host.dump(target)
    host.kill(target)
    status, said = run_agent(host, image, gate=False, isolate=isolate)
    assert status == 0, said
    target.check(int(said))
    for pid in reversed(proc.tree(int(said))):
        os.kill(pid, signal.SIGKILL)
    host.assert_clean()


@pytest.mark.parametrize("isolate", [False, True])
def test_streams_are_redirected(host: Host, tmp_path: Path, isolate: bool) -> None:
    script = (
        "import os,sys,time\n"
        "while True:\n"
        " line=os.read(0,100)\n"
        " os.write(1,b'out '+line) if line else time.sleep(0.01)\n"
        " os.write(2,b'err '+line) if line else None\n"
    )
    popen = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    host.popens.append(popen)
    assert popen.stdin
    assert popen.stdout
    popen.stdin.write(b"one\n")
    popen.stdin.flush()
    assert popen.stdout.readline() == b"out one\n"
    assert popen.stdout.readline() == b"err one\n"
    image = MemoryImage()
    host.capture(popen.pid, image)
    popen.kill()
    popen.wait()
    popen.stdin.close()
    popen.stdout.close()
    read_in, write_in = os.pipe()
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        host.restore(
            image,
            RestoreOptions(
                isolate=isolate, stdin=read_in, stdout=out.fileno(), stderr=err.fileno()
            ),
        )
    os.close(read_in)
    os.write(write_in, b"two\n")
    deadline = time.monotonic() + 10
    while not (tmp_path / "err").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(write_in)
    assert (tmp_path / "out").read_bytes() == b"out two\n"
    assert (tmp_path / "err").read_bytes() == b"err two\n"


def test_pipes_that_led_outside_lead_nowhere_unless_redirected(host: Host) -> None:
    script = "import time,os\nwhile True: os.write(1,b'x'*99); time.sleep(0.05)"
    popen = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    host.popens.append(popen)
    assert popen.stdout
    popen.stdout.read(99)
    image = MemoryImage()
    host.capture(popen.pid, image)
    popen.kill()
    popen.wait()
    popen.stdout.close()
    tree = host.restore(image)
    with pytest.raises(errors.DeadlineExceeded):
        tree.wait(0.5)  # a broken pipe would have ended it
    assert os.readlink(f"/proc/{tree.pid}/fd/1") == os.devnull


def test_a_tree_on_a_terminal_comes_back_without_it(host: Host) -> None:
    script = (
        "import fcntl,os,termios,time\n"
        "fcntl.ioctl(0,termios.TIOCSCTTY,0)\n"
        "while True: os.write(1,b'x'); time.sleep(0.05)"
    )
    master, slave = pty.openpty()
    popen = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl,termios;fcntl.ioctl(0,termios.TIOCSCTTY,0)\n{script}",
        ],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    host.popens.append(popen)
    os.close(slave)
    assert os.read(master, 1) == b"x"
    image = MemoryImage()
    host.capture(popen.pid, image)
    os.read(master, 1000)
    assert os.read(master, 1) == b"x"
    popen.kill()
    popen.wait()
    os.close(master)
    tree = host.restore(image)
    with pytest.raises(errors.DeadlineExceeded):
        tree.wait(0.5)
    assert os.readlink(f"/proc/{tree.pid}/fd/1") == os.devnull


class Damaged(MemorySource):
    """A source whose damage is found in the middle of the memory."""

    def __init__(self, image: MemoryImage, *, in_check: bool) -> None:
        super().__init__(image)
        self._in_check = in_check

    def check(self) -> None:
        if self._in_check:
            raise errors.Corrupt("a block is damaged", part="packs/1")
        super().check()

    def read(self, space, runs=None):  # type: ignore[no-untyped-def]
        for at, piece in enumerate(super().read(space, runs)):
            if at == 3:
                raise errors.Corrupt("a block is damaged", part="packs/1")
            yield piece


@pytest.mark.parametrize("in_check", [True, False])
def test_a_damaged_image_is_refused(host: Host, in_check: bool) -> None:
    target = host.start("memory")
    image = host.dump(target)
    host.kill(target)
    with pytest.raises(errors.Corrupt, match="damaged"):
        host.engine.restore(Damaged(image, in_check=in_check), RestoreOptions(), Gate())
    assert_nothing_started(host, image, target)


def test_where_memory_cannot_be_poured_it_goes_through_files(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = host.start(*FEATURES)
    image = host.dump(target)
    host.kill(target)
    met: list[str] = []

    def refuse(*args: object) -> int:
        met.append("poured")
        raise pour.PourRefused("the kernel refuses")

    monkeypatch.setattr(pour, "pour", refuse)
    tree = host.restore(image)
    assert met == ["poured"]
    target.check(tree.pid)
    host.assert_clean()


def test_an_image_of_another_engine_is_refused(host: Host) -> None:
    image = MemoryImage()
    image.known = {"layout": "other-1"}
    with pytest.raises(errors.UnknownFormat, match="other-1"):
        host.restore(image)


def test_live_connections_of_a_killed_tree_wait_for_its_restore(host: Host) -> None:
    """The peer stays outside and must not notice more than a pause."""

    with socket.create_server(("127.0.0.1", 0)) as server:
        script = (
            "import socket,time\n"
            f"s=socket.create_connection(('127.0.0.1',{server.getsockname()[1]}))\n"
            "while True: s.sendall(s.recv(100).upper())"
        )
        popen = host.popen([sys.executable, "-c", script])
        peer = server.accept()[0]
        with peer:
            # What nobody took is said again after as long as it was not taken.
            peer.settimeout(60)
            peer.sendall(b"one")
            assert peer.recv(100) == b"ONE"
            image = MemoryImage()
            report = host.capture(
                popen.pid, image, Cut(disposition=Disposition.KILL), CaptureOptions(kill=True)
            )
            popen.wait()
            assert report.pids == (popen.pid,)
            peer.sendall(b"two")  # nobody there; a reset would end the connection
            time.sleep(0.3)
            host.restore(image)
            assert peer.recv(100) == b"TWO"
    host.assert_clean()
