"""What is said of the kernel is what a process of these rights, in this place, can really do."""

from __future__ import annotations

import subprocess
import sys

import pytest

SAYS = "from agent.host import kernel; print(kernel.probe().set_pid)"


def says(*under: str) -> bool:
    done = subprocess.run([*under, sys.executable, "-c", SAYS], capture_output=True, check=True)
    return done.stdout.strip() == b"True"


def test_numbers_can_be_given_where_proc_sys_is_read_only() -> None:
    """As in every container."""
    script = 'mount -t proc -o ro proc /proc && exec "$@"'
    assert says("unshare", "--mount", "--pid", "--fork", "sh", "-c", script, "sh")


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("-checkpoint_restore", True),
        ("-sys_admin", True),
        ("-sys_admin,-checkpoint_restore", False),
    ],
)
def test_numbers_can_be_given_by_whoever_has_one_of_two_capabilities(
    without: str, expected: bool
) -> None:
    assert says("setpriv", f"--bounding-set={without}") is expected
