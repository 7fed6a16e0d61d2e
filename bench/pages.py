"""A process tree full of real pages: ``python -m bench.pages DIRECTORY --bytes N``.

A root and its workers hold a stated mix: network weights, optimizer state, Python objects,
program text, text files, zero pages, incompressible bytes. They are told what to do by a request
in ``DIRECTORY/request.json`` and SIGUSR1 to the root, and answer in ``answer-N.json``; no file is
open in between, so that nothing but memory is in an image. Who asked removes the request when all
have answered: a tree restored from before it would answer again, and read all of its memory for it.

Promises: no page is there twice on purpose; a page made dirty keeps the kind of content it had;
``beat-N`` is touched every few milliseconds as long as worker N runs.
Does not: share pages between workers, as the ranks of a real job do.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
# Shares of the whole. The images of real trainings compress 1.8 to 3.3 times with zstd -1; this
# mix is at the lower end of that.
MIX = {
    "float32 weights": 0.18,
    "bfloat16 weights": 0.10,
    "Adam first moments": 0.10,
    "Adam second moments": 0.10,
    "program text": 0.17,
    "text files": 0.12,
    "zero pages": 0.05,
    "incompressible": 0.03,
    "Python objects": 0.15,
}
_RECORD_BYTES = 640  # of one object below, measured with CPython 3.11
_BEAT_S = 0.005
# Pages are made dirty in batches, so that the worker's own memory hardly grows.
_BATCH_PAGES = 8
# How many 8-byte words change in a dirty page of text, program text or zeros.
_CHANGED_WORDS = 8

Bytes = npt.NDArray[np.uint8]
Draw = np.random.Generator


def _normal(draw: Draw, region: Bytes, scale: float) -> None:
    values = region.view(np.float32)
    draw.standard_normal(out=values, dtype=np.float32)
    values *= np.float32(scale)


def _bfloat16(draw: Draw, region: Bytes) -> None:
    halves = region.view(np.uint16)
    for start in range(0, len(halves), 1 << 20):
        part = halves[start : start + (1 << 20)]
        values = draw.standard_normal(len(part), dtype=np.float32) * np.float32(0.02)
        part[:] = values.view(np.uint32) >> np.uint32(16)


def _second_moments(draw: Draw, region: Bytes) -> None:
    _normal(draw, region, 1e-3)
    values = region.view(np.float32)
    np.square(values, out=values)


def _files(paths: list[str], region: Bytes) -> int:
    """Fill ``region`` from files; return how far they reached, in whole pages."""
    filled = 0
    view = region.data
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            while count := file.readinto(view[filled:]):
                filled += count
        if filled == len(region):
            break
    return filled // PAGE_BYTES * PAGE_BYTES


def _objects(draw: Draw, count: int) -> list[dict[str, Any]]:
    numbers = draw.integers(0, 1 << 40, count).tolist()
    return [
        {
            "id": number,
            "name": f"sample-{number:x}",
            "path": f"/data/shard-{number % 977:05d}/{number:012x}.jpg",
            "score": number / 7,
            "box": [number % 640, number % 480, 31.5, 27.25],
        }
        for number in numbers
    ]


class Worker:
    """One process's memory."""

    def __init__(self, directory: str, number: int, size_bytes: int, pools: dict[str, Any]) -> None:
        self._directory = directory
        self._number = number
        self._draw = np.random.default_rng(number + 1)
        self._answered = 0
        self.regions: dict[str, Bytes] = {}
        fill: dict[str, Callable[[Bytes], int | None]] = {
            "float32 weights": lambda r: _normal(self._draw, r, 0.02),
            "bfloat16 weights": lambda r: _bfloat16(self._draw, r),
            "Adam first moments": lambda r: _normal(self._draw, r, 1e-3),
            "Adam second moments": lambda r: _second_moments(self._draw, r),
            "program text": lambda r: _files(pools["program"], r),
            "text files": lambda r: _files(pools["text"], r),
            "zero pages": lambda r: r.fill(0),
            "incompressible": lambda r: _noise(self._draw, r),
        }
        for kind, fill_region in fill.items():
            region = _region(size_bytes * MIX[kind])
            reached = fill_region(region)
            self.regions[kind] = region if reached is None else region[:reached]
        count = int(size_bytes * MIX["Python objects"] / _RECORD_BYTES)
        self._kept = _objects(self._draw, count)
        self.sizes = {kind: len(region) for kind, region in self.regions.items()}
        self.sizes["Python objects"] = count * _RECORD_BYTES

    def dirty(self, percent: float) -> npt.NDArray[np.uint64]:
        """Change so many percent of the pages, drawn at random over all kinds but the Python
        objects; return the addresses of the changed pages.
        """
        changed = []
        for kind, region in self.regions.items():
            pages = region.reshape(-1, PAGE_BYTES)
            count = round(len(pages) * percent / 100)
            chosen = np.sort(self._draw.choice(len(pages), count, replace=False))
            for start in range(0, count, _BATCH_PAGES):
                self._change(kind, pages, chosen[start : start + _BATCH_PAGES])
            changed.append(region.ctypes.data + chosen.astype(np.uint64) * np.uint64(PAGE_BYTES))
        return np.concatenate(changed)

    def digest(self) -> str:
        """A digest over all regions."""
        digest = hashlib.blake2b()
        for region in self.regions.values():
            digest.update(region.data)
        return digest.hexdigest()

    def _change(self, kind: str, pages: Bytes, chosen: npt.NDArray[np.int64]) -> None:
        draw = self._draw
        part = pages[chosen]
        if kind in ("float32 weights", "Adam first moments", "Adam second moments"):
            # One optimizer step: every value moves a little.
            values = part.view(np.float32)
            values *= 1 + np.float32(0.01) * draw.standard_normal(values.shape, dtype=np.float32)
        elif kind == "bfloat16 weights":
            _bfloat16(draw, part.reshape(-1))
        elif kind == "incompressible":
            _noise(draw, part.reshape(-1))
        else:
            words = part.view(np.uint64)
            at = draw.integers(0, words.shape[1], (len(words), _CHANGED_WORDS))
            new = draw.integers(1, 1 << 48, at.shape, dtype=np.uint64)
            np.put_along_axis(words, at, new, axis=1)
        pages[chosen] = part

    def answer(self, request: dict[str, Any] | None) -> None:
        """Do what ``request`` says and write the answer, whole or not at all. A request that was
        answered already is left alone: CPython's sigtimedwait can return as if a signal had come
        when it was interrupted, as it is by a dump, and its time was over meanwhile.
        """
        if request is None or request["serial"] == self._answered:
            return
        self._answered = request["serial"]
        said: dict[str, Any] = {"serial": request["serial"]}
        if request["do"] == "dirty":
            addresses = self.dirty(request["percent"])
            np.save(os.path.join(self._directory, f"dirty-{self._number}.npy"), addresses)
        elif request["do"] == "digest":
            said["digest"] = self.digest()
        else:
            said["sizes"] = self.sizes
        path = os.path.join(self._directory, f"answer-{self._number}.json")
        with open(path + ".new", "w") as file:
            json.dump(said, file)
        os.rename(path + ".new", path)


def _region(size_bytes: float) -> Bytes:
    pages = max(1, int(size_bytes) // PAGE_BYTES)
    area = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(area, np.uint8)


def _noise(draw: Draw, region: Bytes) -> None:
    words = region.view(np.uint64)
    for start in range(0, len(words), 1 << 17):
        part = words[start : start + (1 << 17)]
        part[:] = draw.integers(0, 1 << 64, len(part), dtype=np.uint64)


def _request(directory: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(directory, "request.json")) as file:
            request: dict[str, Any] = json.load(file)
            return request
    except FileNotFoundError:
        return None


def _work(directory: str, number: int, workers: int, size_bytes: int) -> None:
    with open(os.path.join(directory, "pools.json")) as file:
        pools = {name: paths[number::workers] for name, paths in json.load(file).items()}
    # A collection writes into every object's header; the dirty pages are to be the ones named.
    gc.disable()
    worker = Worker(directory, number, size_bytes // workers, pools)
    worker.answer(_request(directory))
    beat = os.path.join(directory, f"beat-{number}")
    with open(beat, "w"):
        pass
    while True:
        if signal.sigtimedwait({signal.SIGUSR1}, _BEAT_S):
            worker.answer(_request(directory))
        os.utime(beat)


def _lead(directory: str, workers: int, size_bytes: int) -> None:
    own = [sys.executable, "-m", "bench.pages", directory, f"--bytes={size_bytes}"]
    started = [
        subprocess.Popen([*own, f"--workers={workers}", f"--worker={number}"])
        for number in range(workers)
    ]
    while signal.sigwait({signal.SIGUSR1, signal.SIGCHLD}) == signal.SIGUSR1:
        for worker in started:
            worker.send_signal(signal.SIGUSR1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGCHLD})
    if options.worker is None:
        _lead(options.directory, options.workers, options.bytes)
    else:
        _work(options.directory, options.worker, options.workers, options.bytes)


if __name__ == "__main__":
    main()
