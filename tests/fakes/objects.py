"""The API server's store of objects for tests: what ``Connection.call`` sees of it, with resource
versions that make a stale write fail, and faults on request.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

from agent import errors
from agent.kube.connection import Connection


class Objects(Connection):
    """Holds objects by path. ``fail_at`` counts down with every request and fails one of them."""

    def __init__(self) -> None:
        self.name = "the test's cluster"
        self.namespace = "ckpt-agent"
        self.found: dict[str, dict[str, Any]] = {}
        self.writes: list[str] = []
        self._fail_at: int | None = None
        self._failing = threading.Lock()
        self._version = 0

    @property
    def fail_at(self) -> int | None:
        return self._fail_at

    @fail_at.setter
    def fail_at(self, at: int | None) -> None:
        with self._failing:
            self._fail_at = at

    def call(
        self,
        method: str,
        path: str,
        what: str,
        *,
        query: Any = None,
        body: Any = None,
        read_s: float = 0.0,
    ) -> dict[str, Any]:
        with self._failing:
            if self._fail_at is not None:
                self._fail_at -= 1
                if self._fail_at < 0:
                    raise errors.Unreachable(f"{what}: no answer", hint="")
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.found:
                raise errors.Conflict(f"{what} already exists", hint="")
            return self._store(path, body)
        if path not in self.found:
            raise errors.NotFound(f"there is no {what}", hint="")
        if method == "PUT":
            version = body["metadata"].get("resourceVersion")
            if version != self.found[path]["metadata"]["resourceVersion"]:
                raise errors.Conflict(f"{what} was changed", hint="")
            return self._store(path, body)
        assert method == "GET"
        return copy.deepcopy(self.found[path])

    def put(self, path: str, body: dict[str, Any]) -> None:
        """Put an object there, whatever was there before."""
        self._store(path, body)

    def _store(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        self.found[path] = copy.deepcopy(body)
        self.found[path].setdefault("metadata", {})["resourceVersion"] = str(self._version)
        self.writes.append(path)
        return copy.deepcopy(self.found[path])
