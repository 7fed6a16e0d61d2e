"""What CRIU is asked before a restore begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import errors
from agent.engines.criu import probe


def _criu(path: Path, version: str) -> Path:
    """One that tells its version, and notes what it is asked."""
    path.write_text(f'#!/bin/sh\necho "$@" >> {path}.asked\necho Version: {version}\n')
    path.chmod(0o755)
    return path


def test_for_a_restore_criu_is_asked_for_its_version_once_and_for_nothing_else(
    tmp_path: Path,
) -> None:
    path = _criu(tmp_path / "criu", "4.2.1")
    for _ in range(2):
        found = probe.known(str(path))
        assert (found.path, found.version) == (str(path), (4, 2, 1))
    assert Path(f"{path}.asked").read_text() == "--version\n"


@pytest.mark.parametrize("version", ["4.1", "4.3"])
def test_for_a_restore_too_criu_must_be_one_that_is_known(tmp_path: Path, version: str) -> None:
    with pytest.raises(errors.CriuMissing, match=version):
        probe.known(str(_criu(tmp_path / "criu", version)))
