"""An image makes one pod unless asked otherwise; what a killed agent was doing is found once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from agent import errors
from agent.model import ids, pods
from agent.node import claims, interrupted
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from agent.volumes.memory import MemoryVolume
from tests import images

IMAGE = "job@20260131-235959-0a1b2c"


def pod(uid: str, name: str = "job") -> pods.Pod:
    return pods.read({"metadata": {"name": name, "namespace": "team-a", "uid": uid}})


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume()


def claim(volume: MemoryVolume, uid: str, *, again: bool = False) -> None:
    with claims.claimed(volume, IMAGE, pod(uid), again=again):
        pass


def test_a_pod_with_the_longest_name_is_dumped_claimed_and_forgotten(tmp_path: Path) -> None:
    group = ids.group_name("x" * 251 + ".9")
    store = Store.open(DirectoryVolume(str(tmp_path), create=True), create=True)
    with store.begin(group, now_s=1.8e9) as writer:
        images.write(writer, images.simple())
        epoch = writer.commit({}).epoch
    assert store.resolve(group) == (group, epoch)
    image = ids.image_name(group, epoch)
    with claims.claimed(store.volume, image, pod("one"), again=False):
        pass
    assert claims.holder(store.volume, image) == "one"
    claims.forget(store.volume, group, epoch)
    assert claims.holder(store.volume, image) == ""
    assert store.verify(group, epoch).good
    with pytest.raises(errors.InvalidInput) as refused:
        ids.group_name("x" * 254)
    assert "1-253" in refused.value.hint


def test_the_second_pod_is_refused_and_told_of_the_first(volume: MemoryVolume) -> None:
    assert claims.holder(volume, IMAGE) == ""
    claim(volume, "one")
    assert claims.holder(volume, IMAGE) == "one"
    with pytest.raises(errors.RestoreConflict, match="one") as caught:
        claim(volume, "two")
    assert caught.value.facts["reasons"]
    claim(volume, "one")
    claim(volume, "two", again=True)
    assert claims.holder(volume, IMAGE) == "two"


def test_a_restore_that_fails_leaves_the_claim_to_whom_it_belonged(volume: MemoryVolume) -> None:
    with (
        pytest.raises(errors.RestoreFailed),
        claims.claimed(volume, IMAGE, pod("one"), again=False),
    ):
        raise errors.RestoreFailed("it failed")
    assert claims.holder(volume, IMAGE) == ""
    claim(volume, "one")
    with (
        pytest.raises(errors.RestoreFailed),
        claims.claimed(volume, IMAGE, pod("two"), again=True),
    ):
        raise errors.RestoreFailed("it failed")
    assert claims.holder(volume, IMAGE) == "one"


def test_of_two_at_once_one_is_refused(volume: MemoryVolume) -> None:
    with claims.claimed(volume, IMAGE, pod("one"), again=False):
        with pytest.raises(errors.RestoreConflict):
            claim(volume, "two")
        assert claims.holder(volume, IMAGE) == "one"


def test_a_damaged_claim_is_a_claim(volume: MemoryVolume) -> None:
    volume.put(f"restored/{IMAGE}", b"\xff{")
    assert claims.holder(volume, IMAGE) == "unknown"
    with pytest.raises(errors.RestoreConflict):
        claim(volume, "one")


def test_a_deleted_image_leaves_no_claim(volume: MemoryVolume) -> None:
    claim(volume, "one")
    group, epoch = IMAGE.split("@")
    claims.forget(volume, ids.group_name(group), ids.epoch_id(epoch))
    assert list(volume.list("restored/")) == []


def test_what_ended_leaves_no_trail_whatever_its_end(tmp_path: Path) -> None:
    trail = interrupted.Trail(str(tmp_path / "pods"))
    assert trail.take() == []
    for failure in (None, errors.DumpFailed("no"), KeyboardInterrupt()):
        ended = contextlib.suppress(errors.DumpFailed, KeyboardInterrupt)
        with ended, trail.noted("dump", pod("u")):
            assert len(list((tmp_path / "pods").iterdir())) == 1
            if failure:
                raise failure
        assert list((tmp_path / "pods").iterdir()) == []


def test_what_was_cut_off_is_found_exactly_once(tmp_path: Path) -> None:
    trail = interrupted.Trail(str(tmp_path))
    context = trail.noted("restore", pod("u"))
    context.__enter__()  # and never left
    (tmp_path / "garbage.json").write_text("{")
    (tmp_path / "other.json").write_text(json.dumps({"of": "another version"}))
    successor = interrupted.Trail(str(tmp_path))
    assert successor.take() == [interrupted.Left("restore", "team-a", "job", "u")]
    assert successor.take() == []


def test_a_directory_that_cannot_be_written_stops_the_operation(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trail = interrupted.Trail(str(tmp_path / "file/pods"))
    with pytest.raises(errors.EnvironmentUnfit), trail.noted("dump", pod("u")):
        raise AssertionError


class _Full(MemoryVolume):
    """Has no room for what names this pod."""

    def put(self, name: str, data: bytes) -> None:
        if b"two" in data:
            raise errors.VolumeFull("the volume is full", hint="prune")
        super().put(name, data)


def test_a_claim_that_cannot_be_written_down_leaves_the_one_there_was() -> None:
    volume = _Full()
    claim(volume, "one")
    with pytest.raises(errors.VolumeFull):
        claim(volume, "two", again=True)
    assert claims.holder(volume, IMAGE) == "one"
