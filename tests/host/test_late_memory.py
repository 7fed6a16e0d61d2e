"""Whether memory comes while a tree runs or before: what is chosen, and what happens when that
fails.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, Disposition, Fills, RestoreOptions
from agent.engines.criu import lazy, pour, rpc, sites
from agent.host import proc, subprocesses
from agent.model import ids
from agent.node import dump as node_dump
from agent.node import restore as node_restore
from agent.store import blocks, catalog
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests.host.conftest import TARGETS, Cut, Gate, Host
from tests.host.image import MemoryImage, MemorySource
from tests.host.test_epochs import flip
from tests.host.test_lazy_restore import Filled, keepers, until

GROUP = ids.group_name("job")


@pytest.fixture
def filled(host: Host) -> Filled:
    """A running tree with much memory of a known content."""
    folder = host.folder / "target"
    folder.mkdir()
    popen = host.popen([sys.executable, str(TARGETS / "filled.py"), str(folder)])
    target = Filled(folder, popen.pid)
    assert target.said() == "right"
    return target


def big_block(root: Path, epoch: str) -> tuple[Path, int, str]:
    """A block of this epoch's own packs that holds nothing but one of the large areas' pages: its
    pack's file, a place in it, and the pack's name.
    """
    volume = DirectoryVolume(str(root))
    reader = Store.open(volume).read(GROUP, ids.EpochId(epoch))
    member = catalog.read_member(volume, reader._manifest, reader.members[0])
    for ref in member.packs:
        table = blocks.BlockTable(ref, catalog.read_pack_index(volume, ref))
        for block in range(len(table.block_pages) if epoch in ref.name else 0):
            words = memoryview(table.load(volume, block)).cast("Q")[::512]
            if all(word >> 60 == 1 for word in words):
                return root / ref.name, int(table.offsets[block]), ref.name
    raise AssertionError("no such block")


def test_a_block_that_is_found_damaged_while_the_tree_runs_ends_it_and_an_older_image_is_named(
    host: Host, filled: Filled, tmp_path: Path
) -> None:
    other = host.start("memory")
    store = Store.open(DirectoryVolume(str(tmp_path / "store"), create=True), create=True)
    epochs = [
        node_dump.dump(
            *(store, host.engine, GROUP),
            [node_dump.Member(ids.member_name("tree-0"), pid)],
            CaptureOptions(),
        ).epoch.epoch
        for pid in (other.pid, filled.pid)
    ]
    host.kill(other)
    host.kill(filled)
    pack, at, part = big_block(tmp_path / "store", epochs[1])
    flip(pack, at)
    ran: list[bool] = []

    def look(now: node_restore.Progress) -> None:
        if now.phase == "fill":
            ran.append(proc.exists(filled.pid))

    with pytest.raises(errors.Corrupt, match="which ran already, were ended") as caught:
        node_restore.restore(
            store, host.engine, GROUP, RestoreOptions(fills=Fills()), progress=look
        )
    assert ran[0]
    assert caught.value.facts["part"] == part
    older = ids.image_name(GROUP, epochs[0])
    assert caught.value.facts["older_good"] == older
    assert older in caught.value.hint
    assert not proc.exists(filled.pid)
    until(lambda: not keepers())
    host.assert_clean()


class Looked(MemorySource):
    """Knows when it was verified whole."""

    def __init__(self, image: MemoryImage, refuse: bool = False) -> None:
        super().__init__(image)
        self.verified = threading.Event()
        self._refuse = refuse

    def check(self) -> None:
        self.verified.set()
        if self._refuse:
            raise errors.Corrupt("a block is damaged", part="packs/1")
        super().check()


def test_where_little_memory_could_come_late_all_of_it_is_verified_before_anything_starts(
    host: Host, filled: Filled
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    options = RestoreOptions(fills=Fills(least_bytes=1 << 30))
    with pytest.raises(errors.Corrupt, match="damaged"):
        host.engine.restore(Looked(image, refuse=True), options, Gate())
    assert not proc.exists(filled.pid)
    tree = host.engine.restore(Looked(image), options, Gate())
    host.trees.append(tree)
    assert options.fills is not None
    assert options.fills.total_bytes == 0
    assert keepers() == []
    filled.ask("some", "moved", "forgotten", "all")
    tree.kill()
    host.assert_clean()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A kernel that does not let a process wait for its memory; who asked."""
    asked: list[int] = []

    def refuse(descriptor: int, deferred: lazy.Deferred, pid: int) -> None:
        asked.append(pid)
        raise lazy.LateRefused("the kernel refuses")

    monkeypatch.setattr(lazy, "ask_for", refuse)
    yield asked
    assert asked


def test_where_memory_cannot_come_late_all_of_it_comes_first(
    host: Host, filled: Filled, refused: list[int]
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    fills, source = Fills(), Looked(image)
    stood: list[bool] = []
    gate = Gate(restored=lambda: stood.append(source.verified.is_set()))
    tree = host.engine.restore(source, RestoreOptions(fills=fills), gate)
    host.trees.append(tree)
    assert refused == [filled.pid]
    assert stood == [True]
    assert fills.total_bytes == 0
    filled.ask("some", "moved", "forgotten", "all")
    os.kill(tree.pid, 0)
    tree.kill()
    host.assert_clean()


def test_an_interruption_that_comes_when_criu_has_died_is_not_met_by_another_attempt(
    host: Host, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    close = lazy.Daemon.close
    closed: list[lazy.Daemon] = []

    def gone(*_: object) -> None:
        raise rpc.Gone("it died")

    def interrupted(daemon: lazy.Daemon) -> None:
        close(daemon)
        if not closed:
            closed.append(daemon)
            raise KeyboardInterrupt

    monkeypatch.setattr(rpc.Connection, "request", gone)
    monkeypatch.setattr(lazy.Daemon, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host.engine.restore(MemorySource(image), RestoreOptions(fills=Fills()), Gate())
    host.assert_clean()


def test_where_memory_cannot_be_poured_it_is_read_once_more_only(
    host: Host, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    met: list[str] = []

    def refuse(*_: object) -> int:
        met.append("poured")
        raise pour.PourRefused("not allowed")

    monkeypatch.setattr(pour, "pour", refuse)
    monkeypatch.setattr(pour, "write", refuse)
    source = Looked(image)
    tree = host.engine.restore(source, RestoreOptions(fills=Fills()), Gate())
    host.trees.append(tree)
    assert met == ["poured"]
    assert not source.verified.is_set()
    filled.ask("some", "moved", "forgotten", "all")
    tree.kill()
    host.assert_clean()


# By clone3: nobody else comes to have the numbers after this one.
TAKE = """
import ctypes, os, struct, sys, time
number = (ctypes.c_int * 1)(int(sys.argv[1]))
# struct clone_args: SIGCHLD at the end, and one number of the child's choice
asked = struct.pack("=11Q", 0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(number), 1, 0)
child = ctypes.CDLL(None, use_errno=True).syscall(435, asked, len(asked))
if child == 0:
    time.sleep(600)
    os._exit(0)
assert child == number[0], os.strerror(ctypes.get_errno())
"""


def before_criu(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> list[str]:
    """Let ``what`` happen when nothing stood in the way; returns an entry an attempt."""
    attempts: list[str] = []
    configure = sites.InPlace.configure

    def spoiled(site: sites.InPlace, opts: Any) -> None:
        attempts.append("asked")
        if len(attempts) == 1:
            what()
        configure(site, opts)

    monkeypatch.setattr(sites.InPlace, "configure", spoiled)
    return attempts


@pytest.mark.parametrize("stays", [False, True])
def test_a_number_that_is_taken_is_told_at_once_unless_it_is_free_again(
    host: Host, filled: Filled, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    undo = sites.InPlace.undo

    def undone(site: sites.InPlace, *args: Any) -> None:
        if not stays:
            subprocesses.signal_quietly(filled.pid)
        undo(site, *args)

    def take() -> None:
        subprocess.run([sys.executable, "-c", TAKE, str(filled.pid)], check=True)

    monkeypatch.setattr(sites.InPlace, "undo", undone)
    monkeypatch.setattr(sites, "_DEATH_S", 0.5 if stays else 5.0)
    attempts = before_criu(monkeypatch, take)
    fills, source = Fills(), Looked(image)
    if stays:
        with pytest.raises(errors.CriuFailed, match="File exists"):
            host.engine.restore(source, RestoreOptions(fills=fills), Gate())
        assert attempts == ["asked"]
        os.kill(filled.pid, 9)
    else:
        with fills:
            tree = host.engine.restore(source, RestoreOptions(fills=fills), Gate())
            host.trees.append(tree)
            assert attempts == ["asked", "asked"]
            assert fills.total_bytes
            fills.wait(lambda: None)
            filled.ask("some", "moved", "forgotten", "all")
            tree.kill()
    assert not source.verified.is_set()
    host.assert_clean()


def prefaced(host: Host, preface: str, *words: str) -> Filled:
    """The same tree, which does this before anything else, ``words`` being ``sys.argv``."""
    folder = host.folder / "target"
    folder.mkdir()
    script = f"import sys\n{preface}\nsys.argv = ['filled', sys.argv[-1]]\n"
    script += f"exec(open({str(TARGETS / 'filled.py')!r}).read())"
    target = Filled(folder, host.popen([sys.executable, "-c", script, *words, str(folder)]).pid)
    assert target.said() == "right"
    return target


def test_a_failure_that_has_nothing_to_do_with_late_memory_is_told_before_memory_is_read(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listen = "import socket; at = socket.create_server(('127.0.0.1', int(sys.argv[1])))"
    target = prefaced(host, listen, str(port))
    image = host.dump(target)
    host.kill(target)
    taken: list[socket.socket] = []
    attempts = before_criu(
        monkeypatch, lambda: taken.append(socket.create_server(("127.0.0.1", port)))
    )
    source = Looked(image)
    with pytest.raises(errors.CriuFailed, match="bind"):
        host.engine.restore(source, RestoreOptions(fills=Fills()), Gate())
    taken[0].close()
    assert attempts == ["asked"]
    assert not source.verified.is_set()
    host.assert_clean()


ECHO = """
import socket, threading
def echo(peer):
    while said := peer.recv(100):
        peer.sendall(said.upper())
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
threading.Thread(target=echo, args=(peer,), daemon=True).start()
"""


def test_a_peer_that_speaks_between_two_attempts_is_heard_by_the_second(
    host: Host, refused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = prefaced(host, ECHO, str(server.getsockname()[1]))
        peer = server.accept()[0]
    with peer:
        # What nobody took is said again after as long as it was not taken.
        peer.settimeout(60)
        peer.sendall(b"one")
        assert peer.recv(100) == b"ONE"
        image = MemoryImage()
        cut = Cut(disposition=Disposition.KILL)
        host.capture(target.pid, image, cut, CaptureOptions(kill=True))
        host.popens[0].wait()
        undo = sites.InPlace.undo

        def undone(site: sites.InPlace, *args: Any) -> None:
            undo(site, *args)
            peer.sendall(b"two")  # to nobody: a reset would end the connection
            time.sleep(0.3)

        monkeypatch.setattr(sites.InPlace, "undo", undone)
        tree = host.engine.restore(MemorySource(image), RestoreOptions(fills=Fills()), Gate())
        host.trees.append(tree)
        assert peer.recv(100) == b"TWO"
        target.ask("some", "moved", "forgotten", "all")
        tree.kill()
    host.assert_clean()


def test_once_others_count_on_it_a_restore_that_fails_is_not_tried_again(
    host: Host, filled: Filled
) -> None:
    image = host.dump(filled)
    host.kill(filled)
    asked: list[str] = []

    def refuse() -> None:
        asked.append("restored")
        raise errors.RestoreFailed("another member failed")

    source = Looked(image)
    with pytest.raises(errors.RestoreFailed, match="another member failed"):
        host.engine.restore(source, RestoreOptions(fills=Fills()), Gate(restored=refuse))
    assert asked == ["restored"]
    assert not source.verified.is_set()
    assert not proc.exists(filled.pid)
    until(lambda: not keepers())
    host.assert_clean()
