"""With CI=true a skipped test is a failure: what the tests need can be installed. Only a reason
that begins with ``NOT_TO_BE_HAD`` is accepted, for what no installation can bring.
"""

from __future__ import annotations

import os
from collections.abc import Generator
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
