"""Data-parallel training as PyTorch's users write it: DDP over gloo, one process a rank.

Environment: JOB_COMPLETION_INDEX, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (torch's own rendezvous);
STEPS (0: for ever), PACE_S (0.1), HIDDEN (256). Prints loss and parameter sum of every step as
exact hexadecimal floats: two runs of the same length agree in every bit.
"""

import os
import time

# The rendezvous store's libuv back end is not in Debian's build.
os.environ.setdefault("USE_LIBUV", "0")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank = int(os.environ["JOB_COMPLETION_INDEX"])
world = int(os.environ["WORLD_SIZE"])
steps = int(os.environ.get("STEPS", "0"))
pace_s = float(os.environ.get("PACE_S", "0.1"))
hidden = int(os.environ.get("HIDDEN", "256"))
os.environ.setdefault("MASTER_PORT", "29500")
BATCH, FEATURES, CLASSES = 64, 64, 10

torch.set_num_threads(1)
torch.set_num_interop_threads(1)
torch.use_deterministic_algorithms(True)
dist.init_process_group("gloo", rank=rank, world_size=world)

# Every rank makes the same data and the same first weights; it trains on its own share.
torch.manual_seed(7)
inputs = torch.rand(2048, FEATURES)
labels = (inputs @ torch.rand(FEATURES, CLASSES)).argmax(1)
model = DistributedDataParallel(
    torch.nn.Sequential(
        torch.nn.Linear(FEATURES, hidden),
        torch.nn.GELU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(hidden, CLASSES),
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loss_of = torch.nn.CrossEntropyLoss()
torch.manual_seed(100 + rank)  # from here on each rank draws its own batches and dropout

step = 0
while not steps or step < steps:
    chosen = torch.randint(len(inputs), (BATCH,))
    optimizer.zero_grad()
    loss = loss_of(model(inputs[chosen]), labels[chosen])
    loss.backward()
    optimizer.step()
    step += 1
    total = sum(p.detach().double().sum().item() for p in model.parameters())
    print(
        f"step {step} rank {rank} loss {loss.item().hex()} params {float(total).hex()}", flush=True
    )
    time.sleep(pace_s)
dist.destroy_process_group()
