"""What libraries write to standard error by themselves, as lines of the log."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from agent.host import nativelog

REFUSED = "Handshake failed with error SSL_ERROR_SSL: PEER_DID_NOT_RETURN_A_CERTIFICATE"
LINE = f"I1122 19:36:35.049528   15412 ssl_transport_security.cc:2563] {REFUSED}\n".encode()


def test_what_is_written_to_standard_error_is_logged_and_counted_if_it_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = os.fstat(2).st_ino
    with nativelog.taken_in():
        for _ in range(5):
            os.write(2, LINE)
        os.write(2, b"\nsomething \xff else\n")
        os.write(2, LINE)
    assert os.fstat(2).st_ino == before
    assert [each.getMessage() for each in caplog.records] == [
        REFUSED,
        f"4 times more: {REFUSED}",
        "something \ufffd else",
        REFUSED,
    ]
    assert {each.levelno for each in caplog.records} == {logging.WARNING}


PROGRAM = """
import ctypes, logging, os
from agent.host import nativelog
with nativelog.serving(20):
    os.write(2, b"a library\\n")
logging.warning("afterwards")
with nativelog.serving(20):
    ctypes.CDLL(None).abort()
"""


def test_the_log_goes_to_where_standard_error_was_and_so_does_the_place_of_a_crash() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=30
    )
    first, second, *crash = done.stderr.splitlines()
    assert '"logger": "agent.host.nativelog", "msg": "a library"' in first
    assert '"msg": "afterwards"' in second
    assert any("Fatal Python error: Aborted" in line for line in crash)


FULL = """
import logging, os
from agent.host import nativelog
with nativelog.serving(20):
    for number in range(300):
        logging.warning("line %d", number)
        os.write(2, b"of a library %d\\n" % number)
"""


def test_a_log_that_nothing_can_be_written_to_keeps_nobody_waiting() -> None:
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", FULL], stderr=full, check=True, timeout=30)
