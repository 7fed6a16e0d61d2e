"""What happened to the job and when, and the table that tells it.

Promises: pure; the same events give the same text.
Does not: measure anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from demo.cli import Dump

_MB = 1e6


@dataclass(frozen=True)
class Dumped:
    """A dump that was asked for at ``at_s`` of the job's wall time, when it was at ``step``."""

    at_s: float
    step: int
    dump: Dump
    longest_gap_s: float
    """The longest time between two steps during the dump: what the job itself felt."""


@dataclass(frozen=True)
class Plain:
    """A plain ``criu dump`` to memory, as ``Dumped``; its images had ``size_bytes``."""

    at_s: float
    step: int
    size_bytes: int
    longest_gap_s: float


@dataclass(frozen=True)
class Story:
    """All of the job's second run."""

    dumps: tuple[Dumped, ...]
    plain: Plain
    killed_s: float
    killed_step: int
    restore_s: float
    """When the restore was asked for; later times likewise since the job's start."""
    stepping_s: float
    """When the first step after the restore was seen."""
    resumed_step: int
    ended_s: float
    verify_took_s: float


def table(story: Story) -> str:
    """The timeline as text."""
    heads = (
        "t",
        "step",
        "event",
        "stop",
        "longest gap",
        "raw",
        "new",
        "stored",
        "ratio",
        "durable after",
    )
    rows: list[Sequence[str]] = [heads]
    raw = stored = 0
    for number, dumped in enumerate(story.dumps, 1):
        dump = dumped.dump
        raw += dump.raw_bytes
        stored += dump.stored_bytes
        rows.append(
            (
                _s(dumped.at_s),
                str(dumped.step),
                f"dump {number}",
                f"{dump.stop_s * 1000:.0f} ms",
                f"{dumped.longest_gap_s * 1000:.0f} ms",
                _mb(dump.raw_bytes),
                _mb(dump.new_bytes),
                _mb(dump.stored_bytes),
                _ratio(dump.raw_bytes, dump.stored_bytes),
                _s(dump.durable_s),
            )
        )
    rows.append(("", "", "all dumps", "", "", _mb(raw), "", _mb(stored), _ratio(raw, stored), ""))
    plain = story.plain
    rows.append(
        (
            _s(plain.at_s),
            str(plain.step),
            "criu dump, to memory",
            "",
            f"{plain.longest_gap_s * 1000:.0f} ms",
            _mb(plain.size_bytes),
            "",
            "",
            "",
            "",
        )
    )
    read = f"which verify has read in {_s(story.verify_took_s)}"
    lost = story.killed_step - story.resumed_step + 1
    rows += [
        _event(story.killed_s, story.killed_step, "kill -9 of every process"),
        _event(
            story.restore_s,
            story.killed_step,
            f"restore of dump {len(story.dumps)}, {read}",
        ),
        _event(story.stepping_s, story.resumed_step, f"trains again, {lost} steps are done anew"),
        _event(story.ended_s, None, "end"),
    ]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns: the first two and all figures to the right, the event to the left. A row
    of three cells lets its last one run on.
    """
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _event(at_s: float, step: int | None, what: str) -> tuple[str, str, str]:
    return _s(at_s), "" if step is None else str(step), what


def _s(span_s: float) -> str:
    return f"{span_s:.1f} s"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / _MB:.1f} MB"


def _ratio(raw_bytes: int, stored_bytes: int) -> str:
    return f"{raw_bytes / stored_bytes:.1f}" if stored_bytes else "-"
