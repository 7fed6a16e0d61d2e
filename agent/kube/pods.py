"""The pods of one node, kept up to date by a watch.

Promises: after ``synced`` what is shown was true a moment ago, or ``stale_s`` says for how long
the API server has not been heard; the watch begins again by itself after whatever broke it; only
this node's pods are asked for.
Does not: change pods.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from agent import errors
from agent.host import clock
from agent.kube.connection import Connection, Events, Json
from agent.model import pods

_log = logging.getLogger(__name__)

_PATH = "/api/v1/pods"
# The server ends a watch after this long, and it begins again: so that one whose peer vanished
# without a word is noticed.
_WATCH_S = 240
# Bookmarks come about once a minute.
_SILENT_S = 120.0
# Between attempts; the last for as long as it takes.
_PAUSES_S = (0.2, 1.0, 2.0, 5.0)
_GONE = 410

Key = tuple[str, str]


class PodWatch:
    """The pods of ``node``. ``start`` it, ``close`` it."""

    def __init__(self, api: Connection, node: str) -> None:
        self._api = api
        self._node = node
        self._changed = threading.Condition()
        self._pods: dict[Key, pods.Pod] = {}
        self._synced = False
        self._heard_s = clock.monotonic_s()
        self._closing = threading.Event()
        self._events: Events | None = None
        self._thread = threading.Thread(target=self._run, name="pods", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """End the watch."""
        with self._changed:
            self._closing.set()
            if self._events is not None:
                self._events.end()
            self._changed.notify_all()
        self._thread.join(_SILENT_S)

    @property
    def synced(self) -> bool:
        """Whether the API server has told all pods once."""
        with self._changed:
            return self._synced

    def check_synced(self) -> None:
        """Return if the API server has told all pods once.

        Raises:
            errors.Unreachable: it has not yet.
        """
        if not self.synced:
            raise errors.Unreachable(
                "the API server has not told this node's pods yet",
                hint="may the agent's ServiceAccount list and watch pods?",
            )

    @property
    def stale_s(self) -> float:
        """Seconds since the API server was last heard."""
        return clock.monotonic_s() - self._heard_s

    def get(self, namespace: str, name: str) -> pods.Pod | None:
        """One pod, or None if there is none of that name on this node."""
        with self._changed:
            return self._pods.get((namespace, name))

    def wait_for(
        self,
        namespace: str,
        name: str,
        good: Callable[[pods.Pod | None], bool],
        deadline: clock.Deadline,
    ) -> pods.Pod | None:
        """The pod as soon as it is ``good``, or as it is when no time is left."""
        key = namespace, name
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing.is_set() or good(self._pods.get(key)), deadline.remaining_s
            )
            return self._pods.get(key)

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            try:
                self._watch(self._list())
                failures = 0
            except errors.CkptError as exc:
                if self._closing.is_set():
                    return
                if failures == 0:
                    _log.warning("the pods of this node are not told: %s", exc.message)
                failures += 1
            self._closing.wait(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])

    def _query(self) -> dict[str, str]:
        return {"fieldSelector": f"spec.nodeName={self._node}"}

    def _list(self) -> str:
        """Take all pods; return the version to watch from."""
        # Version 0 is answered from the API server's memory, without asking etcd.
        found = self._api.call(
            "GET", _PATH, "the pods of this node", query=self._query() | {"resourceVersion": "0"}
        )
        read = [pods.read(each) for each in found.get("items") or []]
        with self._changed:
            self._pods = {(each.namespace, each.name): each for each in read}
            self._synced = True
            self._heard()
        return str(found.get("metadata", {}).get("resourceVersion", ""))

    def _watch(self, version: str) -> None:
        """Follow changes until the server ends the watch or forgets the version."""
        while not self._closing.is_set():
            query = self._query() | {
                "watch": "1",
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(_WATCH_S),
                "resourceVersion": version,
            }
            with self._api.events(
                _PATH, "the pods of this node", query=query, silent_s=_SILENT_S
            ) as events:
                with self._changed:
                    self._events = None if self._closing.is_set() else events
                    self._heard()
                try:
                    for event in events if self._events else ():
                        if event.get("type") == "ERROR":
                            _raise_unless_gone(event.get("object") or {})
                            return  # list again
                        version = self._take(event) or version
                finally:
                    with self._changed:
                        self._events = None

    def _take(self, event: Json) -> str:
        """One change; return the version it stands for."""
        found = event.get("object") or {}
        with self._changed:
            if event.get("type") != "BOOKMARK":
                pod = pods.read(found)
                key = pod.namespace, pod.name
                if event.get("type") == "DELETED":
                    self._pods.pop(key, None)
                else:
                    self._pods[key] = pod
            self._heard()
        return str((found.get("metadata") or {}).get("resourceVersion", ""))

    def _heard(self) -> None:
        self._heard_s = clock.monotonic_s()
        self._changed.notify_all()


def _raise_unless_gone(status: Json) -> None:
    if status.get("code") != _GONE:
        raise errors.Unreachable(
            f"the API server ended the watch: {status.get('message')}", hint="it begins again"
        )
