"""The packet filter of this network namespace: which nf_tables tables there are, and removing one.

Promises: only tables that are named by the caller are changed; one that is gone already is fine.
Does not: add rules (CRIU locks connections itself), or look into iptables.
"""

from __future__ import annotations

import errno
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_DELSETELEM,
    NFT_MSG_GETSETELEM,
    NFT_MSG_NEWSETELEM,
    nft_set_elem_list_msg,
)
from pyroute2.nftables.main import NFTables, NFTSetElem

from agent import errors

# include/uapi/linux/netfilter.h: NFPROTO_INET, the family CRIU makes its tables in.
_INET = 1
# include/uapi/linux/netfilter/nfnetlink.h: what begins and ends a transaction.
_BEGIN, _END = 16, 17


def tables(prefix: str) -> set[str]:
    """The names of this namespace's inet tables that begin with ``prefix``.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
    """
    try:
        with NFTables(nfgen_family=_INET) as nft:
            names = {str(table.get_attr("NFTA_TABLE_NAME")) for table in nft.get_tables()}
    except NetlinkError as exc:
        if exc.code == errno.EPERM:
            raise _not_allowed() from exc
        # A kernel without nf_tables has no tables.
        return set()
    return {name for name in names if name.startswith(prefix)}


def set_keys(table: str, name: str) -> set[bytes]:
    """The keys of an inet table's set as the kernel holds them; empty if there is no such set.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
    """
    question = nft_set_elem_list_msg()
    question["attrs"] = [("NFTA_SET_ELEM_LIST_TABLE", table), ("NFTA_SET_ELEM_LIST_SET", name)]
    found: set[bytes] = set()
    try:
        with NFTables(nfgen_family=_INET) as nft:
            for answer in nft.request_get(question, NFT_MSG_GETSETELEM):
                for element in answer.get_attr("NFTA_SET_ELEM_LIST_ELEMENTS") or ():
                    key = element.get_attr("NFTA_SET_ELEM_KEY")
                    found.add(bytes(key.get_attr("NFTA_DATA_VALUE")))
    except NetlinkError as exc:
        if exc.code == errno.EPERM:
            raise _not_allowed() from exc
        return set()
    return found


def add_key(nft: NFTables, table: str, name: str, key: bytes, span_s: float) -> None:
    """Put a key into a set of the kind that has timeouts, for that long."""
    _transact(nft, _element(NFT_MSG_NEWSETELEM, NLM_F_CREATE, table, name, key, span_s))


def renew_key(table: str, name: str, key: bytes, span_s: float) -> bool:
    """Let a key that is in such a set stay in it for ``span_s`` from now, without a gap; False if
    it was gone, or the set is.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
        errors.EnvironmentUnfit: the kernel refuses.
    """
    # Kernels before 6.12 do not change the time of a key that is there: it is taken out and put
    # back in one transaction.
    try:
        with NFTables(nfgen_family=_INET) as nft:
            _transact(
                nft,
                _element(NFT_MSG_DELSETELEM, 0, table, name, key, span_s),
                _element(NFT_MSG_NEWSETELEM, NLM_F_CREATE, table, name, key, span_s),
            )
    except NetlinkError as exc:
        if exc.code == errno.ENOENT:
            return False
        if exc.code == errno.EPERM:
            raise _not_allowed() from exc
        raise errors.EnvironmentUnfit(f"cannot renew the nft table {table}: {exc}") from exc
    return True


def _transact(nft: NFTables, *messages: Any) -> None:
    nft.nlm_request_batch([_edge(_BEGIN), *messages, _edge(_END)])


def _edge(kind: int) -> Any:
    message = nfgen_msg()
    message["res_id"] = NFNL_SUBSYS_NFTABLES
    message["header"]["type"] = kind
    message["header"]["flags"] = NLM_F_REQUEST
    return message


def _element(kind: int, flags: int, table: str, name: str, key: bytes, span_s: float) -> Any:
    element = NFTSetElem(value=key, timeout=max(1, int(span_s * 1000)))
    message = nft_set_elem_list_msg()
    message["attrs"] = [
        ["NFTA_SET_ELEM_LIST_TABLE", table],
        ["NFTA_SET_ELEM_LIST_SET", name],
        ["NFTA_SET_ELEM_LIST_ELEMENTS", [element.as_netlink(None)]],
    ]
    message["header"]["type"] = (NFNL_SUBSYS_NFTABLES << 8) | kind
    message["header"]["flags"] = flags | NLM_F_REQUEST | NLM_F_ACK
    message["nfgen_family"] = _INET
    return message


def delete_table(name: str) -> bool:
    """Remove an inet table with all that is in it; False if there is none of that name.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
    """
    try:
        with NFTables(nfgen_family=_INET) as nft:
            nft.table("del", name=name)
    except NetlinkError as exc:
        if exc.code == errno.ENOENT:
            return False
        if exc.code == errno.EPERM:
            raise _not_allowed() from exc
        raise errors.EnvironmentUnfit(f"cannot remove the nft table {name}: {exc}") from exc
    return True


def _not_allowed() -> errors.PrivilegeMissing:
    return errors.PrivilegeMissing(
        "not allowed to look at the packet filter", hint="run as root with CAP_NET_ADMIN"
    )
