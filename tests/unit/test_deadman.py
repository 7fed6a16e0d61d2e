"""Who stands still while others depend on him is ended; who works is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from agent.host import deadman

_STANDING = """
import sys, time
from agent.host import deadman
with deadman.armed({lease_s}):
    print("armed", flush=True)
    sys.stdin.readline()
print("done", flush=True)
sys.stdin.readline()
"""


def standing(lease_s: float) -> subprocess.Popen[str]:
    popen = subprocess.Popen(
        [sys.executable, "-c", _STANDING.format(lease_s=lease_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert popen.stdout
    assert popen.stdout.readline() == "armed\n"
    return popen


def test_one_that_was_stopped_is_killed() -> None:
    with standing(3.0) as popen:
        popen.send_signal(signal.SIGSTOP)
        assert popen.wait(30) == -signal.SIGKILL


def test_one_that_is_no_longer_armed_stays_stopped() -> None:
    with standing(3.0) as popen:
        assert popen.stdin
        assert popen.stdout
        popen.stdin.write("\n")
        popen.stdin.flush()
        assert popen.stdout.readline() == "done\n"
        popen.send_signal(signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            popen.wait(3.5)
        popen.kill()


def test_one_that_works_goes_on_beyond_the_lease() -> None:
    began_s = time.monotonic()
    with deadman.armed(4.0):
        while time.monotonic() - began_s < 5.0:
            sum(range(10_000))
    assert time.monotonic() - began_s >= 5.0


def test_who_uses_up_the_signals_of_our_user_keeps_us_from_nothing() -> None:
    """As far as we may have more than others; root may."""
    limited = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_SIGPENDING)
resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, hard))
"""
    with subprocess.Popen(
        [sys.executable, "-c", limited + _STANDING.format(lease_s=5.0)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as popen:
        said, _ = popen.communicate("\n\n", timeout=30)
    assert said == "armed\ndone\n"
