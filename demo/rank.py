"""One rank of the training job: a numpy MLP on scikit-learn's digits, trained with Adam.

Promises: the same seed, sizes and number of ranks give the same bits at every step on the same
machine, which is why the BLAS must run with one thread (``train`` sees to that).
Does not: know anything of checkpoints. It only writes its log and, at the end, its weights.
"""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import numpy.typing as npt

from demo.ring import Ring

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_PIXELS, _CLASSES = 16 * 16, 10
_EVALUATED_AT_ONCE = 512
# The usual constants of Adam, and a learning rate at which this network learns steadily.
_BETA1, _BETA2, _EPSILON, _RATE = 0.9, 0.999, 1e-8, 3e-4


@dataclass(frozen=True)
class Plan:
    """What is trained: equal on all ranks."""

    steps: int
    hidden: int
    batch: int
    seed: int


def digits() -> tuple[Floats, Ints]:
    """The 1,797 digits at 16 x 16 pixels, each also shifted by two pixels in eight directions."""
    from sklearn.datasets import load_digits  # here: slow, and only ranks need it

    bunch = load_digits()
    small = bunch.images.astype(np.float32) / 16
    big = small.repeat(2, axis=1).repeat(2, axis=2)
    shifted = [np.roll(big, (dy, dx), axis=(1, 2)) for dy in (-2, 0, 2) for dx in (-2, 0, 2)]
    x = np.concatenate(shifted).reshape(len(shifted) * len(big), -1)
    return np.ascontiguousarray(x), np.tile(bunch.target.astype(np.int64), len(shifted))


class Network:
    """Two hidden layers; weights, gradients and moments are flat, so that one sum covers all."""

    def __init__(self, inputs: int, hidden: int, seed: int) -> None:
        shapes = [(inputs, hidden), (hidden, hidden), (hidden, _CLASSES)]
        size = sum(a * b for a, b in shapes)
        self.flat = np.zeros(size, np.float32)
        # The last element carries the loss, so that it is averaged in the same exchange.
        self.gradient = np.zeros(size + 1, np.float32)
        self._first = np.zeros(size, np.float32)
        self._second = np.zeros(size, np.float32)
        self._scratch = np.zeros((2, size), np.float32)
        self._step = 0
        self.layers = _views(self.flat, shapes)
        self._gradients = _views(self.gradient, shapes)
        draw = np.random.default_rng(seed)
        for layer in self.layers:
            draw.standard_normal(out=layer, dtype=np.float32)
            layer *= np.float32((2 / len(layer)) ** 0.5)

    def forward(self, x: Floats) -> tuple[Floats, Floats, Floats]:
        """Both hidden layers and the probabilities of the classes."""
        one = np.maximum(x @ self.layers[0], 0)
        two = np.maximum(one @ self.layers[1], 0)
        out = two @ self.layers[2]
        out -= out.max(axis=1, keepdims=True)
        np.exp(out, out=out)
        out /= out.sum(axis=1, keepdims=True)
        return one, two, out

    def backward(self, x: Floats, y: Ints) -> float:
        """Fill ``gradient`` for one batch; return the batch's mean loss."""
        one, two, out = self.forward(x)
        rows = np.arange(len(y))
        loss = float(-np.log(out[rows, y]).mean())
        out[rows, y] -= 1
        out /= len(y)
        at_two = (out @ self.layers[2].T) * (two > 0)
        at_one = (at_two @ self.layers[1].T) * (one > 0)
        np.matmul(x.T, at_one, out=self._gradients[0])
        np.matmul(one.T, at_two, out=self._gradients[1])
        np.matmul(two.T, out, out=self._gradients[2])
        self.gradient[-1] = loss
        return loss

    def update(self) -> None:
        """One step of Adam along ``gradient``."""
        self._step += 1
        gradient, (one, two) = self.gradient[:-1], self._scratch
        self._first *= _BETA1
        self._first += np.multiply(gradient, 1 - _BETA1, out=one)
        self._second *= _BETA2
        one *= gradient
        self._second += np.multiply(one, (1 - _BETA2) / (1 - _BETA1), out=one)
        scale = _RATE * (1 - _BETA2**self._step) ** 0.5 / (1 - _BETA1**self._step)
        np.sqrt(self._second, out=one)
        one += _EPSILON
        np.multiply(self._first, scale, out=two)
        two /= one
        self.flat -= two

    def accuracy(self, x: Floats, y: Ints) -> float:
        """The share of ``x`` that is classified right."""
        right = 0
        for start in range(0, len(x), _EVALUATED_AT_ONCE):
            part = slice(start, start + _EVALUATED_AT_ONCE)
            _, _, out = self.forward(x[part])
            right += int((out.argmax(axis=1) == y[part]).sum())
        return right / len(x)


def _views(flat: Floats, shapes: list[tuple[int, int]]) -> list[Floats]:
    ends = np.cumsum([a * b for a, b in shapes])
    return [flat[end - a * b : end].reshape(a, b) for end, (a, b) in zip(ends, shapes, strict=True)]


def train(directory: str, plan: Plan, rank: int, ring: Ring, world: int) -> None:
    """Train to the end; log every step to ``rank-N.log``, rank 0 saves ``weights.npy``."""
    network = Network(_PIXELS, plan.hidden, plan.seed)
    x, y = digits()
    order = np.random.default_rng(plan.seed)
    with open(os.path.join(directory, f"rank-{rank}.log"), "w", buffering=1) as log:
        step = 0
        while step < plan.steps:
            shuffled = order.permutation(len(x))
            for start in range(0, len(x) - plan.batch * world + 1, plan.batch * world):
                mine = shuffled[start + rank * plan.batch : start + (rank + 1) * plan.batch]
                own = network.backward(x[mine], y[mine])
                ring.all_reduce(network.gradient)
                network.gradient /= world
                network.update()
                step += 1
                _note(log, step, float(network.gradient[-1]), own, network.flat)
                if step == plan.steps:
                    break
        digest = hashlib.blake2b(network.flat.tobytes(), digest_size=16).hexdigest()
        log.write(f"done accuracy {network.accuracy(x, y).hex()} weights {digest}\n")
    if rank == 0:
        np.save(os.path.join(directory, "weights.npy"), network.flat)


def _note(log: TextIO, step: int, loss: float, own: float, flat: Floats) -> None:
    total = float(flat.sum(dtype=np.float64))
    log.write(f"step {step} loss {loss.hex()} own {own.hex()} params {total.hex()}\n")


def main(directory: str, plan: Plan, rank: int, listener_fd: int, ports: list[int]) -> None:
    """Join the ring and train; ``listener_fd`` is this rank's listening socket."""
    ring = Ring(rank, socket.socket(fileno=listener_fd), ports)
    try:
        train(directory, plan, rank, ring, len(ports))
    finally:
        ring.close()
