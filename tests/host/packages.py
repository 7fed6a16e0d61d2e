"""Programs of other people's that these tests run, from the machine's own Debian."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

CACHE = Path(
    os.environ.get("CKPT_AGENT_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckpt-agent"
)
"""Where what was made once for these tests is kept, as ``scripts/setup`` has it."""
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def install(programs: Mapping[str, str]) -> None:
    """Install the packages of those programs, named program to package, that are not here."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = {
            package for name, package in programs.items() if not shutil.which(name, path=_PATH)
        }
        if not missing:
            return
        # A mirror or a resolver that is away for a moment is asked again for about a minute.
        apt = ["apt-get", "-qq", "-o", "Acquire::Retries=6", "-o", "DPkg::Lock::Timeout=60"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for each in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            subprocess.run([*apt, *each], check=True, stdout=subprocess.DEVNULL, env=environment)
