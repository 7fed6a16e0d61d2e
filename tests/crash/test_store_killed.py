"""Real processes on a real directory: killed without warning, and a disk that is really full."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.host import clock
from agent.store import layout
from agent.store.repository import Store
from agent.store.retention import Retention
from agent.volumes.directory import DirectoryVolume
from tests import images
from tests.images import EMPTY, GROUP, NOW_S

KILLS = 12

_BUSY = """
import sys
from agent.store.repository import Store
from agent.store.retention import Retention
from agent.volumes.directory import DirectoryVolume
from tests import images
store = Store.open(DirectoryVolume(sys.argv[1]))
print("ready", flush=True)
for number in range(1000):
    with store.begin(images.GROUP, now_s=images.NOW_S) as epoch:
        images.write(epoch, images.simple(number, 600))
        epoch.commit({"first": number})
    store.prune(Retention(keep_last=3), now_s=images.NOW_S)
"""


def test_a_process_killed_at_any_moment_loses_no_committed_epoch(tmp_path: Path) -> None:
    """It dumps and prunes as fast as it can; every kill hits another moment."""
    rng = random.Random(1)
    volume = DirectoryVolume(str(tmp_path / "store"), create=True)
    store = Store.open(volume, create=True)
    leftovers = kills = 0
    # On a slow machine it takes more of them to hit a process at work.
    while kills < KILLS or (not leftovers and kills < 10 * KILLS):
        kills += 1
        seen = {summary.epoch for summary in store.epochs()}
        busy = subprocess.Popen(
            [sys.executable, "-c", _BUSY, volume.url], stdout=subprocess.PIPE, text=True
        )
        with busy:
            assert busy.stdout is not None
            assert busy.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.0, 0.4))
            busy.send_signal(signal.SIGKILL)
        epochs = store.epochs()
        assert len(epochs) >= min(3, len(seen))
        for summary in epochs:
            assert summary.damage is None
            assert store.verify(GROUP, summary.epoch).good
            image = images.simple(summary.facts["first"], 600)
            images.assert_epoch(store.read(GROUP, summary.epoch), image)
        # The dead process is known to be dead here, so what it left goes at once.
        report = store.prune(Retention(keep_last=3), now_s=clock.wall_s())
        leftovers += report.leftovers
        assert report.blocked == ()
        assert list(volume.list(layout.INTENTS)) == []
    assert leftovers > 0, "no kill hit a process at work"
    volume.sweep(0.0)
    for summary in store.epochs():
        store.delete(GROUP, summary.epoch)
    assert [info.name for info in volume.list()] == EMPTY
    assert os.listdir(tmp_path / "store" / ".unfinished") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _dump_for_ever(store: Store, committed: dict[str, images.Image]) -> None:
    for number in itertools.count():
        image = images.simple(10_000 * number + 1, 1000)
        with store.begin(GROUP, now_s=NOW_S) as epoch:
            images.write(epoch, image)
            committed[epoch.commit({}).epoch] = image


def test_a_disk_that_is_really_full_can_be_pruned_and_used_again(small_disk: Path) -> None:
    volume = DirectoryVolume(str(small_disk))
    store = Store.open(volume, create=True)
    committed: dict[str, images.Image] = {}
    with pytest.raises(errors.VolumeFull):
        _dump_for_ever(store, committed)
    assert len(committed) > 2
    filler = small_disk / "filler"  # not ours: it is left alone, and the last byte is gone
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    assert volume.space().free_bytes == 0
    for summary in store.epochs():
        images.assert_epoch(store.read(GROUP, summary.epoch), committed[summary.epoch])
    report = store.prune(Retention(keep_last=1), now_s=NOW_S)
    assert len(report.removed) == len(committed) - 1
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, images.simple(5, 1000))
        epoch.commit({})
    assert all(store.verify(GROUP, summary.epoch).good for summary in store.epochs())
    assert volume.info(layout.RESERVE).size_bytes > 0
