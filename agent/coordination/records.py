"""Operations in ConfigMaps of the coordinator's own namespace, one each.

Promises: a write that is based on what another replica has changed since is refused, so that a
deposed leader overwrites nothing; a write whose answer was lost is known again as one's own.
No token and nothing of a pod's template is in a record.
Does not: decide what to record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterable

from agent import errors
from agent.kube.configmaps import ConfigMaps, Stored
from agent.kube.connection import Connection
from agent.model import operations
from agent.model.operations import Operation, State

_log = logging.getLogger(__name__)

_PREFIX = "ckpt-agent-operation-"
_LABEL, _VALUE = "app.kubernetes.io/component", "operation"
_OURS = "ckpt-agent.dev/"
_DOCUMENT, _REPLICA = "operation", "replica"
# What a label's value may be; a group may be longer.
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


class Deposed(errors.Unreachable):
    """Another replica has taken the operations over."""


class Records:
    """The records as ``replica`` reads and writes them."""

    def __init__(self, api: Connection, namespace: str, replica: str) -> None:
        self._maps = ConfigMaps(api, namespace, _LABEL, _VALUE)
        self._replica = replica
        self._lock = threading.Lock()
        self._versions: dict[str, str] = {}

    def load(self) -> list[Operation]:
        """All that are recorded, to be written from now on by this replica; what cannot be read
        is told in the log. Raises what ``Connection.call`` does.
        """
        found = []
        for each in self._maps.all():
            operation = _operation(each)
            if operation is not None:
                self._note(operation.id, each)
                found.append(operation)
        return found

    def create(self, operation: Operation) -> Operation:
        """Record a new one; what is recorded, which is another where there is one of its id, whose
        answer was lost or came from a replica that has ended since.

        Raises:
            errors.Conflict: that one cannot be read, or has been begun.
        """
        name = _PREFIX + operation.id
        try:
            stored = self._maps.create(name, self._data(operation), _labels(operation))
        except errors.Conflict:
            there = self._maps.get(name)
            found = _operation(there) if there is not None else None
            if there is None or found is None or found.state is State.RUNNING:
                raise
            if there.data[_REPLICA] == self._replica and found == operation:
                found = operation
            self._note(operation.id, there)
            return found
        self._note(operation.id, stored)
        return operation

    def write(self, operation: Operation) -> None:
        """Record what has become of one.

        Raises:
            Deposed: another replica has recorded something since.
        """
        name = _PREFIX + operation.id
        data, labels = self._data(operation), _labels(operation)
        try:
            stored = self._maps.replace(name, data, labels, self._version(operation.id))
        except (errors.Conflict, errors.NotFound) as exc:
            there = self._maps.get(name)
            if there is None or there.data.get(_REPLICA) != self._replica:
                raise Deposed(
                    f"another replica of the coordinator has operation {operation.id} now",
                    hint="ask again: the Service leads to it",
                ) from exc
            # An answer of ours was lost.
            stored = self._maps.replace(name, data, labels, there.version)
        self._note(operation.id, stored)

    def remove(self, ids: Iterable[str]) -> list[str]:
        """Forget some, and say which; one that cannot be removed now is told in the log."""
        removed = []
        for each in ids:
            try:
                self._maps.remove(_PREFIX + each, self._version(each))
            except errors.CkptError as exc:
                _log.warning("operation %s is not removed: %s", each, exc.message)
                continue
            removed.append(each)
            with self._lock:
                self._versions.pop(each, None)
        return removed

    def _data(self, operation: Operation) -> dict[str, str]:
        document = json.dumps(operation.document(), sort_keys=True, separators=(",", ":"))
        return {_DOCUMENT: document, _REPLICA: self._replica}

    def _note(self, which: str, stored: Stored) -> None:
        with self._lock:
            self._versions[which] = stored.version

    def _version(self, which: str) -> str:
        with self._lock:
            return self._versions.get(which, "")


def _operation(stored: Stored) -> Operation | None:
    try:
        return operations.read(json.loads(stored.data.get(_DOCUMENT, "")))
    except (ValueError, errors.Corrupt) as exc:
        _log.error("ConfigMap %s is no operation: %s", stored.name, exc)
        return None


def _labels(operation: Operation) -> dict[str, str]:
    group = operation.group
    if not _LABEL_VALUE.fullmatch(group):
        group = hashlib.sha256(group.encode()).hexdigest()[:40]
    return {
        _OURS + "namespace": operation.namespace,
        _OURS + "group": group,
        _OURS + "kind": operation.kind.value,
        _OURS + "ended": "true" if operation.over else "false",
    }
