"""Keeps the project's certificates in the cluster: does what ``rotation.py`` finds due.

All that is known lies in the cluster, so that any replica can go on where another ended: the
authorities in the Secret ``ckpt-agent-ca``, the certificate that the node agents, the coordinator
and the webhook serve with in ``ckpt-agent-tls``, the authorities that clients trust in the
ConfigMap ``ckpt-agent-ca`` and in the webhook's configuration.

Promises: an authority is trusted everywhere before a certificate that it signed is published,
also if this is ended between two writes; two keepers at once cost one of them a retry. Whoever
deletes the Secret with the authorities has them replaced, in the same steps; with the ConfigMap
deleted as well, as after a theft of the key, the old one is trusted no more and a new one signs at
once.
Does not: keep a key anywhere but in Secrets and in memory.
"""

from __future__ import annotations

import dataclasses
import logging

from agent import errors
from agent.admission import certificates, rotation
from agent.admission.certificates import Pair
from agent.kube import secrets
from agent.kube.connection import Connection

logger = logging.getLogger(__name__)

AUTHORITY_NAME = "ckpt-agent-ca"
LEAF_NAME = "ckpt-agent-tls"
WEBHOOK_NAME = "ckpt-agent"
_SERVICES = ("ckpt-agent-node", "ckpt-agent-admission", "ckpt-agent-coordinator")


def names(namespace: str) -> tuple[str, ...]:
    """What the project's servers are called in ``namespace``."""
    return (*(f"{service}.{namespace}.svc" for service in _SERVICES), "localhost")


@dataclasses.dataclass(frozen=True)
class _Authorities:
    """``retired`` have no keys any more."""

    current: Pair | None
    coming: Pair | None
    retired: tuple[Pair, ...]

    @property
    def all(self) -> tuple[Pair, ...]:
        """Whoever is to be trusted, the one that signs first."""
        return (*(pair for pair in (self.current, self.coming) if pair), *self.retired)

    def data(self) -> dict[str, bytes]:
        """As it is written into the Secret."""
        # A Secret of the type for TLS must have these two.
        found = {"tls.crt": b"", "tls.key": b"", "retired.crt": certificates.bundle(self.retired)}
        for prefix, pair in (("tls", self.current), ("coming", self.coming)):
            if pair:
                found |= {f"{prefix}.crt": pair.certificate, f"{prefix}.key": pair.key}
        return found


class Keeper:
    """Certificates in one namespace."""

    def __init__(self, connection: Connection, namespace: str, policy: rotation.Policy) -> None:
        self._connection = connection
        self._namespace = namespace
        self._names = names(namespace)
        self._policy = policy

    def served(self) -> Pair | None:
        """The certificate to serve with, as it is in the cluster now; None if there is none yet.

        Raises what ``Connection.call`` does.
        """
        stored = secrets.read_secret(self._connection, self._namespace, LEAF_NAME)
        return _leaf(stored, self._names, None)

    def keep(self, now_s: float) -> rotation.Due:
        """Do what is due at ``now_s`` and return it; also mend what somebody removed or changed.

        Raises what ``Connection.call`` does; asking again goes on from there.
        """
        stored = secrets.read_secret(self._connection, self._namespace, AUTHORITY_NAME)
        stored_leaf = secrets.read_secret(self._connection, self._namespace, LEAF_NAME)
        published = secrets.read_config_map(self._connection, self._namespace, AUTHORITY_NAME)
        authorities = _authorities(stored, published)
        leaf = _leaf(stored_leaf, self._names, authorities.all)
        due = rotation.due(_inventory(authorities, leaf), now_s, self._policy)

        kept = self._changed(authorities, due, now_s)
        if stored is None or dict(stored.data) != kept.data():
            secrets.write_secret(
                self._connection, self._namespace, AUTHORITY_NAME, kept.data(), stored
            )
        bundle = certificates.bundle(kept.all)
        self._publish(bundle, published)
        if due.leaf and kept.current:
            leaf = certificates.new_leaf(
                kept.current, self._names, now_s, self._policy.leaf_lifetime_s
            )
        if leaf:
            data = {"tls.crt": leaf.certificate, "tls.key": leaf.key, "ca.crt": bundle}
            if stored_leaf is None or dict(stored_leaf.data) != data:
                secrets.write_secret(
                    self._connection, self._namespace, LEAF_NAME, data, stored_leaf
                )
        _tell(due)
        return due

    def _changed(self, have: _Authorities, due: rotation.Due, now_s: float) -> _Authorities:
        current, coming, retired = have.current, have.coming, have.retired
        if (due.replace or due.promote) and current:
            retired = (Pair(current.certificate), *retired)
        if due.promote:
            current, coming = coming, None
        if due.replace:
            current, coming = self._new_authority(now_s), None
        if due.prepare:
            coming = self._new_authority(now_s)
        return _Authorities(
            current,
            coming,
            tuple(
                pair
                for pair in retired
                if (issued := pair.issued).identity not in due.forget and now_s < issued.not_after_s
            ),
        )

    def _new_authority(self, now_s: float) -> Pair:
        return certificates.new_authority(now_s, self._policy.authority_lifetime_s)

    def _publish(self, bundle: bytes, stored: secrets.Stored | None) -> None:
        """Bring the authorities to whoever must trust them, before anything they signed."""
        if stored is None or stored.data.get("ca.crt") != bundle:
            others = dict(stored.data) if stored else {}
            secrets.write_config_map(
                self._connection,
                self._namespace,
                AUTHORITY_NAME,
                others | {"ca.crt": bundle},
                stored,
            )
        try:
            secrets.trust(self._connection, WEBHOOK_NAME, bundle)
        except errors.NotFound:
            # A cluster whose owner wants no webhook still needs certificates for the agents.
            logger.warning("there is no MutatingWebhookConfiguration %s", WEBHOOK_NAME)


def _authorities(stored: secrets.Stored | None, published: secrets.Stored | None) -> _Authorities:
    """What the Secret holds. If the one that signs is lost, what clients trust is kept for those
    servers that do not have the successor's certificate yet.
    """
    data = stored.data if stored else {}
    current, coming = (
        certificates.read_authority(data.get(f"{prefix}.crt", b""), data.get(f"{prefix}.key", b""))
        for prefix in ("tls", "coming")
    )
    retired = certificates.read_bundle(data.get("retired.crt", b""))
    if current is None and published:
        trusted = certificates.read_bundle(published.data.get("ca.crt", b""))
        retired += tuple(
            pair
            for pair in trusted
            if pair not in retired and not (coming and pair.certificate == coming.certificate)
        )
    return _Authorities(current, coming, retired)


def _leaf(
    stored: secrets.Stored | None,
    wanted: tuple[str, ...],
    authorities: tuple[Pair, ...] | None,
) -> Pair | None:
    if stored is None:
        return None
    return certificates.read_leaf(
        stored.data.get("tls.crt", b""), stored.data.get("tls.key", b""), wanted, authorities
    )


def _inventory(have: _Authorities, leaf: Pair | None) -> rotation.Inventory:
    return rotation.Inventory(
        current=have.current.issued if have.current else None,
        coming=have.coming.issued if have.coming else None,
        retired=tuple(pair.issued for pair in have.retired),
        leaf=leaf.issued if leaf else None,
    )


def _tell(due: rotation.Due) -> None:
    for happened, words in (
        (due.replace, "made an authority, which signs at once"),
        (due.promote, "the coming authority signs from now on"),
        (due.prepare, "made a coming authority and published it"),
        (bool(due.forget), "old authorities are no longer trusted"),
        (due.leaf, "signed a new server certificate"),
    ):
        if happened:
            logger.info("certificates: %s", words)
