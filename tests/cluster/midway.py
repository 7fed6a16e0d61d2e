"""The program caught at a moment of its work on the real cluster, and the processes it works on.

Promises: waits end; a program that ended before the moment is a failure, not a moment.
Does not: break anything.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.test_node_agent import CHECKOUT

TOLD_S = 120


def begun(cluster: Cluster, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The program at work, as a person started it."""
    words = [f"{name}={value}" for name, value in environment.items()]
    program = [str(CHECKOUT / ".venv/bin/ckpt-agent"), *arguments, "-o", "json", "--quiet"]
    argv = ["env", f"KUBECONFIG={cluster.kubeconfig}", *words, *program]
    return subprocess.Popen(
        cluster.in_control_plane(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def meet(popen: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait for the moment at which something is to break; the program must not have ended."""
    deadline = time.monotonic() + 60
    while not condition():
        assert popen.poll() is None, popen.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def told(popen: subprocess.Popen[str]) -> dict[str, Any]:
    """What it said in the end: a result, or an error with its ``code``."""
    out, err = popen.communicate(timeout=TOLD_S)
    said: dict[str, Any] = json.loads(out if popen.returncode == 0 else err)
    assert popen.returncode == 0 or (said["code"] and said["message"]), (out, err)
    return said


def processes(cluster: Cluster, namespace: str, name: str, *programs: str) -> list[int]:
    """The processes of a pod's container, as this machine numbers them, the first one first."""
    programs = programs or ("hold", "python3")
    uid = cluster.get("pod", name, "-n", namespace)["metadata"]["uid"]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            named = (entry / "comm").read_text().strip()
            if uid in (entry / "cgroup").read_text() and named in programs:
                found.append(int(entry.name))
    return sorted(found)


def stands(pid: int) -> int:
    """The CRIU that traces the process, as it does from the freeze to the thaw; else 0."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = Path(f"/proc/{pid}/status").read_text()
        tracer = int(status.partition("\nTracerPid:")[2].split()[0])
        # While memory is copied ahead it is the agent, for an instant.
        if tracer and b"criu: " in Path(f"/proc/{tracer}/cmdline").read_bytes():
            return tracer
    return 0
