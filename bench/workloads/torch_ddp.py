# mypy: ignore-errors
# (torch is not installed where types are checked.)
"""PyTorch DistributedDataParallel over gloo, AdamW, dropout.

Promises: bit-exact steps, one line each.
Does not: end; the bench ends it.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_HIDDEN, _BATCH, _CLASSES = 1024, 64, 10


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.manual_seed(7)
    data = np.load(os.environ["DATA"])
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    dist.init_process_group("gloo", init_method="env://", rank=rank, world_size=world)
    model = DistributedDataParallel(
        nn.Sequential(
            nn.Linear(x.shape[1], _HIDDEN),
            nn.GELU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(_HIDDEN, _CLASSES),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # The same order of samples everywhere, other dropout on each rank.
    order = torch.Generator().manual_seed(11)
    torch.manual_seed(100 + rank)
    step = 0
    while True:
        shuffled = torch.randperm(len(x), generator=order)
        for start in range(0, len(x) - _BATCH * world + 1, _BATCH * world):
            mine = shuffled[start + rank * _BATCH : start + (rank + 1) * _BATCH]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
            loss.backward()
            optimizer.step()
            step += 1
            total = float(sum(p.detach().double().sum() for p in model.parameters()))
            print(f"step {step} loss {loss.item().hex()} params {total.hex()}")
            time.sleep(float(os.environ["PACE"]))


if __name__ == "__main__":
    main()
