"""Linux 6.1: without asynchronous write protection and PAGEMAP_SCAN, with soft-dirty bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm import machine

_ROOT = Path(__file__).resolve().parents[2]
# Emulated, with other tests beside them.
_TIMEOUT_S = 1500.0
_PYTEST = ".venv/bin/python -m pytest -q -p no:cacheprovider --tb=short"


def succeed(folder: Path, *commands: str) -> str:
    """Run them there, one after the other; their output."""
    script = "\n".join((f"cd {_ROOT}", "export CI=true", "set -e", *commands))
    ran = machine.run(script, folder, _TIMEOUT_S)
    assert ran.status == 0, ran.output
    return ran.output


# Writes all the time, and looks whether its memory holds what it wrote.
_JOB = """
import os, sys, time, zlib
memory = bytearray(os.urandom(1 << 20) * 24)
kept = zlib.crc32(memory[4 << 20:])
for number in range(10**9):
    memory[number % 1024 << 12:(number % 1024 << 12) + 8] = number.to_bytes(8, "little")
    if number % 64 == 0:
        right = zlib.crc32(memory[4 << 20:]) == kept and all(
            memory[n % 1024 << 12:(n % 1024 << 12) + 8] == n.to_bytes(8, "little")
            for n in range(max(0, number - 1023), number + 1))
        with open("said.new", "w") as file:
            print(number, right, file=file)
        os.rename("said.new", "said")
    time.sleep(0.002)
"""
_DUMP_AND_RESTORE = f"""
mkdir /tmp/job
cd /tmp/job
cat > job.py <<'END'{_JOB}END
said() {{ # NUMBER: waits until the job has come so far
  for _ in $(seq 6000); do
    read -r number right < said && [ "$right" = True ] && [ "$number" -gt "$1" ] && return
    sleep 0.1
  done
  return 1
}}
agent() {{ {_ROOT}/.venv/bin/ckpt-agent --store /tmp/store --work-dir /tmp/work "$@"; }}
setsid {_ROOT}/.venv/bin/python job.py < /dev/null > /dev/null 2>&1 &
said 1024
agent dump --pid $! --name job --precopy-cpu 100
agent show job
said $number
kill -9 $!
wait $! || true
agent restore job
rm said
said 1024
said $number
"""


@pytest.mark.timeout(_TIMEOUT_S + 60)
def test_what_is_written_is_known_by_soft_dirty_bits(tmp_path: Path) -> None:
    usable = "from agent.host import softdirty; assert not softdirty.unusable()"
    tests = "tests/host/test_soft_dirty.py tests/host/test_tracking.py -k soft-dirty"
    output = succeed(tmp_path, f".venv/bin/python -c '{usable}'", f"{_PYTEST} {tests}")
    assert " passed" in output


@pytest.mark.timeout(_TIMEOUT_S + 60)
def test_a_job_that_ran_on_while_it_was_copied_comes_back_as_it_was(tmp_path: Path) -> None:
    output = succeed(tmp_path, _DUMP_AND_RESTORE)
    assert "Memory copied while it ran" in output
    assert "What it wrote known by soft-dirty bits" in output
