"""What the tests with the real CRIU share: targets, an engine, and the look for leftovers."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.base import (
    CaptureOptions,
    CaptureReport,
    Disposition,
    RestoredTree,
    RestoreOptions,
)
from agent.engines.criu import engine as criu_engine
from agent.engines.criu import probe
from agent.engines.tracking import precopy
from agent.host import netfilter, pagemap, proc, softdirty
from tests.conftest import NOT_TO_BE_HAD
from tests.host.image import MemoryImage, MemorySource
from tests.host.mappings import Program

TARGETS = Path(__file__).parent / "targets"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _unfit()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.host)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


_prepared = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Before the first test with containers, and outside of its time limit: what they need."""
    if "boxes" in getattr(item, "fixturenames", ()) and _prepared not in item.session.stash:
        item.session.stash[_prepared] = True
        if not _unfit():
            from tests.host.boxes import prepare

            # What cannot be had fails the tests that need it, one by one.
            with contextlib.suppress(subprocess.SubprocessError, OSError):
                prepare()
    return (yield)


def _unfit() -> str:
    if os.geteuid() != 0:
        return "needs root"
    try:
        probe.probe()
    except errors.CriuMissing as exc:
        return f"needs CRIU >= 4.2: {exc}"
    return ""


@pytest.fixture(scope="session", autouse=True)
def own_network() -> None:
    """Give these tests a network namespace of their own: what CRIU does to the packet filter then
    is theirs alone, and can be checked to the last table whatever else this host does.
    """
    if _unfit():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x40000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNET
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        # struct ifreq; SIOCSIFFLAGS, IFF_UP | IFF_RUNNING.
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x41))


@pytest.fixture(scope="session")
def _only_new_garbage() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _forgotten(_only_new_garbage: None) -> Iterator[None]:
    """Errors hold the images of the tests that met them, in cycles; and the more memory this
    process has, the longer takes each of its forks.
    """
    yield
    gc.collect()


class Target:
    """A running self-checking tree."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        self.pid = pid

    def check(self, pid: int | None = None) -> None:
        """Let it check itself; fails with its complaints."""
        answer = self.folder / "answer"
        answer.unlink(missing_ok=True)
        os.kill(pid or self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 40
        while not answer.exists():
            assert time.monotonic() < deadline, "the target does not answer"
            time.sleep(0.005)
        said = json.loads(answer.read_text())
        assert {name: text for name, text in said.items() if text} == {}


class Cut:
    """A cut that does what a test says at its two moments."""

    def __init__(
        self,
        frozen: Callable[[], None] = lambda: None,
        captured: Callable[[], None] = lambda: None,
        disposition: Disposition = Disposition.RESUME,
    ) -> None:
        self._frozen = frozen
        self._captured = captured
        self._disposition = disposition

    def check(self) -> None:
        """Nobody gives it up."""

    def fail(self, failure: BaseException) -> None:
        """Nobody else goes on."""

    def ready(self) -> None:
        """Nothing to wait for."""

    def poised(self, wait_s: float) -> bool:
        """Nor here."""
        return True

    def running(self) -> None:
        """Nobody asks."""

    def frozen(self) -> None:
        self._frozen()

    def held(self) -> None:
        """Nobody waits."""

    def released(self) -> None:
        """Nor here."""

    def captured(self) -> Disposition:
        self._captured()
        return self._disposition


class Gate:
    """A gate that does what a test says."""

    def __init__(
        self,
        restored: Callable[[], None] = lambda: None,
        filled: Callable[[], None] = lambda: None,
    ) -> None:
        self._restored = restored
        self._filled = filled

    def filled(self) -> None:
        self._filled()

    def restored(self) -> None:
        self._restored()

    def released(self) -> None:
        """Nobody waits."""


class Host:
    """An engine with directories of its own, and everything that a test started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.runtime = folder / "run"
        self.engine = criu_engine.CriuEngine(work_dir=str(self.work), runtime_dir=str(self.runtime))
        self.popens: list[subprocess.Popen[bytes]] = []
        self.trees: list[RestoredTree] = []
        self.tables_before = netfilter.tables("")

    def start(self, *features: str, under: tuple[str, ...] = (), **environment: str) -> Target:
        """Start ``targets/tree.py`` with these features and wait until it stands."""
        folder = self.folder / f"target{len(self.popens)}"
        folder.mkdir()
        argv = [*under, sys.executable, str(TARGETS / "tree.py"), str(folder), *features]
        popen = self.popen(argv, environment)
        target = Target(folder, popen.pid)
        deadline = time.monotonic() + 20
        while not (folder / "answer").exists():
            assert popen.poll() is None, "the target ended"
            assert time.monotonic() < deadline, "the target does not come up"
            time.sleep(0.01)
        return target

    def popen(
        self,
        argv: list[str],
        environment: dict[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        popen = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if "TARGET_STDERR" not in os.environ else None,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self.popens.append(popen)
        return popen

    def dump(
        self, target: Target, cut: Cut | None = None, options: CaptureOptions | None = None
    ) -> MemoryImage:
        image = MemoryImage()
        self.capture(target.pid, image, cut, options)
        return image

    def capture(
        self,
        pid: int,
        image: MemoryImage,
        cut: Cut | None = None,
        options: CaptureOptions | None = None,
    ) -> CaptureReport:
        return self.engine.capture(pid, image, cut or Cut(), options or CaptureOptions())

    def restore(
        self, image: MemoryImage, options: RestoreOptions | None = None, gate: Gate | None = None
    ) -> RestoredTree:
        tree = self.engine.restore(MemorySource(image), options or RestoreOptions(), gate or Gate())
        self.trees.append(tree)
        return tree

    def kill(self, target: Target) -> None:
        """End a started tree and wait until its numbers are free."""
        pids = proc.tree(target.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for popen in self.popens:
            if popen.pid == target.pid:
                popen.wait()
        deadline = time.monotonic() + 10
        while any(proc.exists(pid) for pid in pids):
            assert time.monotonic() < deadline, "the tree does not end"
            time.sleep(0.005)

    def assert_running(self, target: Target) -> None:
        """The tree runs unfrozen and untraced, and is as it should be."""
        for pid in proc.tree(target.pid):
            assert proc.status(pid).tracer_pid == 0
        assert proc.stat(target.pid).state not in "tTZ"
        target.check()

    def assert_clean(self) -> None:
        """Nothing of an operation is left on the host."""
        assert netfilter.tables("") == self.tables_before
        subs = ("ops", "locks", "tables", "strays")
        for folder in (self.work, *(self.runtime / sub for sub in subs)):
            if folder.exists():
                assert list(folder.iterdir()) == []
        me = os.getpid()
        ours = {popen.pid for popen in self.popens} | {tree.pid for tree in self.trees}
        left = [proc.stat(pid) for pid in proc.children(me) if pid not in ours]
        assert [stat for stat in left if stat.comm in ("criu", "ld-linux-x86-64")] == []

    def close(self) -> None:
        for tree in self.trees:
            tree.kill()
        for popen in filter(self._is_ours, self.popens):
            with contextlib.suppress(errors.NotFound):
                for pid in reversed(proc.tree(popen.pid)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            popen.wait()
        for stream in [each for popen in self.popens for each in (popen.stdin, popen.stdout)]:
            if stream is not None:
                stream.close()

    def _is_ours(self, popen: subprocess.Popen[bytes]) -> bool:
        """Once it has ended, its number may be that of what was restored from it, or anybody's."""
        if popen.poll() is None:
            return True
        with contextlib.suppress(OSError):
            return bytes(self.folder) in Path(f"/proc/{popen.pid}/cmdline").read_bytes()
        return False


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    found = Host(tmp_path)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def boxes(tmp_path: Path) -> Iterator[Any]:
    """Containers by runc; see ``boxes.Boxes``."""
    from tests.host.boxes import boxes_in

    with boxes_in(tmp_path) as found:
        yield found


@pytest.fixture
def program() -> Iterator[Program]:
    made = Program()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=["write-protect", "soft-dirty", "none"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A way of tracking, by the name of its kind: none other is taken."""
    wanted: str = request.param
    if wanted == "soft-dirty" and softdirty.unusable():
        pytest.skip(f"{NOT_TO_BE_HAD}{softdirty.unusable()}; tests/vm has a kernel that does")
    if wanted == "write-protect" and not pagemap.scans():
        pytest.skip(f"{NOT_TO_BE_HAD}this kernel cannot note writes by itself")

    def refuse(*_: object) -> None:
        raise errors.EnvironmentUnfit("not in this test")

    for kind, name in (("write-protect", "Protected"), ("soft-dirty", "SoftDirty")):
        if kind != wanted:
            monkeypatch.setattr(precopy, name, refuse)
    return wanted
