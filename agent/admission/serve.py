"""The admission service: the webhook's server and the keeper of certificates, in one process.

Promises: any number of replicas may run; each serves, one at a time keeps the certificates; a
replica is ready when it serves a certificate that the API server trusts; it goes on serving while
the API server cannot be reached.
Does not: end on an error of the cluster: it is told and tried again.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading

from agent import errors
from agent.admission import certificates, review, rotation
from agent.admission.certificates import Pair
from agent.admission.keeper import Keeper, names
from agent.admission.server import Server
from agent.host import clock
from agent.host.clock import Deadline
from agent.kube import jobsets, objects
from agent.kube.connection import Connection
from agent.kube.leases import Lease

logger = logging.getLogger(__name__)

LEASE_NAME = "ckpt-agent-admission"
# How often a replica looks: a removed Secret is made again, and a new certificate served, within
# this time. Two requests each.
_PERIOD_S = 10.0
# A replica that is gone is waited for this long: three missed renewals.
_LEASE_S = 30.0
# Other nodes' proxies send connections here for a while after the pod began to end.
_DRAIN_S = 5.0
_STOP_S = 10.0


@dataclasses.dataclass(frozen=True)
class Options:
    """``image`` is what pods take ``hold`` from, ``holder`` names this replica among others."""

    namespace: str
    image: str
    holder: str
    port: int
    policy: rotation.Policy
    period_s: float = _PERIOD_S
    lease_s: float = _LEASE_S
    drain_s: float = _DRAIN_S


def own_image(connection: Connection, namespace: str, name: str) -> str:
    """The image of the first container of the pod that this runs in: what pods are given is then
    always of the same version as what gives it.

    Raises:
        errors.NotFound: this runs in no such pod. And what ``Connection.call`` does.
    """
    pod = objects.pod(connection, namespace, name)
    return str(pod["spec"]["containers"][0]["image"])


class Admission:
    """One replica. ``run`` serves until ``stop`` is set."""

    def __init__(self, connection: Connection, options: Options) -> None:
        self._options = options
        self._keeper = Keeper(connection, options.namespace, options.policy)
        self._lease = Lease(
            connection,
            options.namespace,
            LEASE_NAME,
            holder=options.holder,
            duration_s=options.lease_s,
        )
        self._shown: Pair | None = None
        intents = functools.partial(jobsets.intent, connection)
        answer = functools.partial(review.respond, image=options.image, intents=intents)
        self.server = Server(options.port, answer)

    def run(self, stop: threading.Event) -> None:
        """Serve until ``stop`` is set, then let go in good order.

        Raises:
            errors.EnvironmentUnfit: the server ended by itself.
        """
        self._show_something()
        serving = threading.Thread(target=self.server.serve_forever, name="admission", daemon=True)
        serving.start()
        try:
            while not stop.is_set():
                self._tick()
                if not serving.is_alive():
                    raise errors.EnvironmentUnfit(
                        "the webhook's server ended by itself", hint="its log says why"
                    )
                stop.wait(self._options.period_s)
        finally:
            self._end()

    def _tick(self) -> None:
        """Keep the certificates if that is this replica's turn, and serve with what there is."""
        try:
            if self._lease.hold():
                self._keeper.keep(clock.wall_s())
        except errors.CkptError as exc:
            logger.warning("certificates cannot be kept now: %s", exc)
        try:
            found = self._keeper.served()
        except errors.CkptError as exc:
            logger.warning("certificates cannot be read now: %s", exc)
            return
        if found and found != self._shown:
            self.server.present(found)
            self._shown = found
            self.server.ready = True
            logger.info("serving with a new certificate, key %s", found.issued.identity[:8])

    def _show_something(self) -> None:
        """Serve with a certificate that nobody trusts until there is a real one, so that the
        kubelet's probes, which trust anything, get through.
        """
        now_s = clock.wall_s()
        lifetime_s = self._options.policy.leaf_lifetime_s
        authority = certificates.new_authority(now_s, lifetime_s)
        self.server.present(
            certificates.new_leaf(authority, names(self._options.namespace), now_s, lifetime_s)
        )

    def _end(self) -> None:
        self.server.drain()
        drained = Deadline.after(self._options.drain_s)
        clock.wait_until(lambda: drained.expired, drained, every_s=_DRAIN_S)
        self.server.stop(Deadline.after(_STOP_S))
        self.server.server_close()
        try:
            self._lease.release()
        except errors.CkptError as exc:
            logger.info("the lease runs out by itself: %s", exc)
