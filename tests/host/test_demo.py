"""The main job, end to end and small: dumped three times, killed, restored, bit-identical."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = [pytest.mark.host, pytest.mark.slow]


def test_a_killed_training_ends_bit_identical_after_its_restore(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "demo.run", "--out", str(out)]
    small = ["--ranks=2", "--hidden=512", "--steps=2400"]
    ran = subprocess.run([*command, *small], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "bit-identical: 2 logs of 2400 steps" in ran.stdout
    assert (out / "loss.png").read_bytes().startswith(_PNG)
    timeline = (out / "timeline.txt").read_text()
    assert all(word in timeline for word in ("dump 3", "criu dump", "kill -9", "trains again"))
    # The comparison is of real work: the weights moved, and steps were lost and done again.
    assert (out / "reference" / "weights.npy").stat().st_size > 1_000_000


def test_a_restore_that_is_not_identical_fails_the_demo(tmp_path: Path) -> None:
    """The demo with an agent that restores nothing but claims success."""
    liar = tmp_path / "ckpt-agent"
    liar.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "print(json.dumps({'name': 'demo@x', 'rawBytes': 1, 'newBytes': 1, 'storedBytes': 1,"
        " 'stopSeconds': 0, 'durableSeconds': 0}))\n"
    )
    liar.chmod(0o755)
    command = [sys.executable, "-m", "demo.run", "--out", str(tmp_path / "out"), "--ranks=2"]
    small = ["--hidden=64", "--steps=4000", f"--agent={liar}"]
    ran = subprocess.run([*command, *small], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 1
    assert "wrote nothing" in ran.stderr
