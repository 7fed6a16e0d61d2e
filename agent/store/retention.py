"""Which epochs of a group are kept.

Promises: pure; the newest good epoch of a group is always kept, and what is damaged counts for
nothing, so that no amount of damage makes a good epoch go.
Does not: delete.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypeVar

from agent import errors


@dataclasses.dataclass(frozen=True)
class Retention:
    """The newest ``keep_last`` epochs of a group are kept, and all that are not older than
    ``keep_within_s`` seconds; None where a rule is not given. At least one is needed.
    """

    keep_last: int | None = None
    keep_within_s: float | None = None

    def __post_init__(self) -> None:
        """Raise ``errors.InvalidInput`` if the rules do not make sense."""
        given = [rule for rule in (self.keep_last, self.keep_within_s) if rule is not None]
        if not given or any(rule < 0 for rule in given):
            raise errors.InvalidInput(
                "nothing says which epochs to keep", hint="give --keep-last or --keep-within"
            )


class Aged(Protocol):
    """What is needed of an epoch."""

    @property
    def created_s(self) -> float:
        """When it was made, seconds since 1970."""

    @property
    def damage(self) -> str | None:
        """Why it cannot be restored, or None."""


_Epoch = TypeVar("_Epoch", bound=Aged)


def expired(epochs: Sequence[_Epoch], keep: Retention, now_s: float) -> list[_Epoch]:
    """Return which of a group's epochs, oldest first, are not to be kept, oldest first.

    Damaged ones are never expired: what they need is not known, so a person has to delete them.
    """
    good = [epoch for epoch in epochs if epoch.damage is None]
    # Rules add up: whatever one of them keeps is kept.
    newest = len(good) - max(1, keep.keep_last or 0)
    within_s = float("-inf") if keep.keep_within_s is None else keep.keep_within_s
    return [epoch for epoch in good[: max(0, newest)] if now_s - epoch.created_s > within_s]
