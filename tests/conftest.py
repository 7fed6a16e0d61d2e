"""No tests leave a thread that would keep the whole run from ending.

With CI=true a skipped test is a failure: what the tests need can be installed. Only a reason
that begins with ``NOT_TO_BE_HAD`` is accepted, for what no installation can bring.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest

# How long an example takes says something about the machine only. CI asks the same of every commit;
# who runs the tests at home finds new examples.
hypothesis.settings.register_profile(
    "project",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=os.environ.get("CI") == "true",
)
hypothesis.settings.load_profile("project")

NOT_TO_BE_HAD = "cannot be had here: "


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    # An expected failure also reports as skipped, but names itself in ``wasxfail``.
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        reason = str(call.excinfo.value)
        if not reason.startswith(NOT_TO_BE_HAD):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped with CI=true: {reason}"
    return report


@pytest.fixture(autouse=True, scope="module")
def _no_thread_is_left() -> Iterator[None]:
    """Python waits at its end for every thread that is not a daemon, however long."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 30
    while (left := _lasting(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    frames = sys._current_frames()
    for each in left:
        where = "".join(traceback.format_stack(frames[each.ident])) if each.ident in frames else ""
        pytest.fail(f"thread {each.name} is left:\n{where}")


def _lasting(before: set[threading.Thread]) -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each not in before and not each.daemon]


def pytest_unconfigure() -> None:
    """Whatever still keeps the run from ending is named, and the run fails."""
    faulthandler.dump_traceback_later(60, exit=True)
