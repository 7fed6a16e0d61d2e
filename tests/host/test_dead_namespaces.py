"""A program that cannot be started because its container has just died costs the agent nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A server as the agent has it, and a start in a pid namespace whose first process has ended: the
# kernel refuses it (ENOMEM), and Python then tries again by a fork with everybody's handlers.
START = """
import ctypes, subprocess, threading
from concurrent.futures import ThreadPoolExecutor
from agent import errors, wiring
wiring.prepare_grpc()
import grpc
from agent.host import subprocesses
server = grpc.server(ThreadPoolExecutor(2))
server.add_insecure_port("127.0.0.1:0")
server.start()

def start():
    assert ctypes.CDLL(None).unshare(0x20000000) == 0
    subprocess.run(["true"], check=True)
    try:
        subprocesses.start(["true"])
    except errors.NotFound as exc:
        print(exc.message)

thread = threading.Thread(target=start)
thread.start()
thread.join()
server.stop(0)
print("goes on")
"""


def test_a_start_in_a_container_that_is_dead_fails_and_the_agent_goes_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["cannot run true: Cannot allocate memory", "goes on"]
