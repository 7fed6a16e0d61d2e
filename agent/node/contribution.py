"""What a pod gives to the commit of an epoch: its part for the store, and what the cut was like.

Promises: ``decode`` after ``encode`` gives the same; anything else is ``errors.Corrupt``. Taken
apart, it takes about a dozen times the memory that it has as it is sent, whoever wrote it.
Does not: judge; ``model.cut`` does.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from agent import errors
from agent.model.cut import End

_WHAT = "a pod's contribution to an epoch"
# An object or a list takes about 64 bytes, however short it is written. Pods hold one in 18 bytes
# at the most; in two, what is gathered (``gathering.LIMIT_BYTES``) would be gigabytes.
_FEW_BRACKETS = 1000
_BYTES_A_BRACKET = 8


@dataclasses.dataclass(frozen=True)
class Stop:
    """How long a member stood still, and what was read of it."""

    member: str
    stop_s: float
    freeze_s: float
    raw_bytes: int
    processes: int


@dataclasses.dataclass(frozen=True)
class Contribution:
    """``part`` is the store's own; ``ends`` are the pod's connections at the cut; ``pod`` is what a
    restore has to know of the pod; ``hook_problems`` is for whoever asked, and for no image.
    """

    part: bytes
    ends: tuple[End, ...]
    stops: tuple[Stop, ...]
    pod: dict[str, Any] = dataclasses.field(default_factory=dict)
    hook_problems: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return it as JSON."""
        body = {
            "part": self.part.decode("ascii"),
            "ends": [dataclasses.asdict(each) for each in self.ends],
            "stops": [dataclasses.asdict(each) for each in self.stops],
            "pod": self.pod,
            "hook_problems": self.hook_problems,
        }
        return json.dumps(body, separators=(",", ":")).encode("ascii")

    @classmethod
    def decode(cls, raw: bytes) -> Contribution:
        """Return what was sent.

        Raises:
            errors.Corrupt: it is not such a contribution.
        """
        brackets = raw.count(b"[") + raw.count(b"{")
        if brackets > _FEW_BRACKETS and brackets * _BYTES_A_BRACKET > len(raw):
            raise errors.Corrupt(f"{_WHAT} is nearly all brackets", part=_WHAT)
        try:
            body = json.loads(raw)
            return cls(
                part=body["part"].encode("ascii"),
                ends=tuple(End(**each) for each in body["ends"]),
                stops=tuple(Stop(**each) for each in body["stops"]),
                pod=dict(body["pod"]),
                hook_problems=tuple(str(each) for each in body["hook_problems"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise errors.Corrupt(f"{_WHAT} cannot be understood", part=_WHAT) from exc
