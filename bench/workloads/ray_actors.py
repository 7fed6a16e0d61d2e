# mypy: ignore-errors
# (ray is not installed where types are checked.)
"""Ray: actors that train replicas of an MLP; gradients travel through its shared object store.

Promises: bit-exact steps, one line each.
Does not: end; the bench ends it.
"""

from __future__ import annotations

import os
import time

import numpy as np
import ray

_HIDDEN, _BATCH, _CLASSES, _ACTORS = 1024, 64, 10, 2
_STORE_BYTES = 80 << 20  # about the least that ray accepts


@ray.remote
class Replica:
    """One rank: computes a gradient of its own batches, then applies the common one."""

    def __init__(self, rank, path):
        data = np.load(path)
        self._x, self._y = data["x"], data["y"]
        self._order = np.random.default_rng(100 + rank)
        draw = np.random.default_rng(7)
        shapes = [(self._x.shape[1], _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, _CLASSES)]
        self._w = [draw.normal(0, (2 / a) ** 0.5, (a, b)).astype(np.float32) for a, b in shapes]
        self._momentum = [np.zeros_like(w) for w in self._w]

    def gradient(self):
        """The loss and the gradients of one batch."""
        mine = self._order.integers(0, len(self._x), _BATCH)
        x, y, w = self._x[mine], self._y[mine], self._w
        one = np.maximum(x @ w[0], 0)
        two = np.maximum(one @ w[1], 0)
        out = two @ w[2]
        out = np.exp(out - out.max(axis=1, keepdims=True))
        out /= out.sum(axis=1, keepdims=True)
        loss = float(-np.log(out[np.arange(_BATCH), y]).mean())
        out[np.arange(_BATCH), y] -= 1
        back = (out @ w[2].T) * (two > 0)
        front = (back @ w[1].T) * (one > 0)
        return loss, [g / _BATCH for g in (x.T @ front, one.T @ back, two.T @ out)]

    def apply(self, gradients):
        """Take one step along the mean; return the sum of all weights."""
        for w, m, *all_g in zip(self._w, self._momentum, *(g for _, g in gradients), strict=True):
            m *= 0.9
            m += sum(all_g) / len(all_g)
            w -= np.float32(0.05) * m
        return float(sum(w.sum(dtype=np.float64) for w in self._w))


def main() -> None:
    ray.init(
        num_cpus=_ACTORS,
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        _temp_dir=os.environ["RAY_DIR"],
    )
    replicas = [Replica.remote(rank, os.environ["DATA"]) for rank in range(_ACTORS)]
    step = 0
    while True:
        found = ray.get([replica.gradient.remote() for replica in replicas])
        shared = ray.put(found)
        sums = ray.get([replica.apply.remote(shared) for replica in replicas])
        step += 1
        print(f"step {step} loss {found[0][0].hex()} params {sums[0].hex()} {sums[1].hex()}")
        time.sleep(float(os.environ["PACE"]))


if __name__ == "__main__":
    main()
