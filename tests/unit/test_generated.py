"""The Python of proto/ that is checked in is what proto/ says."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("agent/rpc/v1", "agent/cri/v1")


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text()
        for package in PACKAGES
        for path in (root / package).iterdir()
        if path.suffix in (".py", ".pyi")
    }


def test_checked_in_code_equals_what_the_protos_generate(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/proto", tmp_path], check=True, timeout=60)
    assert contents(tmp_path) == contents(ROOT)
