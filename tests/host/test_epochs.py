"""A host's part of an epoch: several trees cut at one moment, committed together or not at all."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, Disposition, FilePolicy, RestoreOptions
from agent.engines.criu import shortstop
from agent.host import netfilter, proc
from agent.model import ids
from agent.node import dump as node_dump
from agent.node import restore as node_restore
from agent.store.reader import EpochReader
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests.host.conftest import TARGETS, Cut, Host, Target
from tests.host.image import MemoryImage
from tests.host.nodes import wait_for

GROUP = ids.group_name("job")


class Job:
    """A host with a store, and the trees of one group."""

    def __init__(self, host: Host, root: Path) -> None:
        self.host = host
        self.root = root
        root.mkdir(exist_ok=True)
        self.store = Store.open(DirectoryVolume(str(root)), create=True)

    def dump(self, *pids: int, **changes: Any) -> node_dump.DumpOutcome:
        options = CaptureOptions(
            include=changes.pop("include", ()), precopy=changes.pop("precopy", False)
        )
        members = [node_dump.Member(ids.member_name(f"tree-{n}"), p) for n, p in enumerate(pids)]
        return node_dump.dump(
            changes.pop("store", self.store), self.host.engine, GROUP, members, options, **changes
        )

    def restore(self, image: str = GROUP, **options: Any) -> node_restore.RestoreOutcome:
        options.setdefault("files", FilePolicy.ROLLBACK)
        outcome = node_restore.restore(
            self.store, self.host.engine, image, RestoreOptions(**options)
        )
        self.host.trees.extend(tree for _, tree in outcome.trees)
        return outcome

    def epochs(self) -> list[str]:
        return [str(summary.epoch) for summary in self.store.epochs(GROUP)]


@pytest.fixture
def job(host: Host, tmp_path: Path) -> Job:
    return Job(host, tmp_path / "store")


def reasons_of(refusal: errors.CkptError) -> list[str]:
    return cast("list[str]", refusal.facts["reasons"])


class Stream:
    """Two trees that exchange numbers over TCP."""

    def __init__(self, host: Host, folder: Path, *address: str) -> None:
        # The runtime's default disposition of SIGUSR1 would end a process that is not up yet.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        folder.mkdir()
        self.folder = folder
        program = [sys.executable, str(TARGETS / "stream.py")]
        self.ends = {
            role: host.popen([*program, role, str(folder), *address]) for role in ("serve", "send")
        }
        self.flows()

    @property
    def pids(self) -> list[int]:
        return [popen.pid for popen in self.ends.values()]

    def counts(self) -> list[int]:
        """How many numbers each end got, all in order."""
        counts = []
        for role, pid in zip(self.ends, self.pids, strict=True):
            answer = self.folder / role
            answer.unlink(missing_ok=True)
            deadline = time.monotonic() + 20
            while not answer.exists():
                assert time.monotonic() < deadline, f"{role} does not answer"
                try:
                    os.kill(pid, signal.SIGUSR1)
                except ProcessLookupError:
                    pytest.fail(f"{role} has ended")
                time.sleep(0.05)
            counts.append(int(answer.read_text()))
        return counts

    def flows(self) -> None:
        """Numbers go on arriving at both ends."""
        deadline = time.monotonic() + 20
        while not (self.folder / "port").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        before = self.counts()
        deadline = time.monotonic() + 20
        while not all(now > then for now, then in zip(self.counts(), before, strict=True)):
            assert time.monotonic() < deadline, "the stream stands still"

    def kill(self) -> None:
        for popen in self.ends.values():
            popen.kill()
        for popen in self.ends.values():
            popen.wait()


@pytest.fixture
def stream(host: Host, tmp_path: Path) -> Stream:
    return Stream(host, tmp_path / "stream")


def test_trees_that_talk_to_each_other_are_cut_at_one_moment_and_lose_nothing(
    job: Job, stream: Stream
) -> None:
    for _ in range(3):
        job.dump(*stream.pids)
        stream.flows()
    outcome = job.dump(*stream.pids, stop=True)
    assert outcome.stopped
    for popen in stream.ends.values():
        assert popen.wait(10) == -signal.SIGKILL
    for _ in range(2):
        trees = job.restore().trees
        assert [tree.pid for _, tree in trees] == stream.pids
        stream.flows()
        for _, tree in trees:
            tree.kill()
    job.host.assert_clean()


def _give_up() -> Disposition:
    assert any(name.startswith("ckpt-agent-") for name in netfilter.tables(""))
    raise errors.VolumeError("the volume is full")


@pytest.mark.parametrize(("address", "precopy"), [("127.0.0.1", True), ("::1", False)])
def test_a_tree_loses_nothing_to_a_peer_outside_of_it_whether_it_runs_on_or_comes_back(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, precopy: bool
) -> None:
    monkeypatch.setattr(shortstop, "_SMALLEST_BYTES", 0)
    stream = Stream(job.host, tmp_path / "stream", address)
    for pid in stream.pids:
        ((_, report),) = job.dump(pid, precopy=precopy).members
        assert report.engine_facts["stop"]["path"] == ("precopy" if precopy else "plain")
        stream.flows()
        cut = Cut()
        monkeypatch.setattr(cut, "captured", _give_up)
        with pytest.raises(errors.VolumeError):
            job.host.capture(pid, MemoryImage(), cut, CaptureOptions(precopy=precopy))
        job.host.assert_clean()
        stream.flows()
    job.dump(stream.pids[0], stop=True, precopy=precopy)
    assert stream.ends["serve"].wait(10) == -signal.SIGKILL
    assert [tree.pid for _, tree in job.restore().trees] == stream.pids[:1]
    stream.flows()
    job.host.assert_clean()


# Accepts who calls when it is told to, and answers what it is sent.
DOOR = """
import os, socket, sys
server = socket.create_server(('127.0.0.1', int(sys.argv[1])))
open(sys.argv[2], 'w').write('up')
sys.stdin.readline()
sock = server.accept()[0]
open(sys.argv[2], 'w').write('accepted')
while True:
    sock.sendall(sock.recv(10))
"""


class Accepting:
    """Lets the program accept before the try of that number."""

    def __init__(self, tell: Callable[[], None], at: int) -> None:
        self.tries = 0
        self._tell, self._at = tell, at

    def before(self, check: Callable[[], None]) -> None:
        self.tries += 1
        if self.tries == self._at:
            self._tell()

    def running(self) -> None:
        pass


@pytest.mark.parametrize("accepts_at", [2, 4])
def test_a_dump_is_tried_again_while_a_connection_is_not_accepted(
    job: Job, tmp_path: Path, accepts_at: int
) -> None:
    said = tmp_path / "said"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", DOOR, str(port), str(said)]
    door = job.host.popen(command, stdin=subprocess.PIPE)
    wait_for(lambda: said.exists() and said.read_text() == "up")

    def accept() -> None:
        assert door.stdin is not None
        door.stdin.write(b"\n")
        door.stdin.flush()
        wait_for(lambda: said.read_text() == "accepted")

    around = Accepting(accept, accepts_at)
    with socket.create_connection(("127.0.0.1", port)) as client:
        if accepts_at == 2:
            job.dump(door.pid, around=around)
            assert len(job.epochs()) == 1
        else:  # too late
            with pytest.raises(errors.ConnectionUnaccepted, match="In-flight"):
                job.dump(door.pid, around=around)
            assert job.epochs() == []
            accept()
        assert around.tries == min(accepts_at, 3)
        client.settimeout(10)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert door.stdin is not None
    door.stdin.close()


def test_a_failing_member_leaves_all_running_and_nothing_restorable(
    job: Job, stream: Stream
) -> None:
    with pytest.raises(errors.TargetUnsuitable):
        job.dump(stream.pids[0], os.getpid())
    assert job.epochs() == []
    stream.flows()
    job.dump(*stream.pids)
    stream.flows()
    job.host.assert_clean()


def test_a_cancelled_dump_leaves_the_tree_running_and_nothing_restorable(job: Job) -> None:
    target = job.host.start("memory")
    for phase in ("capture", "persist"):
        cancel = node_dump.Cancel()

        def seen(progress: node_dump.Progress, phase: str = phase, ask: Any = cancel.set) -> None:
            if progress.phase == phase:
                ask()

        with pytest.raises(errors.Interrupted):
            job.dump(target.pid, cancel=cancel, progress=seen)
        assert job.epochs() == []
        job.host.assert_running(target)
    job.dump(target.pid)
    assert len(job.epochs()) == 1
    job.host.assert_clean()


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    mounted: list[Path] = []

    def mount(size_mib: int) -> Path:
        folder = tmp_path / f"small{len(mounted)}"
        folder.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)], check=True
        )
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise


@pytest.mark.parametrize("stop", [False, True])
def test_a_full_volume_leaves_the_tree_running_and_older_images_whole(
    host: Host, small_volume: Callable[[int], Path], stop: bool
) -> None:
    target = host.start("memory")
    job = Job(host, small_volume(64))
    first = job.dump(target.pid).epoch
    filler = job.root / "filler"
    fill(filler)
    target.check()
    with pytest.raises(errors.VolumeFull):
        job.dump(target.pid, stop=stop)
    host.assert_running(target)
    filler.unlink()
    assert job.epochs() == [str(first.epoch)]
    assert job.store.verify(GROUP, first.epoch).good
    second = job.dump(target.pid, stop=stop).epoch
    assert job.epochs() == [str(first.epoch), str(second.epoch)]
    host.assert_clean()


def test_a_volume_that_vanishes_leaves_the_tree_running(
    host: Host, small_volume: Callable[[int], Path]
) -> None:
    target = host.start("memory")
    root = small_volume(64)
    job = Job(host, root)
    gone = threading.Event()

    def pull(progress: node_dump.Progress) -> None:
        if progress.phase == "capture" and not gone.is_set():
            gone.set()
            subprocess.run(["umount", "--lazy", str(root)], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(root)], check=True)

    with pytest.raises(errors.VolumeError):
        job.dump(target.pid, progress=pull)
    assert gone.is_set()
    host.assert_running(target)
    host.assert_clean()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def test_a_damaged_image_is_refused_before_any_process_starts_and_an_older_one_is_named(
    job: Job,
) -> None:
    target = job.host.start("memory")
    older = job.dump(target.pid).epoch
    newest = job.dump(target.pid).epoch
    job.host.kill(target)
    packs = [
        Path(job.root) / blob.name
        for blob in DirectoryVolume(str(job.root)).list()
        if str(newest.epoch) in blob.name and "pack" in blob.name
    ]
    assert packs
    for pack in packs:
        flip(pack, pack.stat().st_size // 2)
    with pytest.raises(errors.DataError) as caught:
        job.restore()
    assert caught.value.facts["older_good"] == ids.image_name(GROUP, older.epoch)
    assert not proc.exists(target.pid)
    tree = job.restore(str(caught.value.facts["older_good"])).trees[0][1]
    target.check(tree.pid)
    job.host.assert_clean()


def test_the_reasons_of_all_members_are_told_before_the_image_is_read(
    job: Job, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [host.start("memory"), host.start("children")]
    job.dump(*(target.pid for target in targets))
    monkeypatch.setattr(EpochReader, "member", _unread(EpochReader.member))
    with pytest.raises(errors.RestoreConflict) as caught:
        job.restore()
    reasons = reasons_of(caught.value)
    for number, target in enumerate(targets):
        pid = f"pid {target.pid} is in use"
        assert [each for each in reasons if each.startswith(f"tree-{number}: {pid}")]
        target.check()
    assert isinstance(caught.value.facts["refused_after_s"], float)
    job.host.assert_clean()


def _unread(member: Any) -> Any:
    """The store's member, which fails whoever reads more of it than its facts."""

    def opened(self: Any, *which: Any, **how: Any) -> Any:
        source = member(self, *which, **how)
        source.check = lambda: pytest.fail("the image was read")
        return source

    return opened


def test_the_same_image_cannot_be_restored_twice_in_place(job: Job) -> None:
    target = job.host.start("memory")
    job.dump(target.pid)
    job.host.kill(target)
    job.restore()
    with pytest.raises(errors.RestoreConflict) as caught:
        job.restore()
    assert any(str(target.pid) in reason for reason in reasons_of(caught.value))
    target.check()
    job.host.assert_clean()


@pytest.fixture
def writer(host: Host, tmp_path: Path) -> Target:
    """A tree that appends to an open log and keeps a directory of state."""
    folder = tmp_path / "writer"
    folder.mkdir()
    script = (
        "import os, sys, time\n"
        "log = open('log', 'w'); n = 0\n"
        "os.mkdir('state')\n"
        "while True:\n"
        "    n += 1\n"
        "    log.write(f'{n}\\n'); log.flush()\n"
        "    open('state/new', 'w').write(str(n)); os.replace('state/new', 'state/count')\n"
        "    time.sleep(0.01)\n"
    )
    argv = [sys.executable, "-c", f"import os; os.chdir({str(folder)!r})\n{script}"]
    popen = host.popen(argv)
    deadline = time.monotonic() + 20
    while not (folder / "state" / "count").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return Target(folder, popen.pid)


def halt(host: Host, writer: Target) -> None:
    """End it when it is in the middle of nothing: a file that it was about to rename would be one
    more in the way.
    """
    while True:
        os.kill(writer.pid, signal.SIGSTOP)
        wait_for(lambda: proc.stat(writer.pid).state == "T")
        if not (writer.folder / "state" / "new").exists():
            host.kill(writer)
            return
        os.kill(writer.pid, signal.SIGCONT)


def lines(target: Target) -> list[int]:
    return [int(line) for line in (target.folder / "log").read_text().split()]


def test_files_are_rolled_back_with_the_tree_and_what_they_displace_is_kept(
    job: Job, writer: Target
) -> None:
    job.dump(writer.pid, include=(str(writer.folder / "state"),))
    dumped = len(lines(writer))
    wait_for(lambda: len(lines(writer)) > dumped + 2)
    halt(job.host, writer)
    grown = lines(writer)
    (writer.folder / "state" / "extra").write_text("mine")
    with pytest.raises(errors.RestoreConflict) as caught:
        job.restore(files=FilePolicy.REFUSE)
    assert any(str(writer.folder / "log") in reason for reason in reasons_of(caught.value))
    assert not proc.exists(writer.pid)
    job.restore(files=FilePolicy.ROLLBACK)
    before = len(lines(writer))
    wait_for(lambda: len(lines(writer)) > before + 2)
    now = lines(writer)
    assert now == list(range(1, len(now) + 1))
    assert not (writer.folder / "state" / "extra").exists()
    kept = sorted(path.name for path in writer.folder.rglob("*.before-restore-*"))
    assert [name.split(".before-restore-")[0] for name in kept] == ["count", "extra", "log"]
    aside = next(writer.folder.glob("log.before-restore-*"))
    assert [int(line) for line in aside.read_text().split()] == grown
    job.host.assert_clean()


def test_missing_files_are_put_back(job: Job, writer: Target) -> None:
    job.dump(writer.pid)
    job.host.kill(writer)
    (writer.folder / "log").unlink()
    job.restore(files=FilePolicy.REFUSE)
    time.sleep(0.2)
    now = lines(writer)
    assert now == list(range(1, len(now) + 1))
    job.host.assert_clean()


def test_a_failed_restore_leaves_the_files_as_they_were(job: Job, writer: Target) -> None:
    job.dump(writer.pid)
    job.host.kill(writer)
    before = (writer.folder / "log").read_bytes()
    names = sorted(path.name for path in writer.folder.iterdir())
    with pytest.raises(errors.CkptError), _broken_gate():
        job.restore(files=FilePolicy.ROLLBACK)
    assert (writer.folder / "log").read_bytes() == before
    assert sorted(path.name for path in writer.folder.iterdir()) == names
    assert not proc.exists(writer.pid)
    job.host.assert_clean()


def _broken_gate() -> Any:
    def refuse(self: Any) -> None:
        raise errors.RestoreFailed("planned")

    patch = pytest.MonkeyPatch()
    patch.setattr("agent.node.restore._Gate.restored", refuse)
    return _Undo(patch)


class _Undo:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
