"""Data-parallel training of a small network by ranks that speak TCP: rank 0 adds up the gradients.

Environment: JOB_COMPLETION_INDEX, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; STEPS (0: for ever),
PACE_S (0.1), HIDDEN (256). Prints loss and parameter sum of every step as exact hexadecimal
floats: two runs of the same length agree in every bit, however often they were interrupted.
"""

import os
import socket
import struct
import sys
import time

import numpy as np

rank = int(os.environ["JOB_COMPLETION_INDEX"])
world = int(os.environ["WORLD_SIZE"])
address = os.environ.get("MASTER_ADDR", "localhost")
port = int(os.environ.get("MASTER_PORT", "29500"))
steps = int(os.environ.get("STEPS", "0"))
pace_s = float(os.environ.get("PACE_S", "0.1"))
hidden = int(os.environ.get("HIDDEN", "256"))
BATCH, FEATURES, CLASSES, RATE = 64, 64, 10, 0.05


def receive(peer: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            sys.exit("a peer is gone")
        data += part
    return bytes(data)


def meet() -> list[socket.socket]:
    """Rank 0's connections to the other ranks, in their order; another rank's one to rank 0."""
    if rank == 0:
        peers: dict[int, socket.socket] = {}
        with socket.create_server(("", port)) as server:
            while len(peers) < world - 1:
                peer, _ = server.accept()
                peers[struct.unpack("<I", receive(peer, 4))[0]] = peer
        return [peers[other] for other in sorted(peers)]
    while True:
        try:
            hub = socket.create_connection((address, port), timeout=5)
            break
        except OSError:
            time.sleep(0.2)
    hub.settimeout(None)
    hub.sendall(struct.pack("<I", rank))
    return [hub]


peers = meet()


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    if rank:
        peers[0].sendall(values.tobytes())
        return np.frombuffer(receive(peers[0], values.nbytes), values.dtype)
    total = values.copy()
    for peer in peers:
        total += np.frombuffer(receive(peer, values.nbytes), values.dtype)
    for peer in peers:
        peer.sendall(total.tobytes())
    return total


# Every rank makes the same data and the same first weights; it trains on its own share.
random = np.random.default_rng(7)
inputs = random.random((2048, FEATURES), np.float32)
labels = (inputs @ random.random((FEATURES, CLASSES), np.float32)).argmax(1)
first = (random.random((FEATURES, hidden), np.float32) - 0.5) * 0.2
second = (random.random((hidden, CLASSES), np.float32) - 0.5) * 0.2

step = 0
while not steps or step < steps:
    chosen = np.random.default_rng([step, rank]).integers(0, len(inputs), BATCH)
    x, y = inputs[chosen], labels[chosen]
    active = np.maximum(x @ first, 0)
    scores = active @ second
    scores = np.exp(scores - scores.max(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    loss = float(-np.log(scores[np.arange(BATCH), y]).mean())
    scores[np.arange(BATCH), y] -= 1
    scores /= BATCH * world
    grad_second = active.T @ scores
    grad_first = x.T @ ((scores @ second.T) * (active > 0))
    flat = sum_over_ranks(np.concatenate([grad_first.ravel(), grad_second.ravel()]))
    first -= RATE * flat[: first.size].reshape(first.shape)
    second -= RATE * flat[first.size :].reshape(second.shape)
    total = float(first.sum(dtype=np.float64) + second.sum(dtype=np.float64))
    step += 1
    print(f"step {step} rank {rank} loss {loss.hex()} params {total.hex()}", flush=True)
    time.sleep(pace_s)
