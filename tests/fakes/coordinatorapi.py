"""The API server of ``apiserver`` as a coordinator sees it: more than one caller, reviews of tokens
and of others' rights, and objects whose versions count.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

from tests.fakes import apiserver

Json = dict[str, Any]

# As the real one: what a ConfigMap may hold in all.
_DATA_BYTES = 1 << 20


class Handler(apiserver._Handler):
    """``extra`` is shared by all requests of one server."""

    extra: Extra

    def do_PUT(self) -> None:  # noqa: N802  as http.server calls it
        """Replace."""
        self._answer("PUT")

    def _object(
        self, method: str, parts: list[str], query: dict[str, str], body: Any
    ) -> tuple[int, Any]:
        found = self.extra.answer(method, parts, query, body)
        return found or super()._object(method, parts, query, body)


_AWAY = 503, {"message": "the server is currently unable to handle the request"}


class Extra:
    """``callers`` are users by their tokens, ``lacking`` what users may not: (user, verb,
    resource). ``down``: nothing is written; ``lost``: it is, and nobody hears of it. ``written`` is
    called with each object, when it is written and before that is told; ``away`` as many requests
    for JobSets are not answered, and ``busy`` for ConfigMaps.
    """

    def __init__(self) -> None:
        self.callers: dict[str, str] = {}
        self.lacking: set[tuple[str, str, str]] = set()
        self.reviews: list[tuple[str, str, str]] = []
        self.stored: dict[tuple[str, str, str], Json] = {}
        self.down = self.lost = False
        self.written: Callable[[Json], None] = lambda found: None
        self.away = self.busy = 0
        self._version = 100
        self._lock = threading.Lock()

    def change(self, place: tuple[str, str, str], **spec: Any) -> None:
        """Change an object as somebody else would: who has read it before may not write it now."""
        with self._lock:
            found = self.stored[place]
            self._put(place, found | {"spec": found["spec"] | spec})

    def answer(
        self, method: str, parts: list[str], query: dict[str, str], body: Any
    ) -> tuple[int, Any] | None:
        """The answer to a request, None if somebody else knows it."""
        match parts:
            case ("apis", "authentication.k8s.io", *_):
                user = self.callers.get(body["spec"]["token"])
                if user is None or body["spec"].get("audiences"):
                    return 201, {"status": {"error": "invalid bearer token"}}
                status = {"user": {"username": user, "uid": f"uid-{user}"}, "authenticated": True}
                return 201, {"status": status}
            case ("apis", "authorization.k8s.io", "v1", "subjectaccessreviews"):
                wanted = body["spec"]["resourceAttributes"]
                asked = (body["spec"]["user"], wanted["verb"], wanted["resource"])
                self.reviews.append(asked)
                return 201, {"status": {"allowed": asked not in self.lacking}}
            case ("api", "v1", "namespaces", space, "configmaps", *name):
                if (method, name) != ("GET", ["ckpt-agent-ca"]) and self.busy:
                    self.busy -= 1
                    return _AWAY
                if (method, name) != ("GET", ["ckpt-agent-ca"]):
                    return self._stored(method, "configmaps", space, name, query, body)
            case ("apis", "coordination.k8s.io", "v1", "namespaces", space, "leases", *name):
                return self._stored(method, "leases", space, name, query, body)
            case ("apis", "jobset.x-k8s.io", *_) if self.away:
                self.away -= 1
                return _AWAY
        return None

    def _stored(
        self, method: str, kind: str, space: str, name: list[str], query: dict[str, str], body: Any
    ) -> tuple[int, Any]:
        if self.down and method != "GET":
            return _AWAY
        with self._lock:
            code, found = self._kept(method, kind, space, name, query, body)
        if method != "GET" and code < 300:
            self.written(found)
            if self.lost:
                return _AWAY
        return code, found

    def _kept(
        self, method: str, kind: str, space: str, name: list[str], query: dict[str, str], body: Any
    ) -> tuple[int, Any]:
        held = sum(len(each.encode()) for each in (body.get("data") or {}).values())
        if held > _DATA_BYTES:
            return 422, {"message": f"data: Too long: must have at most {_DATA_BYTES} bytes"}
        if method == "GET" and not name:
            key, _, value = query["labelSelector"].partition("=")
            return 200, {
                "items": [
                    copy.deepcopy(each)
                    for (plural, where, _), each in self.stored.items()
                    if (plural, where) == (kind, space)
                    and each["metadata"].get("labels", {}).get(key) == value
                ]
            }
        place = (kind, space, name[0] if name else body["metadata"]["name"])
        found = self.stored.get(place)
        if method == "POST":
            if found is not None:
                return 409, {"message": "already exists"}
            return 201, self._put(place, body)
        if found is None:
            return 404, {"message": "not found"}
        if method == "GET":
            return 200, copy.deepcopy(found)
        wanted = body.get("preconditions") or body.get("metadata") or {}
        if wanted.get("resourceVersion") not in (None, found["metadata"]["resourceVersion"]):
            return 409, {"message": "the object has been modified"}
        if method == "DELETE":
            return 200, self.stored.pop(place)
        return 200, self._put(place, body)

    def _put(self, place: tuple[str, str, str], body: Json) -> Json:
        self._version += 1
        made: Json = copy.deepcopy(body)
        made["metadata"]["resourceVersion"] = str(self._version)
        self.stored[place] = made
        return copy.deepcopy(made)
