"""What a plain ``criu dump`` would have cost the job, for comparison.

Promises: the images go to memory, where CRIU is fastest, and are gone afterwards; the job goes on.
Does not: keep anything, or compress.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

_DEADLINE_S = 120.0
_TMPFS = "/dev/shm"


class PlainFailed(Exception):
    """CRIU could not dump the job."""


def installed() -> str:
    """The CRIU that belongs to this Python."""
    return os.path.join(os.path.dirname(sys.executable), "criu")


def dump(criu: str, pid: int) -> int:
    """Dump the tree below ``pid`` while it goes on living; return the bytes of its images.

    Raises:
        PlainFailed: CRIU ended with a status other than 0.
    """
    with tempfile.TemporaryDirectory(dir=_TMPFS, prefix="demo-criu-") as directory:
        command = [criu, "dump", "-t", str(pid), "-D", directory, "-o", "log", "-v1"]
        command += ["--leave-running", "--tcp-established", "--shell-job"]
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE_S
        )
        if ran.returncode:
            with open(os.path.join(directory, "log"), errors="replace") as log:
                said = log.read()[-2000:]
            raise PlainFailed(f"criu dump ended with status {ran.returncode}:\n{said}")
        return sum(entry.stat().st_size for entry in os.scandir(directory))
