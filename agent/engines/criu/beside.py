"""Something done in a thread of its own while CRIU works.

Promises: its failure is raised where its result is asked for, and nowhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from agent.host import threads

_T = TypeVar("_T")


class Beside(threading.Thread, Generic[_T]):
    """Something done while CRIU works: that time is free."""

    def __init__(self, name: str, function: Callable[[], _T]) -> None:
        super().__init__(name=name, daemon=True)
        self._function = function
        self._value: list[_T] = []
        self._failure: BaseException | None = None
        threads.start(self)

    def run(self) -> None:
        """Do it."""
        try:
            self._value.append(self._function())
        except BaseException as exc:  # noqa: BLE001 - carried to the thread that asks, by result
            self._failure = exc

    def result(self) -> _T:
        """Wait for its end; what it returned. Raises what it raised."""
        self.join()
        if self._failure is not None:
            raise self._failure
        return self._value[0]
