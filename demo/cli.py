"""``ckpt-agent`` as a person runs it: a subprocess, its JSON on stdout, its exit status.

Promises: a failure is raised with what the program said and how it was called.
Does not: import anything of the agent.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_DEADLINE_S = 300.0


class AgentFailed(Exception):
    """The program ended with a status other than 0."""


@dataclass(frozen=True)
class Dump:
    """One dump, as ``ckpt-agent dump -o json`` tells of it; ``wall_s`` is the whole call."""

    name: str
    raw_bytes: int
    new_bytes: int
    stored_bytes: int
    stop_s: float
    durable_s: float
    wall_s: float

    @classmethod
    def read(cls, document: dict[str, Any], wall_s: float) -> Dump:
        """Read a document of kind ``DumpReport``."""
        return cls(
            name=document["name"],
            raw_bytes=document["rawBytes"],
            new_bytes=document["newBytes"],
            stored_bytes=document["storedBytes"],
            stop_s=document["stopSeconds"],
            durable_s=document["durableSeconds"],
            wall_s=wall_s,
        )


def installed() -> str:
    """The ``ckpt-agent`` that belongs to this Python."""
    return os.path.join(os.path.dirname(sys.executable), "ckpt-agent")


class Agent:
    """Calls of one program on one store; every call is told to ``said``."""

    def __init__(self, program: str, store: str) -> None:
        self._program = program
        self._store = store
        self.said: list[str] = []

    def command(self, *arguments: str) -> list[str]:
        """The command line of a call, as a list; noted in ``said``."""
        self.said.append(shlex.join(["ckpt-agent", *arguments]))
        return [self._program, *arguments, "--store", self._store, "-o", "json"]

    def dump(self, pids: Sequence[int], name: str) -> Dump:
        """Dump the trees below ``pids`` as the next epoch of ``name``, as quickly as it goes: at
        the default pace, which spares a job, this short one would be over before its third dump.
        """
        named = [word for pid in pids for word in ("--pid", str(pid))]
        named += ["--precopy-cpu", "100"]
        began_s = time.monotonic()
        document = self._run(self.command("dump", *named, "--name", name))
        return Dump.read(document, time.monotonic() - began_s)

    def verify(self, image: str) -> float:
        """Read and check the whole image; return the seconds it took."""
        began_s = time.monotonic()
        self._run(self.command("verify", image))
        return time.monotonic() - began_s

    def _run(self, command: list[str]) -> dict[str, Any]:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE_S
        )
        if ran.returncode:
            raise AgentFailed(told(command, ran.returncode, ran.stdout + ran.stderr))
        document: dict[str, Any] = json.loads(ran.stdout)
        return document


def told(command: Sequence[str], status: int, text: str) -> str:
    """The message about a call that failed."""
    return f"{shlex.join(command)}\nended with status {status}:\n{text.strip()}"
