"""Programs that are measured: run to their end, timed, with the most memory they had.

Promises: a program that fails or does not end stops the bench, with what it said.
Does not: interpret what a program prints.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_DEADLINE_S = 1200.0
_POLL_S = 0.002


class ProgramFailed(Exception):
    """A program ended with an error, or not at all."""


@dataclass(frozen=True)
class Ran:
    """One run; ``began_ns`` is wall time; ``peak_bytes`` the most memory the program itself had
    at once (not its children), as the kernel counts it.
    """

    stdout: str
    began_ns: int
    took_s: float
    peak_bytes: int


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> Ran:
    """Run ``command``.

    Raises:
        ProgramFailed: it ended with a status other than 0, or not in 20 minutes.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        began_ns, began_s = time.time_ns(), time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=said,
            env=None if env is None else os.environ | env,
            cwd=cwd,
        )
        with _Peak(process.pid) as peak:
            try:
                status = process.wait(_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            took_s = time.monotonic() - began_s
        out.seek(0)
        said.seek(0)
        stdout = out.read()
        if status:
            text = (said.read() + stdout)[-4000:]
            raise ProgramFailed(f"{shlex.join(command)}\nended with status {status}:\n{text}")
        return Ran(stdout, began_ns, took_s, peak.bytes)


class _Peak:
    """The high-water mark of a process's resident memory. It only grows, so that the last look
    before the end misses at most what grew in the last two milliseconds.
    """

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="peak", daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(_POLL_S):
            with (
                contextlib.suppress(FileNotFoundError, ProcessLookupError),
                open(f"/proc/{self._pid}/status") as status,
            ):
                for line in status:
                    if line.startswith("VmHWM:"):
                        self.bytes = max(self.bytes, int(line.split()[1]) << 10)
