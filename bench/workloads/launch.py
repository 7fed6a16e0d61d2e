"""Starts the ranks of a job and waits: ``python launch.py SCRIPT RANKS DIRECTORY``.

Promises: ends all ranks if one fails; uses the standard library only, like the launchers of
frameworks whose Python may be older.
Does not: know what it launches.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def main(script: str, ranks: int, directory: str) -> int:
    """Return 0, or 1 after a failure."""
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(ranks):
        with open(os.path.join(directory, f"rank-{rank}.log"), "w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-u", script],
                    env=os.environ | job | {"RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    _, status = os.wait()
    for rank_process in started:
        rank_process.terminate()
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
