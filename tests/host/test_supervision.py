"""Answering another program's system calls, by what the kernel says to it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from typing import Any

import pytest

from agent.host import supervision

_ASKS = "import os; os.lseek(os.open('/', os.O_RDONLY), 0, os.SEEK_DATA)"


def test_the_kernel_takes_all_that_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would refuse only makes the answers later."""
    asked: list[int] = []
    real = fcntl.ioctl

    def noted(descriptor: int, request: int, *arguments: Any) -> Any:
        answer = real(descriptor, request, *arguments)
        asked.append(request)
        return answer

    monkeypatch.setattr(fcntl, "ioctl", noted)
    picks = supervision.picking(supervision.Pick(supervision.LSEEK, {2: os.SEEK_DATA}))
    supervisor = supervision.Supervisor(picks, lambda call: 0)
    try:
        supervisor.start()
        program = [*supervisor.under(), sys.executable, "-c", _ASKS]
        with subprocess.Popen(program, pass_fds=[supervisor.descriptor]) as started:
            supervisor.release()
            assert started.wait(20) == 0
    finally:
        supervisor.close()
    assert supervisor.answered == 1
    assert asked[0] == supervision._SET_FLAGS
