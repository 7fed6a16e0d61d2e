"""A restored tree runs while its memory still comes: every page is right, whatever the tree does
meanwhile, or the tree is ended, whoever dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from agent import errors
from agent.engines.base import Fills, RestoredTree, RestoreOptions
from agent.engines.criu import filling, keeper, lazy, treeend, uffd
from agent.host import proc
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun
from tests.host.conftest import TARGETS, Gate, Host, Target
from tests.host.image import MemoryImage, MemorySource

_PATIENCE_S = 60.0


class Held(MemorySource):
    """Gives what is waited for at once, and all else when it is let go."""

    def __init__(self, image: MemoryImage, let_go: threading.Event | None = None) -> None:
        super().__init__(image)
        self.let_go = let_go or threading.Event()
        self.failure: errors.CkptError | None = None
        self.failures: list[errors.CkptError] = []

    def beside(self) -> MemorySource:
        if threading.current_thread().name == "fill-stream":
            self.let_go.wait(60)
        return Late(self, self._image)

    def fail(self) -> None:
        """Each of ``failures`` once."""
        if self.failures:
            raise self.failures.pop()


class Late(MemorySource):
    """What is read when the tree runs already."""

    def __init__(self, held: Held, image: MemoryImage) -> None:
        super().__init__(image)
        self._held = held

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        for piece in super().read(space, runs):
            self._held.fail()
            if self._held.failure is not None:
                raise self._held.failure
            yield piece


class Filled(Target):
    """A running ``targets/filled.py``."""

    def ask(self, *words: str) -> None:
        """Let it do this; all must be right."""
        (self.folder / "do").write_text(" ".join(words))
        self.answer.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        assert self.said() == "right"

    def orphan(self) -> int:
        """Let it leave a process behind that looks at all of its memory; its number."""
        path = self.folder / "orphan"
        path.unlink(missing_ok=True)
        self.ask("orphaned")
        until(path.exists)
        return int(path.read_text())

    def said(self) -> str:
        until(self.answer.exists)
        return self.answer.read_text()

    @property
    def answer(self) -> Path:
        return self.folder / "answer"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come to be"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryImage, Filled]:
    """An image of the target, taken once; its processes have ended."""
    host = Host(tmp_path_factory.mktemp("dumped"))
    try:
        folder = host.folder / "target"
        folder.mkdir()
        popen = host.popen([sys.executable, str(TARGETS / "filled.py"), str(folder)])
        target = Filled(folder, popen.pid)
        assert target.said() == "right"
        return host.dump(target), target
    finally:
        host.close()


class Run:
    """A restore that runs, with what is held back."""

    def __init__(self, host: Host, image: MemoryImage, *, isolate: bool = False) -> None:
        self.fills = Fills()
        self.source = Held(image)
        options = RestoreOptions(fills=self.fills, isolate=isolate)
        self.tree: RestoredTree = host.engine.restore(self.source, options, Gate())
        host.trees.append(self.tree)
        self.keepers = keepers()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.let_go.set()
        self.fills.__exit__()

    def complete(self) -> None:
        self.source.let_go.set()
        self.fills.wait(lambda: None)

    def assert_ended(self, orphan: int = 0) -> None:
        """No process of the tree is left, nor of who filled it."""
        assert self.tree.wait(_PATIENCE_S) == 128 + signal.SIGKILL
        if orphan:
            until(lambda: not proc.exists(orphan))
        until(lambda: not any(map(proc.exists, self.keepers)))


def end(pid: int) -> None:
    """Kill it, and wait until nothing is called by its number, nor by that of its session."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not proc.exists(pid))


def keepers() -> list[int]:
    """The programs that fill a tree, the first one before the second."""
    found = [pid for pid in proc.pids() if keeper.__file__.encode() in command(pid)]
    return sorted(found, key=lambda pid: parent(pid) in found)


def parent(pid: int) -> int:
    with contextlib.suppress(errors.NotFound):
        return proc.stat(pid).ppid
    return 0


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_every_page_is_right_whatever_the_tree_does_while_they_come(
    host: Host, dumped: tuple[MemoryImage, Filled]
) -> None:
    image, target = dumped
    with Run(host, image) as run:
        target.ask("some", "moved", "forgotten", "forked", "some")
        with pytest.raises(errors.TargetBusy):
            host.dump(target)
        assert run.fills.filled_bytes < run.fills.total_bytes
        # What a child forks meanwhile is complete too.
        orphan = target.orphan()
        assert treeend.missing(str(orphan))
        run.complete()
        assert run.fills.filled_bytes == run.fills.total_bytes
        assert not treeend.missing(str(orphan))
        target.ask("all")
        end(orphan)
        assert not (target.folder / "hole").exists()
        run.tree.kill()
        assert keepers() == []
    host.assert_clean()


def test_what_was_there_and_is_let_go_of_unseen_is_zero(
    host: Host, dumped: tuple[MemoryImage, Filled]
) -> None:
    image, target = dumped
    with Run(host, image) as run:
        target.ask("discarded")
        run.complete()
        target.ask("some", "moved", "forgotten", "all")
        run.tree.kill()


def test_what_moves_to_where_another_thread_has_just_moved_away_from_is_right(
    host: Host, dumped: tuple[MemoryImage, Filled]
) -> None:
    image, target = dumped
    with Run(host, image) as run:
        target.ask("crossed", "warmed")
        os.kill(run.keepers[0], signal.SIGSTOP)
        asking = threading.Thread(target=target.ask, args=("crossed",))
        asking.start()
        try:
            until(lambda: moving(run.tree.pid) == 2)
        finally:
            os.kill(run.keepers[0], signal.SIGCONT)
        asking.join()
        target.ask("some", "moved", "forgotten")
        run.complete()
        target.ask("all")
        run.tree.kill()


def test_a_thread_that_ends_lets_go_of_robust_mutexes_that_have_not_come_yet(
    host: Host, dumped: tuple[MemoryImage, Filled]
) -> None:
    image, target = dumped
    with Run(host, image) as run:
        target.ask("abandoned")
        run.complete()
        target.ask("forgotten", "all")
        run.tree.kill()


def moving(pid: int) -> int:
    """How many of its threads wait for somebody to hear what they have moved."""
    waits = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/wchan")]
    return sum(each == "userfaultfd_event_wait_completion" for each in waits)


def test_a_page_that_comes_to_be_just_before_the_kernel_is_to_ask_is_filled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when khugepaged makes a huge page of a mapping that is empty but for one page."""
    pages = 64
    with (
        mmap.mmap(-1, pages * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        contextlib.ExitStack() as stack,
    ):
        view = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(view)
        memory[0] = 1
        descriptor = ctypes.CDLL(None, use_errno=True).syscall(323, os.O_CLOEXEC)
        assert descriptor >= 0
        stack.callback(os.close, descriptor)
        assert uffd.call(descriptor, 0xC018AA3F, 0xAA, 0, 0)[0] == 0  # UFFDIO_API
        kernels = uffd.call

        def call(fd: int, request: int, *words: int) -> tuple[int, int]:
            if request == uffd.UFFDIO_REGISTER:
                memory[7 * PAGE_BYTES] = 0
            return kernels(fd, request, *words)

        monkeypatch.setattr(uffd, "call", call)
        all_of_it = PageRun(start, pages, 4)
        deferred = lazy.Deferred(((start, start + pages * PAGE_BYTES),), (all_of_it,))
        found = lazy.ask_for(descriptor, deferred, os.getpid())
        del view
    assert found == [PageRun(start, 1, 4), PageRun(start + 7 * PAGE_BYTES, 1, 4)]


@pytest.mark.parametrize("isolate", [False, True])
def test_a_store_that_fails_ends_the_tree(
    host: Host, dumped: tuple[MemoryImage, Filled], isolate: bool
) -> None:
    image, target = dumped
    with Run(host, image, isolate=isolate) as run:
        orphan = 0
        if not isolate:
            orphan = target.orphan()
        run.source.failure = errors.Missing("the image is gone")
        with pytest.raises(errors.Missing):
            run.complete()
        run.assert_ended(orphan)
    assert not (target.folder / "hole").exists()
    host.assert_clean()


def test_a_tree_that_has_ended_is_not_read_for(
    host: Host, dumped: tuple[MemoryImage, Filled], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = dumped
    monkeypatch.setattr(filling, "_LEFT_S", 0.1)
    with Run(host, image) as run:
        target.ask("some")
        os.kill(run.tree.pid, signal.SIGKILL)
        (fill,) = run.fills._fills
        until(lambda: fill.wait(0.1))
        assert fill.filled_bytes < fill.total_bytes
        run.assert_ended()
    host.assert_clean()


def test_time_in_which_the_agent_stood_still_is_not_held_against_the_volume(
    host: Host, dumped: tuple[MemoryImage, Filled], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = dumped
    monkeypatch.setattr(filling, "_STOOD_S", 0.5)
    with Run(host, image) as run:
        target.ask("some")
        (fill,) = run.fills._fills
        assert isinstance(fill, filling.Fill)
        fill._patience_s = 1.0
        time.sleep(2)  # nobody looks
        assert not fill.wait(0.01)
        assert proc.exists(run.tree.pid)
        with pytest.raises(errors.DeadlineExceeded, match="no memory of the image came"):
            until(lambda: fill.wait(0.01))
        run.assert_ended()
    host.assert_clean()


def test_a_tree_that_is_seldom_looked_at_since_there_are_many_is_given_up_all_the_same(
    host: Host, dumped: tuple[MemoryImage, Filled], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = dumped
    monkeypatch.setattr(filling, "_STOOD_S", 0.1)
    with Run(host, image) as run:
        target.ask("some")
        (fill,) = run.fills._fills
        assert isinstance(fill, filling.Fill)
        fill._patience_s = 1.0

        def look() -> bool:
            time.sleep(0.2)  # others are
            return fill.wait(0.01)

        with pytest.raises(errors.DeadlineExceeded, match="no memory of the image came"):
            until(look)
        run.assert_ended()
    host.assert_clean()


def test_a_store_that_fails_for_a_moment_ends_nobody(
    host: Host, dumped: tuple[MemoryImage, Filled]
) -> None:
    image, target = dumped
    with Run(host, image) as run:
        run.source.failures = [errors.VolumeGone("away"), errors.VolumeError("EIO")]
        target.ask("some", "moved", "forgotten")
        assert not run.source.failures
        run.source.failures = [errors.VolumeGone("away"), errors.Corrupt("torn")]
        run.complete()
        assert not run.source.failures
        assert run.fills.filled_bytes == run.fills.total_bytes
        target.ask("all")
        run.tree.kill()
    host.assert_clean()


@pytest.mark.parametrize("first", [True, False])
def test_a_keeper_killed_leaves_no_hole(
    host: Host, dumped: tuple[MemoryImage, Filled], first: bool
) -> None:
    image, target = dumped
    with Run(host, image) as run:
        orphan = target.orphan()
        os.kill(run.keepers[0 if first else 1], signal.SIGKILL)
        if first:
            run.source.let_go.set()
            with pytest.raises(errors.RestoreFailed, match="killed; the tree was ended"):
                run.fills.wait(lambda: None)
            run.assert_ended(orphan)
        else:
            until(lambda: keepers() not in ([], run.keepers, run.keepers[:1]))
            run.complete()
            target.ask("some", "moved", "forgotten", "all")
            end(orphan)
            run.tree.kill()
    assert not (target.folder / "hole").exists()
    host.assert_clean()


STRANGER = """
import ctypes, fcntl, os, struct, sys
at, size = map(int, sys.argv[1:])
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
assert libc.mmap(at, size, 3, 0x100022, -1, 0) == at  # nothing else is there
fd = libc.syscall(323, os.O_CLOEXEC)  # userfaultfd
fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))  # UFFDIO_API
fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("QQQQ", at, size, 1, 0)))  # UFFDIO_REGISTER
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_stranger_whose_memory_is_missing_at_the_same_place_is_spared(
    host: Host, dumped: tuple[MemoryImage, Filled]
) -> None:
    image, target = dumped
    with Run(host, image) as run:
        orphan = target.orphan()
        at, size = treeend.missing(str(orphan))[-1]
        argv = [sys.executable, "-c", STRANGER, str(at), str(size)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
            assert stranger.stdout is not None
            assert stranger.stdout.readline() == b"ready\n"
            assert treeend.missing(str(stranger.pid)) == [(at, size)]
            run.source.failure = errors.Missing("the image is gone")
            with pytest.raises(errors.Missing):
                run.complete()
            run.assert_ended(orphan)
            stranger.communicate(timeout=20)
            assert stranger.returncode == 0
    assert not (target.folder / "hole").exists()
    host.assert_clean()


@pytest.mark.parametrize("full", [False, True])
def test_a_keeper_that_does_nothing_any_more_is_ended_with_the_tree(
    host: Host, dumped: tuple[MemoryImage, Filled], monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    image, target = dumped
    monkeypatch.setattr(filling, "_ENDED_S", 1.0)
    monkeypatch.setattr(filling, "_LEFT_S", 0.1)
    with Run(host, image) as run:
        orphan = target.orphan()
        os.kill(run.keepers[0], signal.SIGSTOP)
        if full:  # nothing more can be said to it
            (fill,) = run.fills._fills
            assert isinstance(fill, filling.Fill)
            with contextlib.suppress(BlockingIOError):
                while True:
                    fill._channel.send(filling._zero(0, 0, 0), socket.MSG_DONTWAIT)
        run.fills.__exit__()
        run.assert_ended(orphan)
    assert not (target.folder / "hole").exists()
    host.assert_clean()


AGENT = """
import pickle, sys
sys.path.insert(0, {root!r})
from tests.host.conftest import Gate
from tests.host.image import MemoryImage
from tests.host.test_lazy_restore import Held
from agent.engines.base import Fills, RestoreOptions
from agent.engines.criu.engine import CriuEngine
image = MemoryImage()
with open({image!r}, "rb") as file:
    vars(image).update(pickle.load(file))
engine = CriuEngine(work_dir={work!r}, runtime_dir={runtime!r})
fills = Fills()
tree = engine.restore(Held(image), RestoreOptions(fills=fills), Gate())
print(tree.pid, flush=True)
fills.wait(lambda: None)
"""


@pytest.mark.parametrize("everybody", [False, True])
def test_an_agent_killed_leaves_no_tree_with_holes(
    host: Host, dumped: tuple[MemoryImage, Filled], everybody: bool
) -> None:
    image, target = dumped
    path = host.folder / "image"
    path.write_bytes(pickle.dumps({k: v for k, v in vars(image).items() if k != "_lock"}))
    script = AGENT.format(
        root=str(Path(__file__).parents[2]),
        image=str(path),
        work=str(host.work),
        runtime=str(host.runtime),
    )
    agent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        who = proc.identity(pid)
        orphan = proc.identity(target.orphan())
        running = keepers()
        if everybody:
            # All at once, as when a control group is killed. Nobody is left to end the tree then,
            # so the next command must.
            for each in (*running[::-1], agent.pid):
                os.kill(each, signal.SIGSTOP)
            for each in (*running[::-1], agent.pid):
                os.kill(each, signal.SIGKILL)
            until(lambda: not any(map(proc.exists, running)))
            assert pid in host.engine.recover().killed
        else:
            agent.kill()
        until(lambda: not proc.exists(who.pid))
        if not everybody:
            until(lambda: not proc.exists(orphan.pid))
            until(lambda: not any(map(proc.exists, running)))
            assert not (target.folder / "hole").exists()
            host.engine.recover()
        else:
            # It ends by itself if it has found a hole.
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan.pid, signal.SIGKILL)
            until(lambda: not proc.alive(orphan))
    finally:
        agent.kill()
        agent.communicate()
    host.assert_clean()
