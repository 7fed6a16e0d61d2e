"""A numpy MLP; rank 0 adds up the gradients that come over plain TCP.

Promises: bit-exact steps, one line each.
Does not: end; the bench ends it.
"""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import numpy.typing as npt

_HIDDEN, _BATCH, _CLASSES = 512, 64, 10
Floats = npt.NDArray[np.float32]


def _receive(peer: socket.socket, values: Floats) -> None:
    view = memoryview(values.view(np.uint8).data)
    while view:
        count = peer.recv_into(view)
        if not count:
            raise SystemExit("a peer is gone")
        view = view[count:]


def _meet(rank: int, world: int) -> list[socket.socket]:
    """The peers to exchange with: all others for rank 0, rank 0 for the others."""
    where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        with socket.create_server(where) as server:
            return [server.accept()[0] for _ in range(world - 1)]
    while True:
        try:
            return [socket.create_connection(where)]
        except ConnectionRefusedError:
            time.sleep(0.1)


def _all_reduce(rank: int, peers: list[socket.socket], values: Floats, scratch: Floats) -> None:
    if rank:
        peers[0].sendall(values.view(np.uint8).data)
        _receive(peers[0], values)
        return
    for peer in peers:
        _receive(peer, scratch)
        values += scratch
    for peer in peers:
        peer.sendall(values.view(np.uint8).data)


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = np.load(os.environ["DATA"])
    x, y = data["x"], data["y"]
    peers = _meet(rank, world)
    shapes = [(x.shape[1], _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, _CLASSES)]
    ends = np.cumsum([a * b for a, b in shapes])
    draw = np.random.default_rng(7)
    parts = [draw.normal(0, (2 / a) ** 0.5, a * b) for a, b in shapes]
    flat = np.concatenate(parts).astype(np.float32)
    first, second, scratch = np.zeros_like(flat), np.zeros_like(flat), np.zeros_like(flat)
    step = 0
    while True:
        order = draw.permutation(len(x))
        for start in range(0, len(x) - _BATCH * world + 1, _BATCH * world):
            mine = order[start + rank * _BATCH : start + (rank + 1) * _BATCH]
            w = [flat[e - a * b : e].reshape(a, b) for e, (a, b) in zip(ends, shapes, strict=True)]
            one = np.maximum(x[mine] @ w[0], 0)
            two = np.maximum(one @ w[1], 0)
            out = two @ w[2]
            out -= out.max(axis=1, keepdims=True)
            out = np.exp(out) / np.exp(out).sum(axis=1, keepdims=True)
            loss = float(-np.log(out[np.arange(_BATCH), y[mine]]).mean())
            out[np.arange(_BATCH), y[mine]] -= 1
            out /= _BATCH
            back = (out @ w[2].T) * (two > 0)
            front = (back @ w[1].T) * (one > 0)
            grads = [x[mine].T @ front, one.T @ back, two.T @ out]
            gradient = np.concatenate([g.ravel() for g in grads]).astype(np.float32)
            _all_reduce(rank, peers, gradient, scratch)
            gradient /= world
            step += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient * gradient
            scale = 1e-3 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            flat = (flat - scale * first / (np.sqrt(second) + 1e-8)).astype(np.float32)
            print(f"step {step} loss {loss.hex()} params {float(flat.sum()).hex()}")
            time.sleep(float(os.environ["PACE"]))


if __name__ == "__main__":
    main()
