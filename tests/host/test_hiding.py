"""What CRIU is given in place of a process's own files, by what it then has open."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import numpy as np
import pytest

from agent.engines.criu import hiding
from agent.engines.tracking.copies import Standing
from agent.host import pagemap, proc
from agent.model.streams import AddressSpace

# Opens what CRIU opens of a process, as CRIU does, and says what it got each time.
_ASKS = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
here, pid = -100, sys.argv[1].encode()
base = libc.openat(here, b"/proc", os.O_PATH | os.O_DIRECTORY)
folder = libc.openat(base, pid, os.O_PATH)
for _ in range(2):
    got = libc.openat(folder, b"pagemap", os.O_RDONLY)
    print(os.readlink(f"/proc/self/fd/{got}").replace(f"/{os.getpid()}/", "/own/"))
    os.close(got)
with open(libc.openat(folder, b"smaps", os.O_RDONLY)) as file:
    print(file.read())
"""


@pytest.mark.parametrize("knows_guards", [True, False])
def test_the_process_is_asked_for_its_guard_pages_and_for_no_others(
    monkeypatch: pytest.MonkeyPatch, knows_guards: bool
) -> None:
    monkeypatch.setattr(pagemap, "knows_guards", lambda: knows_guards)
    hidden = hiding.Hiding()
    pid = os.getpid()
    space = AddressSpace("process", pid)
    areas = np.empty((0, 2), dtype=np.int64)
    try:
        hidden.hide([Standing(proc.identity(pid), space, areas)], [], {pid: b"prepared"})
        hidden.start()
        program = [*hidden.under, sys.executable, "-c", _ASKS, str(pid)]
        with subprocess.Popen(
            program, pass_fds=[hidden.descriptor], stdout=subprocess.PIPE, text=True
        ) as asking:
            hidden.release()
            said, _ = asking.communicate(timeout=20)
    finally:
        hidden.close()
    # CRIU asks for guard pages first, and not at all where the kernel has none.
    first = f"/proc/{pid}/pagemap" if knows_guards else "/proc/own/pagemap"
    assert said.split() == [first, "/proc/own/pagemap", "prepared"]


# Opens a process's folder as CRIU does, and says by which number.
_LOOKS = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
base = libc.openat(-100, b"/proc", os.O_PATH | os.O_DIRECTORY)
for pid in sys.argv[1:]:
    print(libc.openat(base, pid.encode(), os.O_PATH), flush=True)
"""


def test_who_asks_while_it_is_not_yet_known_what_is_hidden_is_told_when_it_is() -> None:
    """What CRIU is given then is what it would have been given without the wait."""
    hidden = hiding.Hiding()
    pid = os.getpid()
    areas = np.empty((0, 2), dtype=np.int64)
    standing = Standing(proc.identity(pid), AddressSpace("process", pid), areas)
    try:
        hidden.expect()
        hidden.start()
        program = [*hidden.under, sys.executable, "-c", _LOOKS, str(pid)]
        with subprocess.Popen(
            program, pass_fds=[hidden.descriptor], stdout=subprocess.PIPE, text=True
        ) as asking:
            hidden.release()
            assert asking.stdout is not None
            assert not select.select([asking.stdout], [], [], 1.0)[0]
            hidden.hide([standing], [], {pid: b"prepared"})
            hidden.told()
            said, _ = asking.communicate(timeout=20)
    finally:
        hidden.close()
    assert int(said) > 600


def test_nothing_is_asked_about_folders_from_which_nothing_is_given() -> None:
    """Each question stops CRIU, and with it the tree; threads have folders too."""
    hidden = hiding.Hiding()
    stranger = subprocess.Popen(["sleep", "1000"])
    pid, other = os.getpid(), stranger.pid
    areas = np.empty((0, 2), dtype=np.int64)
    standing = Standing(proc.identity(pid), AddressSpace("process", pid), areas)
    try:
        hidden.hide([standing], [], {pid: b"prepared"})
        hidden.only(1)
        hidden.start()
        program = [*hidden.under, sys.executable, "-c", _LOOKS, str(pid), str(other), "1"]
        with subprocess.Popen(
            program, pass_fds=[hidden.descriptor], stdout=subprocess.PIPE, text=True
        ) as asking:
            hidden.release()
            said, _ = asking.communicate(timeout=20)
    finally:
        hidden.close()
        stranger.kill()
        stranger.wait()
    ours, others, first = map(int, said.split())
    assert ours > 600
    assert others < 600
    assert first > 600
