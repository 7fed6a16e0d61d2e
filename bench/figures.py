"""Figures of repeated runs, and how they are told.

Promises: pure; a ratio of two samples pairs their values in the order they were measured.
Does not: leave out any value.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Samples:
    """The same thing measured several times, in order."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Samples:
        """From any values."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def over(self, other: Samples) -> Samples:
        """The ratio of each of these to its pair in ``other``."""
        return Samples.of(a / b for a, b in zip(self.values, other.values, strict=True))

    def plus(self, other: Samples) -> Samples:
        """The sum of each of these and its pair in ``other``."""
        return Samples.of(a + b for a, b in zip(self.values, other.values, strict=True))

    def told(self, unit: str = "", digits: int = 2, scale: float = 1) -> str:
        """``median unit (lowest-highest)``."""
        low, mid, high = (
            f"{value / scale:.{digits}f}"
            for value in (min(self.values), self.median, max(self.values))
        )
        return f"{mid}{unit and ' ' + unit} ({low}-{high})"

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }


def mib(size_bytes: float) -> str:
    """A size in MiB."""
    return f"{size_bytes / MIB:.1f} MiB"
