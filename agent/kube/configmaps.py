"""ConfigMaps that hold one document each, found by a label.

Promises: a write says which version it is based on, so that of two writers one is told
(``errors.Conflict``) instead of undoing the other's.
Does not: watch, or know what the documents mean.
"""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Mapping

from agent import errors
from agent.kube.connection import Connection, Json

# The API server answers in milliseconds, and whoever writes holds something up.
_READ_S = 5.0
_PAGE = 100


@dataclasses.dataclass(frozen=True)
class Stored:
    """A ConfigMap as it is: its ``data``, and its ``version`` for the next write."""

    name: str
    data: Mapping[str, str]
    version: str


class ConfigMaps:
    """Those of ``namespace`` with the label ``key=value``."""

    def __init__(self, api: Connection, namespace: str, key: str, value: str) -> None:
        self._api, self._namespace = api, namespace
        self._label = (key, value)
        self._all = f"/api/v1/namespaces/{urllib.parse.quote(namespace, safe='')}/configmaps"

    def all(self) -> list[Stored]:
        """Every one of them. Raises what ``Connection.call`` does; so for the others."""
        query = {"labelSelector": "=".join(self._label), "limit": str(_PAGE)}
        what = f"list of ConfigMaps in {self._namespace}"
        found: list[Stored] = []
        while True:
            answer = self._api.call("GET", self._all, what, query=query, read_s=_READ_S)
            found += [_stored(each) for each in answer.get("items") or ()]
            rest = (answer.get("metadata") or {}).get("continue")
            if not rest:
                return found
            query["continue"] = str(rest)

    def get(self, name: str) -> Stored | None:
        """One of them; None if it is not there."""
        try:
            return _stored(
                self._api.call("GET", self._path(name), self._what(name), read_s=_READ_S)
            )
        except errors.NotFound:
            return None

    def create(self, name: str, data: Mapping[str, str], labels: Mapping[str, str]) -> Stored:
        """Make one. Raises ``errors.Conflict`` if there is one of its name."""
        body = self._body(name, data, labels)
        return _stored(
            self._api.call("POST", self._all, self._what(name), body=body, read_s=_READ_S)
        )

    def replace(
        self, name: str, data: Mapping[str, str], labels: Mapping[str, str], version: str
    ) -> Stored:
        """Write one anew. Raises ``errors.Conflict`` if it is no longer of ``version``."""
        body = self._body(name, data, labels)
        body["metadata"]["resourceVersion"] = version
        return _stored(
            self._api.call("PUT", self._path(name), self._what(name), body=body, read_s=_READ_S)
        )

    def remove(self, name: str, version: str) -> None:
        """Remove one, if it is still of ``version``; one that is gone is well."""
        body: Json = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"resourceVersion": version},
        }
        try:
            self._api.call("DELETE", self._path(name), self._what(name), body=body, read_s=_READ_S)
        except errors.NotFound:
            return

    def _body(self, name: str, data: Mapping[str, str], labels: Mapping[str, str]) -> Json:
        key, value = self._label
        own = {key: value, "app.kubernetes.io/part-of": "ckpt-agent"}
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "labels": {**labels, **own}},
            "data": dict(data),
        }

    def _path(self, name: str) -> str:
        return f"{self._all}/{urllib.parse.quote(name, safe='')}"

    def _what(self, name: str) -> str:
        return f"ConfigMap {self._namespace}/{name}"


def _stored(found: Json) -> Stored:
    metadata = found.get("metadata") or {}
    data = {str(key): str(value) for key, value in (found.get("data") or {}).items()}
    return Stored(str(metadata.get("name")), data, str(metadata.get("resourceVersion")))
