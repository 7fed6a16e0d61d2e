"""The bench's side of ``bench.pages``: starts the tree, asks it, watches its pulse, ends it.

Promises: every wait has a deadline; ``Holder.close`` leaves no process behind.
Does not: measure; it only tells what the tree itself shows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.pages import MIX, PAGE_BYTES
from demo import job

_DEADLINE_S = 300.0
_POLL_S = 0.002
# Text that people and programs really have in memory, by the names of files that hold it.
_TEXT = (".py", ".json", ".html", ".md", ".txt", ".h", ".xml", ".js", ".go", ".java", ".rst", ".c")
_SMALLEST_BYTES, _LARGEST_BYTES = 4096, 256 << 20


class HolderFailed(Exception):
    """The process tree did not answer, or answered wrongly."""


def pools(need_bytes: dict[str, int]) -> dict[str, list[str]]:
    """Files of this machine, program text and text, until there is as much as is needed."""
    found: dict[str, list[str]] = {"program": [], "text": []}
    have = dict.fromkeys(found, 0)
    for path, size_bytes in _walk((sys.prefix, "/usr/lib", "/usr/bin", "/usr/local", "/usr/share")):
        kind = "text" if path.endswith(_TEXT) else "program"
        if have[kind] >= need_bytes[kind] or (kind == "program" and not _is_elf(path)):
            continue
        found[kind].append(path)
        have[kind] += size_bytes
        if all(have[kind] >= need_bytes[kind] for kind in found):
            break
    return found


def _walk(tops: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for top in tops:
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    size_bytes = os.lstat(path).st_size
                    if not os.path.islink(path) and _SMALLEST_BYTES <= size_bytes <= _LARGEST_BYTES:
                        yield path, size_bytes


def _is_elf(path: str) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"
    return False


class Holder:
    """A running tree of ``size_bytes`` in ``directory``."""

    def __init__(self, directory: str, size_bytes: int, workers: int = 4) -> None:
        job.become_reaper()
        self._directory = directory
        self._workers = workers
        self._serial = 0
        os.makedirs(directory)
        # Four times the share: each worker takes every fourth file, and some are very large.
        need = {
            "program": int(size_bytes * MIX["program text"] * 4),
            "text": int(size_bytes * MIX["text files"] * 4),
        }
        with open(os.path.join(directory, "pools.json"), "w") as file:
            json.dump(pools(need), file)
        self._write_request({"do": "sizes"})
        sized = [f"--bytes={size_bytes}", f"--workers={workers}"]
        with open(os.path.join(directory, "log"), "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.pages", directory, *sized],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.mix = _total([answer["sizes"] for answer in self._answers()])
        self._pids = [self.pid, *job.descendants(self.pid)]

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def rss_bytes(self) -> int:
        """Anonymous memory of all processes: what an image must hold."""
        total = 0
        for pid in self._pids:
            with open(f"/proc/{pid}/status") as status:
                total += sum(int(s.split()[1]) for s in status if s.startswith("RssAnon:"))
        return total << 10

    def dirty(self, percent: float) -> list[tuple[int, Any]]:
        """Make pages dirty; return, for each worker, its pid and the pages' addresses."""
        self._ask({"do": "dirty", "percent": percent})
        return [
            (pid, np.load(os.path.join(self._directory, f"dirty-{number}.npy")))
            for number, pid in enumerate(self._pids[1:])
        ]

    def digests(self) -> list[str]:
        """A digest of each worker's memory."""
        return [answer["digest"] for answer in self._ask({"do": "digest"})]

    def kill(self) -> None:
        """Kill all processes and wait until their pids are free. Also for a restored tree."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.reap(self._pids)
        self._process.poll()

    def beats_ns(self) -> list[int]:
        """When each worker was last seen running; wall time."""
        return [
            os.stat(os.path.join(self._directory, f"beat-{number}")).st_mtime_ns
            for number in range(self._workers)
        ]

    def wait_running(self, since_ns: int) -> float:
        """Wait for a beat of every worker after ``since_ns``; return seconds from there."""
        until_s = time.monotonic() + _DEADLINE_S
        while (first := min(self.beats_ns())) <= since_ns:
            if time.monotonic() > until_s:
                raise HolderFailed("the restored tree does not run")
            time.sleep(_POLL_S)
        return (first - since_ns) / 1e9

    def _ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        self._write_request(request)
        os.kill(self.pid, signal.SIGUSR1)
        return self._answers()

    def _write_request(self, request: dict[str, Any]) -> None:
        self._serial += 1
        with open(os.path.join(self._directory, "request.json"), "w") as file:
            json.dump(request | {"serial": self._serial}, file)

    def _answers(self) -> list[dict[str, Any]]:
        until_s = time.monotonic() + _DEADLINE_S
        answers: list[dict[str, Any]] = []
        while len(answers) < self._workers:
            if time.monotonic() > until_s or not job.running(self.pid):
                raise HolderFailed(f"no answer; see {self._directory}/log")
            with contextlib.suppress(FileNotFoundError):
                path = os.path.join(self._directory, f"answer-{len(answers)}.json")
                with open(path) as file:
                    answer = json.load(file)
                if answer["serial"] == self._serial:
                    answers.append(answer)
                    continue
            time.sleep(_POLL_S)
        os.unlink(os.path.join(self._directory, "request.json"))
        return answers


class Awakening:
    """When every worker of a tree that does not run yet has given its first sign of life: it looks
    while the block runs, and then until it has come.
    """

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._since_ns = time.time_ns()
        self._first_ns: float = math.nan
        self._thread = threading.Thread(target=self._follow, name="awakening", daemon=True)

    def __enter__(self) -> Awakening:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[1] is None:
            self._thread.join()

    def after_s(self, began_ns: int) -> float:
        """The seconds from ``began_ns`` of wall time, once the block is left.

        Raises:
            HolderFailed: the tree does not run.
        """
        if math.isnan(self._first_ns):
            raise HolderFailed("the restored tree does not run")
        return (self._first_ns - began_ns) / 1e9

    def _follow(self) -> None:
        with contextlib.suppress(HolderFailed):
            took_s = self._holder.wait_running(self._since_ns)
            self._first_ns = self._since_ns + took_s * 1e9


class Pulse:
    """The longest silence of any worker while the block runs: the stop as the job feels it.

    Measured by the workers' own beats, for every tool in the same way, to about 10 ms.
    """

    def __init__(self, holder: Holder) -> None:
        self.longest_s = 0.0
        self._holder = holder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[1] is None:
            # The first beat after the stop ends the silence.
            self._holder.wait_running(time.time_ns())
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        last = self._holder.beats_ns()
        over = False
        while not over:
            over = self._over.wait(_POLL_S)
            now = self._holder.beats_ns()
            gaps = (b - a for a, b in zip(last, now, strict=True))
            self.longest_s = max(self.longest_s, max(gaps) / 1e9)
            last = now


def dirty_content(pages: list[tuple[int, Any]]) -> Iterator[bytes]:
    """The content of the pages that ``Holder.dirty`` named, as it is in the processes now."""
    for pid, addresses in pages:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        try:
            for address in addresses.tolist():
                yield os.pread(fd, PAGE_BYTES, address)
        finally:
            os.close(fd)


def _total(sizes: list[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(each[kind] for each in sizes) for kind in sizes[0]}
