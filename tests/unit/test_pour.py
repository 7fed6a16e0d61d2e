"""Writing into a standing process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence

import pytest

from agent import errors
from agent.engines.criu import pour
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun
from tests.host.image import MemoryImage, MemorySource

SPACE = AddressSpace("process", 7)


class EndsItsTarget(MemorySource):
    """An image whose reading takes so long that the process is dead by then."""

    def __init__(self, pid: int) -> None:
        image = MemoryImage()
        image.pages(SPACE, PageRun(1 << 20, 1, 0), memoryview(b"x" * PAGE_BYTES))
        super().__init__(image)
        self._pid = pid

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        yield from super().read(space, runs)


def test_a_process_that_ends_meanwhile_is_an_error_and_not_a_loop() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    share = pour.Split((), (PageRun(1 << 20, 1, 0),), ())
    with pytest.raises(errors.RestoreFailed, match="ended while") as caught:
        pour.pour(EndsItsTarget(pid), SPACE, share, f"/proc/{pid}/mem", lambda: None)
    assert not isinstance(caught.value, pour.PourRefused)


def test_a_process_that_ended_before_is_no_kernel_that_refuses() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    image = MemoryImage()
    image.pages(SPACE, PageRun(1 << 20, 1, 0), memoryview(b"x" * PAGE_BYTES))
    share = pour.Split((), (PageRun(1 << 20, 1, 0),), ())
    with pytest.raises(errors.RestoreFailed, match="ended while") as caught:
        pour.pour(MemorySource(image), SPACE, share, f"/proc/{pid}/mem", lambda: None)
    assert not isinstance(caught.value, pour.PourRefused)
