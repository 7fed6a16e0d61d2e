# mypy: ignore-errors
# (jax is not installed where types are checked.)
"""jax.distributed with gloo collectives on the CPU: one jitted step over a mesh of ranks, Adam.

Promises: bit-exact steps, one line each.
Does not: end; the bench ends it.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_HIDDEN, _BATCH, _CLASSES = 1024, 64, 10


def _loss(weights, x, y):
    hidden = jax.nn.gelu(jax.nn.gelu(x @ weights[0]) @ weights[1]) @ weights[2]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(hidden), y[:, None], 1))


@jax.jit
def _step(weights, first, second, number, x, y):
    loss, gradient = jax.value_and_grad(_loss)(weights, x, y)
    first = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, first, gradient)
    second = jax.tree.map(lambda a, b: 0.999 * a + 0.001 * b * b, second, gradient)
    scale = 1e-3 * jnp.sqrt(1 - 0.999**number) / (1 - 0.9**number)
    weights = jax.tree.map(
        lambda a, b, c: a - scale * b / (jnp.sqrt(c) + 1e-8), weights, first, second
    )
    return weights, first, second, loss, sum(jnp.sum(a) for a in weights)


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = os.environ["MASTER_ADDR"] + ":" + os.environ["MASTER_PORT"]
    jax.distributed.initialize(where, world, rank)
    data = np.load(os.environ["DATA"])
    x, y = data["x"], data["y"].astype(np.int32)
    mesh = Mesh(np.array(jax.devices()), ("ranks",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("ranks"))
    draw = np.random.default_rng(7)
    shapes = ((x.shape[1], _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, _CLASSES))
    start = [draw.normal(0, (2 / a) ** 0.5, (a, b)).astype(np.float32) for a, b in shapes]

    def replicated(arrays):
        return [
            jax.make_array_from_callback(a.shape, everywhere, lambda i, a=a: a[i]) for a in arrays
        ]

    weights = replicated(start)
    first, second = (replicated([np.zeros_like(a) for a in start]) for _ in range(2))
    number = 0
    while True:
        order = draw.permutation(len(x))
        for at in range(0, len(x) - _BATCH * world + 1, _BATCH * world):
            mine = order[at + rank * _BATCH : at + (rank + 1) * _BATCH]
            batch = [jax.make_array_from_process_local_data(split, a[mine]) for a in (x, y)]
            number += 1
            weights, first, second, loss, total = _step(
                weights, first, second, np.float32(number), *batch
            )
            print(f"step {number} loss {float(loss).hex()} params {float(total).hex()}")
            time.sleep(float(os.environ["PACE"]))


if __name__ == "__main__":
    main()
