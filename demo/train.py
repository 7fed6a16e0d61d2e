"""Data-parallel training on this machine: ``python -m demo.train DIRECTORY``.

Starts the ranks as child processes and waits for them, as torchrun and mpirun do. Each rank
writes ``rank-N.log`` (one line a step) and rank 0 ``weights.npy`` at the end.

Promises: two runs with the same options write the same bytes. If a rank fails, the others are
ended and the exit status is 1.
Does not: know anything of checkpoints.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

# One thread a rank: sums must not depend on how the work was split.
_DETERMINISTIC = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=48, help="per rank")
    parser.add_argument("--seed", type=int, default=7)
    # What the launcher tells a rank.
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--listener", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ports", help=argparse.SUPPRESS)
    return parser


def launch(options: argparse.Namespace) -> int:
    """Start all ranks, wait for them, return the job's exit status."""
    os.makedirs(options.directory, exist_ok=True)
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(options.ranks)]
    ports = ",".join(str(listener.getsockname()[1]) for listener in listeners)
    same = [f"--{name}={getattr(options, name)}" for name in ("steps", "hidden", "batch", "seed")]
    ranks = []
    for rank, listener in enumerate(listeners):
        fd = listener.fileno()
        own = [f"--rank={rank}", f"--listener={fd}", f"--ports={ports}"]
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "demo.train", options.directory, *same, *own],
                pass_fds=(fd,),
                env=os.environ | _DETERMINISTIC,
            )
        )
    for listener in listeners:
        listener.close()
    try:
        return wait(ranks)
    finally:
        for left in ranks:
            if left.returncode is None:
                left.terminate()


def wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; at the first failure end the others. Return 0, or 1 after a failure."""
    left = {rank.pid: rank for rank in ranks}
    failed = False
    while left:
        pid, status = os.wait()
        ended = left.pop(pid, None)
        if ended is None:
            continue
        ended.returncode = os.waitstatus_to_exitcode(status)
        if ended.returncode and not failed:
            failed = True
            for other in left.values():
                other.terminate()
    return int(failed)


def main() -> int:
    options = _parser().parse_args()
    if options.rank is None:
        return launch(options)
    from demo import rank  # here: numpy must not load before its threads are set

    plan = rank.Plan(options.steps, options.hidden, options.batch, options.seed)
    ports = [int(port) for port in options.ports.split(",")]
    rank.main(options.directory, plan, options.rank, options.listener, ports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
