"""Stores that older versions wrote are read byte for byte, and go on being used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agent import errors
from agent.host import clock
from agent.model.protocol import Decision
from agent.store import catalog, envelope, intents, layout
from agent.store.repository import Store
from agent.store.retention import Retention
from agent.volumes.directory import DirectoryVolume
from tests import images
from tests.compat.make_golden import EPOCHS, GROUP

HERE = Path(__file__).parent
GOLDEN = sorted(HERE.glob("store-v*"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "store"))


def test_there_is_one_of_every_version_so_far() -> None:
    assert [path.name for path in GOLDEN] == [
        f"store-v{version}" for version in range(1, envelope.FORMAT_VERSION + 1)
    ]


def test_every_epoch_is_read_as_it_was_written(golden: Path) -> None:
    store = Store.open(DirectoryVolume(str(golden)))
    epochs = store.epochs()
    assert [summary.facts for summary in epochs] == [{"step": 0}, {"step": 1}]
    for summary, image in zip(epochs, EPOCHS, strict=True):
        assert summary.damage is None
        assert store.verify(GROUP, summary.epoch).good
        images.assert_epoch(store.read(GROUP, summary.epoch), image)


def test_a_new_epoch_builds_on_the_old_ones(golden: Path) -> None:
    store = Store.open(DirectoryVolume(str(golden)))
    with store.begin(GROUP, now_s=images.NOW_S) as epoch:
        images.write(epoch, EPOCHS[1])
        summary = epoch.commit({})
    assert summary.new_bytes == 0
    images.assert_epoch(store.read(GROUP, summary.epoch), EPOCHS[1])


def test_a_store_of_a_newer_version_is_refused(golden: Path) -> None:
    first = golden / layout.STORE
    content = bytearray(first.read_bytes())
    content[len(envelope.MAGIC)] = envelope.FORMAT_VERSION + 1
    newer = bytes(content[:-5])  # whatever else is different there
    first.unlink()
    first.write_bytes(newer)
    with pytest.raises(errors.UnknownFormat) as caught:
        Store.open(DirectoryVolume(str(golden)))
    assert caught.value.hint
    assert first.read_bytes() == newer


def test_joint_epochs_are_what_they_were(tmp_path: Path) -> None:
    store = Store.open(DirectoryVolume(str(shutil.copytree(HERE / "joint-v1", tmp_path / "store"))))
    (summary,) = store.epochs()
    assert summary.facts == {"step": 0}
    assert store.verify(GROUP, summary.epoch).good
    images.assert_epoch(store.read(GROUP, summary.epoch), EPOCHS[0])
    announced = intents.all_announced(store.volume)
    assert [found.intent is not None and found.intent.joint for found in announced] == [True, True]
    undecided = layout.attempt_epoch(announced[0].attempt)
    (abandoned,) = set(catalog.names(store.volume, GROUP)) - {summary.epoch}
    assert summary.epoch < abandoned < undecided
    assert store.decision(GROUP, abandoned) is Decision.ABANDONED
    assert store.decision(GROUP, undecided) is None
    late_s = clock.wall_s() + 1.01 * intents.STALE_S
    assert store.prune(Retention(keep_last=1), now_s=late_s).leftovers == 4
    assert store.decision(GROUP, undecided) is Decision.ABANDONED
    images.assert_epoch(store.read(GROUP, summary.epoch), EPOCHS[0])
