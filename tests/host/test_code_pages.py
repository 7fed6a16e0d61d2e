"""CRIU lets a process make system calls by an instruction in its own code; the image holds the code
as the job has it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from agent.engines.criu import pageserver
from agent.host import proc
from agent.model.streams import PAGE_BYTES, AddressSpace
from tests.host.conftest import Host
from tests.host.image import MemoryImage

# The window is the time of one system call, and other programs may take it away.
_TRIES = 40


def test_code_that_is_received_while_criu_works_in_it_is_stored_as_the_job_has_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = host.popen(["sleep", "1000"]).pid
    space = AddressSpace("process", pid)
    deadline = time.monotonic() + 10
    while not (code_at := _code_of(pid, "sleep")):
        assert time.monotonic() < deadline
    address = code_at[0]
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        code = os.pread(memory.fileno(), PAGE_BYTES, address)
        receive = pageserver.PageServer._receive_run
        hand_on = pageserver.PageServer._store
        came: list[bytes] = []

        def late(self: Any, run_space: AddressSpace, run: Any) -> None:
            """Receive the page when CRIU's instruction is in it, if that is ever seen."""
            if run.address == address:
                until = time.monotonic() + 0.5
                while os.pread(memory.fileno(), 8, address) == code[:8]:
                    if time.monotonic() > until:
                        break
            receive(self, run_space, run)

        def seen(self: Any) -> None:
            pages = self._pages

            def noted(run_space: AddressSpace, run: Any, data: memoryview) -> None:
                if run.address == address:
                    came.append(bytes(data[:PAGE_BYTES]))
                pages(run_space, run, data)

            self._pages = noted
            hand_on(self)

        monkeypatch.setattr(pageserver.PageServer, "_receive_run", late)
        monkeypatch.setattr(pageserver.PageServer, "_store", seen)
        for _ in range(_TRIES):
            image = MemoryImage()
            host.capture(pid, image)
            (stored,) = [data for run, data in image.runs_of[space] if run.address == address]
            assert stored[:PAGE_BYTES] == code
            if came[-1] != code:
                break
    assert came[-1] != code, "it was never received at the wrong moment"
    host.assert_clean()


def _code_of(pid: int, program: str) -> list[int]:
    """Where the process has the program's code, once it executes it."""
    return [
        each.start for each in proc.maps(pid) if "x" in each.perms and each.path.endswith(program)
    ]
