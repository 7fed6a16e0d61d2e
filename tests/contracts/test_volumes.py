"""Every volume keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.volumes.base import Volume
from agent.volumes.directory import DirectoryVolume
from agent.volumes.memory import MemoryVolume
from tests.contracts.volume_contract import VolumeContract
from tests.faults import FaultyVolume


class TestMemory(VolumeContract):
    @pytest.fixture
    def volume(self) -> Volume:
        return MemoryVolume()


class TestMemoryWithCapacity(VolumeContract):
    @pytest.fixture
    def volume(self) -> Volume:
        return MemoryVolume(capacity_bytes=1 << 30)


class TestDirectory(VolumeContract):
    @pytest.fixture
    def volume(self, tmp_path: Path) -> Volume:
        return DirectoryVolume(str(tmp_path / "volume"), create=True)

    @pytest.fixture
    def same(self, volume: Volume) -> Volume:
        return DirectoryVolume(volume.url)


class TestFaultyWithoutFaults(VolumeContract):
    """The wrapper that other tests plan faults with changes nothing by itself."""

    @pytest.fixture
    def volume(self) -> Volume:
        return FaultyVolume(MemoryVolume())
