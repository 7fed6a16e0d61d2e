"""Which of several replicas does what only one should: a Lease, as Kubernetes' own parts use it.

Promises: at most one holder thinks that it holds, as long as clocks run at about the same speed
(they need not show the same time: another's lease counts from when this process saw it change);
whoever ends in an orderly way lets go at once.
Does not: fence: what the holder does must bear a second one for a moment.
"""

from __future__ import annotations

import datetime

from agent import errors
from agent.host import clock
from agent.kube.connection import Connection, Json

_READ_S = 5.0


class Lease:
    """One candidate for the Lease ``namespace/name``. ``holder`` names it, ``duration_s`` is how
    long a holder that is gone is waited for.
    """

    def __init__(
        self,
        connection: Connection,
        namespace: str,
        name: str,
        *,
        holder: str,
        duration_s: float,
    ) -> None:
        self._connection = connection
        self._all = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name = name
        self._what = f"lease {namespace}/{name}"
        self._holder = holder
        self._duration_s = duration_s
        self._seen: object = None
        self._seen_s = 0.0

    def hold(self) -> bool:
        """Take or renew the lease if that is possible now. Return whether it is held.

        Raises what ``Connection.call`` does, but no ``errors.Conflict``.
        """
        try:
            found = self._get()
            if found is None:
                self._create()
                return True
            if not self._free(found.get("spec") or {}):
                return False
            self._put(found, self._holder)
        except errors.Conflict:
            return False
        return True

    def release(self) -> None:
        """Let another take it at once, if it is held. Raises what ``hold`` does."""
        found = self._get()
        if found is None or (found.get("spec") or {}).get("holderIdentity") != self._holder:
            return
        try:
            self._put(found, "")
        except errors.Conflict:
            return

    def _free(self, spec: Json) -> bool:
        """Whether the lease is ours, nobody's, or its holder has been silent for too long."""
        state = (spec.get("holderIdentity"), spec.get("renewTime"))
        if state != self._seen:
            self._seen, self._seen_s = state, clock.monotonic_s()
        silent_s = clock.monotonic_s() - self._seen_s
        wait_s = float(spec.get("leaseDurationSeconds") or self._duration_s)
        return state[0] in (None, "", self._holder) or silent_s >= wait_s

    def _get(self) -> Json | None:
        try:
            path = f"{self._all}/{self._name}"
            return self._connection.call("GET", path, self._what, read_s=_READ_S)
        except errors.NotFound:
            return None

    def _create(self) -> None:
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name},
            "spec": self._spec({}, self._holder),
        }
        self._connection.call("POST", self._all, self._what, body=body, read_s=_READ_S)

    def _put(self, found: Json, holder: str) -> None:
        body = found | {"spec": self._spec(found.get("spec") or {}, holder)}
        path = f"{self._all}/{self._name}"
        self._connection.call("PUT", path, self._what, body=body, read_s=_READ_S)

    def _spec(self, before: Json, holder: str) -> Json:
        now = datetime.datetime.fromtimestamp(clock.wall_s(), datetime.UTC)
        moment = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = before | {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(1, int(self._duration_s)),
            "renewTime": moment,
        }
        if before.get("holderIdentity") != holder:
            spec["acquireTime"] = moment
            spec["leaseTransitions"] = int(before.get("leaseTransitions") or 0) + 1
        return spec
