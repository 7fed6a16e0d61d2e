"""New ids of epochs and attempts.

Promises: an epoch's id sorts after all that exist in its group, also if the clock went back; ids of
different writers differ.
Does not: look at a volume.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
from collections.abc import Sequence

from agent.model.ids import EpochId
from agent.store import layout

_TIME = "%Y%m%d-%H%M%S"
_TIME_CHARACTERS = 15


def next_epoch(existing: Sequence[EpochId], now_s: float) -> EpochId:
    """Return a new id; ``now_s`` is wall time."""
    moment = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    for epoch in existing:
        # One that states no possible time was not made here, and nothing need sort after it.
        with contextlib.suppress(ValueError, OverflowError):
            taken = datetime.datetime.strptime(f"{epoch[:_TIME_CHARACTERS]}+0000", f"{_TIME}%z")
            moment = max(moment, taken + datetime.timedelta(seconds=1))
    return EpochId(f"{moment.strftime(_TIME)}-{secrets.token_hex(3)}")


def named_s(epoch: EpochId) -> float:
    """Return the wall time that an epoch's name states; one that states none counts as new."""
    try:
        text = f"{epoch[:_TIME_CHARACTERS]}+0000"
        return datetime.datetime.strptime(text, f"{_TIME}%z").timestamp()
    except (ValueError, OverflowError):
        return float("inf")


def new_attempt(epoch: EpochId) -> str:
    """Return an id that no other attempt at this epoch, or at any other, has."""
    return layout.attempt_id(epoch, secrets.token_hex(8))
