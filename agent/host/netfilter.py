"""The packet filter of this network namespace: which nf_tables tables there are, and removing one.

Promises: only tables that are named by the caller are removed; one that is gone already is fine.
Does not: add rules (CRIU locks connections itself), or look into iptables.
"""

from __future__ import annotations

import errno

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_GETSETELEM, nft_set_elem_list_msg
from pyroute2.nftables.main import NFTables

from agent import errors

# include/uapi/linux/netfilter.h: NFPROTO_INET, the family CRIU makes its tables in.
_INET = 1


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
