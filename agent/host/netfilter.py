"""The packet filter of this network namespace: which nf_tables tables there are, and removing one.

Promises: only tables that are named by the caller are changed; one that is gone already is fine.
Does not: add rules (CRIU locks connections itself), or look into iptables.
"""

from __future__ import annotations

import errno

from agent import errors
from agent.host import nftables


def tables(prefix: str) -> set[str]:
    """The names of this namespace's inet tables that begin with ``prefix``.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
    """
    try:
        names = nftables.tables()
    except OSError as exc:
        if exc.errno == errno.EPERM:
            raise _not_allowed() from exc
        # A kernel without nf_tables has no tables.
        return set()
    return {name for name in names if name.startswith(prefix)}


def set_keys(table: str, name: str) -> set[bytes]:
    """The keys of an inet table's set as the kernel holds them; empty if there is no such set.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
    """
    try:
        return set(nftables.keys(table, name))
    except OSError as exc:
        if exc.errno == errno.EPERM:
            raise _not_allowed() from exc
        return set()


def renew_key(table: str, name: str, key: bytes, span_s: float) -> bool:
    """Let a key that is in a set of the kind that has timeouts stay in it for ``span_s`` from now,
    without a gap; False if it was gone, or the set is.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
        errors.EnvironmentUnfit: the kernel refuses.
    """
    # Kernels before 6.12 do not change the time of a key that is there: it is taken out and put
    # back in one transaction.
    try:
        nftables.commit(
            nftables.delete_key(table, name, key),
            nftables.add_key(table, name, key, milliseconds(span_s)),
        )
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            return False
        if exc.errno == errno.EPERM:
            raise _not_allowed() from exc
        raise errors.EnvironmentUnfit(f"cannot renew the nft table {table}: {exc}") from exc
    return True


def accept_all(table: str, chain: str) -> None:
    """Let everything pass in a chain, before its rules; nothing to do if it is gone.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
        errors.EnvironmentUnfit: the kernel refuses.
    """
    try:
        nftables.commit(nftables.insert_rule(table, chain, [nftables.verdict(nftables.ACCEPT)]))
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            return
        if exc.errno == errno.EPERM:
            raise _not_allowed() from exc
        raise errors.EnvironmentUnfit(f"cannot change the nft table {table}: {exc}") from exc


def milliseconds(span_s: float) -> int:
    """A time span as the kernel takes it, which takes 0 for none at all."""
    return max(1, int(span_s * 1000))


def delete_table(name: str) -> bool:
    """Remove an inet table with all that is in it; False if there is none of that name.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
        errors.EnvironmentUnfit: the kernel refuses.
    """
    try:
        nftables.commit(nftables.delete_table(name))
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            return False
        if exc.errno == errno.EPERM:
            raise _not_allowed() from exc
        raise errors.EnvironmentUnfit(f"cannot remove the nft table {name}: {exc}") from exc
    return True


def _not_allowed() -> errors.PrivilegeMissing:
    return errors.PrivilegeMissing(
        "not allowed to look at the packet filter", hint="run as root with CAP_NET_ADMIN"
    )
