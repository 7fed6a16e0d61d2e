"""A job whose speed can be read: ``python -m bench.busy training|writer DIRECTORY --bytes N``.

``training`` goes through the layers of a network with Adam, as fast as it can, in BLAS's threads;
``writer`` writes to N bytes at random, as fast as numpy can, in one thread. ``DIRECTORY/count`` is
a shared page: at 0 how much was done (u64), from 1 on once it has begun.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import sys
from collections.abc import Iterator

import numpy as np

from bench import mortal

COUNT = struct.Struct("=Q")
_WIDTH, _BATCH = 512, 256
_WRITES, _DRAWS = 1 << 12, 256


def main(arguments: list[str]) -> None:
    """Does not return."""
    parser = argparse.ArgumentParser(prog="python -m bench.busy", description=__doc__)
    parser.add_argument("kind", choices=["training", "writer"])
    parser.add_argument("directory")
    parser.add_argument("--bytes", type=int, required=True)
    options = parser.parse_args(arguments)
    mortal.end_with_parent()
    with open(os.path.join(options.directory, "count"), "r+b") as file:
        shown = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    work = _training if options.kind == "training" else _writer
    for number, _ in enumerate(work(options.bytes), start=1):
        COUNT.pack_into(shown, 0, number)


def _training(size_bytes: int) -> Iterator[None]:
    """One step a layer; the layers are as many as take so much memory."""
    draw = np.random.default_rng(1)
    shape = (_WIDTH, _WIDTH)
    layers = max(1, size_bytes // (_WIDTH * _WIDTH * 4 * 3))
    weights = [draw.standard_normal(shape, dtype=np.float32) * 0.05 for _ in range(layers)]
    first = [np.zeros(shape, dtype=np.float32) for _ in range(layers)]
    second = [np.zeros(shape, dtype=np.float32) for _ in range(layers)]
    batch = draw.standard_normal((_BATCH, _WIDTH), dtype=np.float32)
    while True:
        for at in range(layers):
            out = np.maximum(batch @ weights[at], 0)
            slope = batch.T @ out
            slope /= np.abs(slope).max() + 1
            first[at] += 0.1 * (slope - first[at])
            second[at] += 0.01 * (slope * slope - second[at])
            weights[at] -= 1e-4 * first[at] / (np.sqrt(second[at]) + 1e-6)
            yield


def _writer(size_bytes: int) -> Iterator[None]:
    """Some thousand writes a step."""
    draw = np.random.default_rng(1)
    words = draw.integers(0, 1 << 63, size_bytes // 8, dtype=np.uint64)
    places = [draw.integers(0, len(words), _WRITES) for _ in range(_DRAWS)]
    while True:
        for place in places:
            words[place] += np.uint64(1)
            yield


if __name__ == "__main__":
    main(sys.argv[1:])
