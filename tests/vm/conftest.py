"""The older kernel for the tests, unpacked before the first of them, outside of its time limit."""

from __future__ import annotations

import os
import platform
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.conftest import NOT_TO_BE_HAD
from tests.vm import machine

_built = pytest.StashKey[bool]()


def _unfit() -> str:
    if platform.machine() != "x86_64":
        return f"{NOT_TO_BE_HAD}the older kernel is for x86_64"
    return "" if os.geteuid() == 0 else "needs root"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _unfit()
    for item in items:
        if Path(__file__).parent in item.path.parents and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    ours = Path(__file__).parent in item.path.parents
    if ours and _built not in item.session.stash and not _unfit():
        item.session.stash[_built] = True
        machine.build()
    return (yield)
