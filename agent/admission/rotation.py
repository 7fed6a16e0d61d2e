"""When certificates are renewed: pure, what there is and what time it is in, what is due out.

Trust is spread before it is used. A new authority is first only published (``coming``) beside the
one that signs (``current``); after the overlap it signs, and the old one stays published
(``retired``) until the last certificate of it has been replaced for an overlap. So a client whose
copy of the authorities is as old as the overlap, and a server whose copy of its certificate is,
still understand each other at every moment. That holds too when the key of the one that signs is
lost, as long as it is still trusted and its last certificate is good.

Promises: no clock, no keys: only times in seconds since 1970 and identities.
Does not: make anything; ``keeper.py`` does what is due.
"""

from __future__ import annotations

import dataclasses

from agent import errors

# Certificates begin this much before they were made, for clients whose clock is behind.
BACKDATE_S = 300.0


@dataclasses.dataclass(frozen=True)
class Issued:
    """A certificate as far as time is concerned. ``signer`` is the identity of the authority that
    signed it.
    """

    identity: str
    made_s: float
    not_after_s: float
    signer: str = ""

    def usable(self, now_s: float) -> bool:
        """Whether a client with the right time accepts it."""
        return self.made_s - BACKDATE_S <= now_s < self.not_after_s


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What there is; None for what is not there or cannot be read."""

    current: Issued | None = None
    coming: Issued | None = None
    retired: tuple[Issued, ...] = ()
    leaf: Issued | None = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """How long certificates live and how early they are replaced, in seconds.

    Raises:
        errors.InvalidInput: the times leave no room for each other.
    """

    leaf_lifetime_s: float
    leaf_renew_before_s: float
    authority_lifetime_s: float
    authority_renew_before_s: float
    overlap_s: float

    def __post_init__(self) -> None:
        # A successor waits for an overlap before it signs, and what the old one signed may be
        # served for another by whoever learns late; the certificate in use must last that long.
        for fits, words in (
            (2 * self.overlap_s < self.leaf_renew_before_s, "2 trust_overlap < leaf_renew_before"),
            (self.leaf_renew_before_s < self.leaf_lifetime_s, "leaf_renew_before < leaf_lifetime"),
            (
                2 * self.overlap_s < self.authority_renew_before_s,
                "2 trust_overlap < ca_renew_before",
            ),
            (
                self.authority_renew_before_s < self.authority_lifetime_s,
                "ca_renew_before < ca_lifetime",
            ),
        ):
            if not fits:
                raise errors.InvalidInput(
                    "the lifetimes of certificates leave no time to replace them",
                    hint=f"choose them so that {words}",
                )


@dataclasses.dataclass(frozen=True)
class Due:
    """What to do now, in this order.

    ``replace``: make an authority that signs at once, since there is none. ``promote``: let the
    coming one sign. ``prepare``: make a coming one. ``forget``: identities of retired ones that
    nobody needs. ``leaf``: sign a new certificate with whoever signs then.
    """

    replace: bool = False
    promote: bool = False
    prepare: bool = False
    forget: frozenset[str] = frozenset()
    leaf: bool = False


def due(have: Inventory, now_s: float, policy: Policy) -> Due:
    """Return what is due at ``now_s``; doing it and asking again gives nothing."""
    signs = have.current if have.current and have.current.usable(now_s) else None
    coming = have.coming if have.coming and have.coming.usable(now_s) else None
    if signs is None and _still_served(have, now_s):
        spread = coming is not None and now_s - coming.made_s >= policy.overlap_s
        if not spread:
            return Due(prepare=coming is None, forget=_expired(have, now_s))
    promote = coming is not None and (signs is None or now_s - coming.made_s >= policy.overlap_s)
    if promote:
        signs, coming = coming, None
    if signs is None:
        return Due(replace=True, forget=_expired(have, now_s), leaf=True)
    ending = signs.not_after_s - now_s <= policy.authority_renew_before_s
    leaf = _leaf_due(have.leaf, signs, now_s, policy)
    settled = not leaf and have.leaf is not None and now_s - have.leaf.made_s >= policy.overlap_s
    return Due(
        promote=promote,
        prepare=ending and coming is None,
        forget=frozenset(old.identity for old in have.retired)
        if settled
        else _expired(have, now_s),
        leaf=leaf,
    )


def _still_served(have: Inventory, now_s: float) -> bool:
    """Whether a certificate is in use that those who are no longer to sign have signed."""
    return (
        have.leaf is not None
        and have.leaf.usable(now_s)
        and any(old.usable(now_s) and old.identity == have.leaf.signer for old in have.retired)
    )


def _leaf_due(leaf: Issued | None, signs: Issued, now_s: float, policy: Policy) -> bool:
    if leaf is None or not leaf.usable(now_s) or leaf.signer != signs.identity:
        return True
    # No certificate outlives its authority: a new one must be worth it.
    new_not_after_s = min(now_s + policy.leaf_lifetime_s, signs.not_after_s)
    return (
        leaf.not_after_s - now_s <= policy.leaf_renew_before_s
        and new_not_after_s > leaf.not_after_s
    )


def _expired(have: Inventory, now_s: float) -> frozenset[str]:
    return frozenset(old.identity for old in have.retired if now_s >= old.not_after_s)
