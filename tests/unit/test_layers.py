"""The layer rules of pyproject.toml hold, and each of them notices a breach."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# (module to plant the import in, the import, a word of the contract that must report it)
BREACHES = [
    ("agent/model/ids.py", "import agent.store.writer", "imports go down only"),
    ("agent/store/writer.py", "import agent.cli.main", "imports go down only"),
    ("agent/store/writer.py", "import agent.engines.base", "imports go down only"),
    ("agent/engines/base.py", "import agent.store.reader", "imports go down only"),
    ("agent/coordinator/restore.py", "import agent.coordination.book", "imports go down only"),
    ("agent/store/reader.py", "import agent.store.writer", "halves of the store"),
    ("agent/node/dump.py", "import agent.node.restore", "halves of a host"),
    ("agent/node/dump.py", "import agent.volumes.directory", "concrete volume or engine"),
    ("agent/cli/main.py", "import agent.engines.criu.engine", "concrete volume or engine"),
    ("agent/node/dump.py", "import agent.engines.container.engine", "concrete volume or engine"),
    ("agent/model/streams.py", "import time", "pure modules"),
    ("agent/store/envelope.py", "import os", "pure modules"),
    ("agent/store/writer.py", "import zstandard", "one door"),
    ("agent/node/dump.py", "import subprocess", "one door"),
    ("agent/node/dump.py", "import click", "one door"),
    ("agent/node/dump.py", "import hooks", "agent does not know the hooks"),
    ("hooks/__init__.py", "import agent.store.writer", "hooks see errors and model only"),
]


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layers")
    for name in ("agent", "hooks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def test_the_tree_as_it_stands_keeps_every_rule(copy: Path) -> None:
    result = lint(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("module", "statement", "contract"), BREACHES)
def test_a_planted_breach_is_reported(
    copy: Path, module: str, statement: str, contract: str
) -> None:
    path = copy / module
    original = path.read_text()
    path.write_text(original + f"\n{statement}\n")
    try:
        result = lint(copy)
    finally:
        path.write_text(original)
    assert result.returncode != 0
    broken = [line for line in result.stdout.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), result.stdout
