"""Kubernetes Events on pods: what people see with kubectl describe.

Promises: telling never holds up or fails what is told about; when the API server is away, the
newest events are kept for a while and the rest is dropped with a line in the log.
Does not: repeat what the agent's log and answers say in full.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import queue
import secrets
import threading
from typing import Literal

from agent import errors
from agent.host import clock
from agent.kube.connection import Connection
from agent.model.access import API_GROUP
from agent.model.pods import Pod

_log = logging.getLogger(__name__)

Reason = Literal[
    "CheckpointCompleted", "CheckpointFailed", "RestoreCompleted", "RestoreFailed", "HookFailed"
]

# The API server refuses longer ones.
_NOTE_CHARS = 1024
_WAITING = 100
_CALL_S = 10.0
_ATTEMPTS = 3
_PAUSE_S = 2.0


@dataclasses.dataclass(frozen=True)
class _Told:
    pod: Pod
    reason: Reason
    note: str
    at_s: float


class Happenings:
    """Tells the API server, in a thread of its own. ``close`` it to tell what is still waiting."""

    def __init__(self, api: Connection, node: str) -> None:
        self._api = api
        self._node = node
        self._waiting: queue.Queue[_Told | None] = queue.Queue(_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def tell(self, pod: Pod, reason: Reason, note: str) -> None:
        """Put an event on ``pod``; returns at once."""
        try:
            self._waiting.put_nowait(_Told(pod, reason, note, clock.wall_s()))
        except queue.Full:
            _log.warning("an event was dropped", extra={"facts": {"pod": str(pod)}})

    def close(self, timeout_s: float) -> None:
        """Tell what waits, for at most ``timeout_s``, and end."""
        self._closing.set()
        with contextlib.suppress(queue.Full):  # then the thread ends with the process
            self._waiting.put_nowait(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (told := self._waiting.get()) is not None:
            self._send(told)

    def _send(self, told: _Told) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                self._api.call(
                    "POST",
                    f"/apis/events.k8s.io/v1/namespaces/{told.pod.namespace}/events",
                    f"event on pod {told.pod}",
                    body=self._body(told),
                    read_s=_CALL_S,
                )
            except errors.Unreachable as exc:
                if attempt + 1 == _ATTEMPTS or self._closing.wait(_PAUSE_S):
                    _log.warning("an event could not be told: %s", exc.message)
                    return
            except errors.CkptError as exc:
                _log.warning("an event could not be told: %s", exc.message)
                return
            else:
                return

    def _body(self, told: _Told) -> dict[str, object]:
        pod = told.pod
        moment = datetime.datetime.fromtimestamp(told.at_s, datetime.UTC)
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{pod.name[:200]}.{secrets.token_hex(8)}",
                "namespace": pod.namespace,
            },
            "eventTime": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "type": "Warning" if told.reason.endswith("Failed") else "Normal",
            "reason": told.reason,
            "action": "Restore" if told.reason.startswith("Restore") else "Checkpoint",
            "note": told.note[:_NOTE_CHARS],
            "reportingController": f"{API_GROUP}/node",
            "reportingInstance": self._node[:128],
            "regarding": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": pod.namespace,
                "name": pod.name,
                "uid": pod.uid,
            },
        }
