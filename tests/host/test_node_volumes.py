"""A volume that gets full or read-only around a restore, through the node's API: a real file system
of its own.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.base import RestoredTree
from tests.host import nodes
from tests.host.conftest import Host, Target
from tests.host.nodes import VERBS, Node

Fault = Callable[[Path], None]


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "volume"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root)], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def fill(volume: Path) -> None:
    """Not a byte more fits."""
    with open(volume / "filler", "wb", buffering=0) as file:
        for size_bytes in (1 << 20, 4096):
            while _fits(file.fileno(), size_bytes):
                pass


def _fits(fd: int, size_bytes: int) -> bool:
    try:
        os.write(fd, bytes(size_bytes))
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        return False
    return True


def forbid(volume: Path) -> None:
    """Nothing can be written any more."""
    subprocess.run(["mount", "-o", "remount,bind,ro", str(volume)], check=True)


def heal(volume: Path) -> None:
    subprocess.run(["mount", "-o", "remount,bind,rw", str(volume)], check=True)
    (volume / "filler").unlink(missing_ok=True)


class Meddling:
    """The engine; ``meddle`` is called when it is to restore, before anything is."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.name = host.engine.name
        self.promises = host.engine.promises
        self.capture = host.engine.capture
        self.check_restore = host.engine.check_restore
        self.meddle: Callable[[], None] = lambda: None

    def restore(self, source: Any, options: Any, gate: Any) -> RestoredTree:
        self.meddle()
        tree = self._host.engine.restore(source, options, gate)
        self._host.trees.append(tree)
        return tree


class Place:
    """A node whose store is on ``volume``, an image in it, and a placeholder that waits for it."""

    def __init__(self, node: Node, host: Host, volume: Path, engine: Meddling) -> None:
        self.node, self.host, self.volume, self.engine = node, host, volume, engine
        self.target: Target = host.start()
        node.add_pod("counter", self.target.pid)
        with node.caller(*VERBS) as agent:
            outcome = agent.dump("default", "counter", pod_uid="", deadline_s=60.0, stop=True)
        for popen in host.popens:
            popen.wait()
        node.api.remove("counter")
        node.cri.containers.clear()
        self.image = f"counter@{outcome.image.epoch}"
        self.placeholder = host.popen(["sleep", "100"])
        node.states[self.placeholder.pid] = "waits"
        self.uid = node.add_pod("counter", self.placeholder.pid)

    def restore(self) -> None:
        with self.node.caller(*VERBS) as agent:
            agent.restore("default", self.image, "counter", pod_uid="", deadline_s=60.0)

    def holder(self) -> str:
        with self.node.caller(*VERBS) as agent:
            return str(agent.image("default", self.image).restored_into)

    def assert_untouched(self) -> None:
        """Nothing was started, and the placeholder waits on."""
        assert self.host.trees == []
        assert self.placeholder.poll() is None
        self.host.assert_clean()


@pytest.fixture
def place(host: Host, tmp_path: Path, volume: Path) -> Iterator[Place]:
    engine = Meddling(host)
    with nodes.running(tmp_path, engine, shared=volume) as node:
        yield Place(node, host, volume, engine)


@pytest.mark.parametrize(
    ("fault", "expected"), [(fill, errors.VolumeFull), (forbid, errors.VolumeGone)]
)
def test_before_it_is_refused_and_goes_well_once_the_volume_does(
    place: Place, fault: Fault, expected: type[errors.CkptError]
) -> None:
    """Which pod an image went into must be written down first."""
    fault(place.volume)
    with pytest.raises(expected) as caught:
        place.restore()
    assert caught.value.hint
    place.assert_untouched()
    assert place.holder() == ""
    heal(place.volume)
    place.restore()
    place.target.check()
    assert place.holder() == place.uid


@pytest.mark.parametrize("fault", [fill, forbid])
def test_in_its_middle_it_does_no_harm(place: Place, fault: Fault) -> None:
    place.engine.meddle = lambda: fault(place.volume)
    place.restore()
    place.target.check()
    assert place.holder() == place.uid


@pytest.mark.parametrize("fault", [fill, forbid])
def test_a_restore_that_fails_meanwhile_is_told_as_what_it_is_and_can_be_tried_again(
    place: Place, fault: Fault
) -> None:
    def meddle() -> None:
        fault(place.volume)
        raise errors.RestoreFailed("it did not work", hint="try again")

    place.engine.meddle = meddle
    with pytest.raises(errors.RestoreFailed, match="it did not work"):
        place.restore()
    place.assert_untouched()
    heal(place.volume)
    place.engine.meddle = lambda: None
    place.restore()
    place.target.check()
