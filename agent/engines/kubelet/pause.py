"""How long a container really stands still while its runtime checkpoints it.

CRIU's own figure leaves out that the runtime holds the container until it has packed everything.
The freezer of the container's control group shows it from outside.

Promises: a ``Watch`` looks only; a container whose freezer cannot be seen has no figure, and none
that is wrong.
Does not: notice a stop that is shorter than ``_LOOK_S``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from agent import errors
from agent.host import cgroups, clock

# Fine enough for stops of seconds, and nothing against a core.
_LOOK_S = 0.02
# The file of version 1, of version 2, and how each says "frozen".
_FILES = (("freezer.state", ("FROZEN", "FREEZING")), ("cgroup.events", ("frozen 1",)))
# What to write where, so that it stops, and goes on.
_WRITTEN = {
    "freezer.state": ("freezer.state", "FROZEN", "THAWED"),
    "cgroup.events": ("cgroup.freeze", "1", "0"),
}


class Freezer:
    """The freezer of the container of process ``pid``; one that cannot be seen is never frozen."""

    def __init__(self, pid: int) -> None:
        self._group, self._name, self._signs = _freezer(pid)

    @property
    def seen(self) -> bool:
        """Whether it can be seen."""
        return bool(self._group)

    def frozen(self) -> bool:
        """Whether the container stands still, or is about to."""
        try:
            with open(os.path.join(self._group, self._name), encoding="ascii") as file:
                lines = file.read().splitlines()
        except OSError:
            return False  # the container has ended
        return any(sign in lines for sign in self._signs)

    def freeze(self) -> None:
        """Begin to stop it; one that has ended, or cannot be seen, is fine."""
        self._write(1)

    def thaw(self) -> None:
        """Let it go on; likewise."""
        self._write(2)

    def _write(self, which: int) -> None:
        if not self.seen:
            return
        name, text = _WRITTEN[self._name][0], _WRITTEN[self._name][which]
        with (
            contextlib.suppress(OSError),
            open(os.path.join(self._group, name), "w", encoding="ascii") as file,
        ):
            file.write(text)


class Watch:
    """Watches one container. ``stop_s`` is from the first sight of it frozen to the last, or None
    if it was never seen so.
    """

    def __init__(self, pid: int) -> None:
        self._freezer = Freezer(pid)
        self._end = threading.Event()
        self._first_s: float | None = None
        self._last_s = 0.0
        self._thread = threading.Thread(target=self._watch, name="pause", daemon=True)

    @property
    def stop_s(self) -> float | None:
        """Seconds that it stood still."""
        return None if self._first_s is None else self._last_s - self._first_s

    def start(self) -> None:
        """Begin to look."""
        if self._freezer.seen:
            self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._end.set()
        if self._freezer.seen:
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_S):
            now_s = clock.monotonic_s()
            if self._freezer.frozen():
                self._first_s = self._first_s or now_s
                self._last_s = now_s


@contextlib.contextmanager
def watched(pid: int) -> Iterator[Watch]:
    """Watch the container of process ``pid`` within the context."""
    watch = Watch(pid)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


def _freezer(pid: int) -> tuple[str, str, tuple[str, ...]]:
    """The group, the file in it that tells, and what it then says; "" if there is none to be
    seen.
    """
    with contextlib.suppress(errors.NotFound, errors.EnvironmentUnfit):
        groups = cgroups.directories(pid)
        for name, signs in _FILES:
            for group in groups:
                if os.path.exists(os.path.join(group, name)):
                    return group, name, signs
    return "", "", ()
