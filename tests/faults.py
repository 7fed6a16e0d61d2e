"""A volume that fails where a test says, and counts every call that could fail.

``fail`` decides by the number and name of a call whether it fails, and how: before it does
anything, or after it was done (a reply that was lost). ``Stopped`` is the world ending: nothing of
what runs afterwards may touch the volume, not even to clean up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator

from agent import errors
from agent.volumes.base import BlobInfo, BlobWriter, Space, Volume


class Stopped(BaseException):
    """The process died here."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What to raise, and whether the call takes effect all the same."""

    error: BaseException
    after: bool = False
    ends_the_world: bool = False


Plan = Callable[[int, str, str], Fault | None]


class FaultyVolume:
    """Passes calls to ``inner``, unless ``plan(number, method, name)`` gives a fault."""

    def __init__(self, inner: Volume, plan: Plan | None = None) -> None:
        self.inner = inner
        self.calls: list[tuple[str, str]] = []
        self.hit = 0
        self._plan = plan
        self._lock = threading.RLock()  # a plan may use the volume itself
        self._ended = False

    @property
    def url(self) -> str:
        return self.inner.url

    @contextlib.contextmanager
    def step(self, method: str, name: str) -> Iterator[None]:
        with self._lock:
            if self._ended:
                raise Stopped
            number = len(self.calls)
            self.calls.append((method, name))
            fault = self._plan(number, method, name) if self._plan is not None else None
            if fault is not None:
                self.hit += 1
                self._ended = fault.ends_the_world
        # An error that is raised again keeps all that its earlier tracebacks hold.
        if fault is not None and not fault.after:
            raise fault.error.with_traceback(None)
        yield
        if fault is not None:
            raise fault.error.with_traceback(None)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BlobWriter]:
        with self.step("create", name):
            context = self.inner.create(name)
        with context as writer:
            yield _FaultyWriter(self, name, writer)

    def put(self, name: str, data: bytes) -> None:
        with self.step("put", name):
            self.inner.put(name, data)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self.step("read", name):
            return self.inner.read(name, offset, length)

    def info(self, name: str) -> BlobInfo:
        with self.step("info", name):
            return self.inner.info(name)

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        with self.step("list", prefix):
            yield from self.inner.list(prefix)

    def delete(self, name: str) -> None:
        with self.step("delete", name):
            self.inner.delete(name)

    def sweep(self, older_than_s: float) -> int:
        with self.step("sweep", ""):
            return self.inner.sweep(older_than_s)

    def space(self) -> Space:
        return self.inner.space()


class _FaultyWriter:
    def __init__(self, volume: FaultyVolume, name: str, inner: BlobWriter) -> None:
        self._volume = volume
        self._name = name
        self._inner = inner

    def write(self, data: bytes | memoryview) -> None:
        with self._volume.step("write", self._name):
            self._inner.write(data)

    def commit(self) -> None:
        with self._volume.step("commit", self._name):
            self._inner.commit()


def at(number: int, fault: Fault) -> Plan:
    """Fail one call."""
    return lambda call, method, name: fault if call == number else None


def from_on(number: int, error: errors.VolumeError) -> Plan:
    """Fail a call and all that follow: the volume is gone."""
    return lambda call, method, name: Fault(error) if call >= number else None


def stop_at(number: int, *, after: bool = False) -> Plan:
    """End the world at a call."""
    return at(number, Fault(Stopped(), after=after, ends_the_world=True))
