"""The picture of the demo: loss and progress over wall time, with all that happened to the job.

Promises: writes one PNG; needs no display.
Does not: decide what is true; the comparison does.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from demo.job import Point
from demo.timeline import Story

_REFERENCE, _RUN, _LOST, _AGAIN = "#b8b8b8", "#1f5fa8", "#d98b2b", "#2a8a4a"
_DUMP, _KILL = "#7a4fa3", "#c0282d"
# Losses of single batches jump; the line drawn is their mean over so many steps.
_SMOOTH_STEPS = 15


def draw(
    path: str,
    uninterrupted: Sequence[Point],
    points: Sequence[Point],
    story: Story,
    *,
    identical: bool,
) -> None:
    """Draw both trainings; ``points`` are those of the interrupted one, as its log showed them."""
    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    loss, progress = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2], "hspace": 0.06}
    )
    # Up to the last dump's step once; then lost by the kill; then done again.
    cut = next(i for i, p in enumerate(points) if p.step >= story.resumed_step)
    again = next(i for i, p in enumerate(points) if p.at_s >= story.stepping_s)
    before = smooth([p.loss for p in points[:again]])
    after = smooth([p.loss for p in [*points[:cut], *points[again:]]])[cut:]
    parts = (
        (uninterrupted, smooth([p.loss for p in uninterrupted]), _REFERENCE, 4.0, "uninterrupted"),
        (points[:cut], before[:cut], _RUN, 1.6, "dumped three times while it trains"),
        (
            points[max(cut - 1, 0) : again],
            before[max(cut - 1, 0) :],
            _LOST,
            1.6,
            "lost by the kill",
        ),
        (points[again:], after, _AGAIN, 1.6, "restored from the last dump"),
    )
    for part, losses, colour, width, label in parts:
        at = [p.at_s for p in part]
        loss.plot(at, losses, color=colour, lw=width, label=label)
        progress.plot(at, [p.step for p in part], color=colour, lw=width)
    for axes in (loss, progress):
        _mark(axes, story)
        axes.grid(True, color="#ececec", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _label(loss, story)
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    loss.set_ylabel(f"training loss (mean of {_SMOOTH_STEPS} steps)")
    progress.set_ylabel("step")
    progress.legend(
        *loss.get_legend_handles_labels(), loc="upper left", framealpha=0.9, edgecolor="none"
    )
    progress.set_xlabel("wall time since the start of each training, s")
    progress.set_xlim(left=0)
    ends = "bit-identical" if identical else "DIFFERENT"
    figure.suptitle(f"A killed training, restored from its last dump, ends {ends}", fontsize=13)
    figure.savefig(path)


def smooth(values: Sequence[float]) -> list[float]:
    """The running mean of up to ``_SMOOTH_STEPS`` values ending at each."""
    means = []
    total = 0.0
    for i, value in enumerate(values):
        total += value
        if i >= _SMOOTH_STEPS:
            total -= values[i - _SMOOTH_STEPS]
        means.append(total / min(i + 1, _SMOOTH_STEPS))
    return means


def _mark(axes: Axes, story: Story) -> None:
    for dumped in story.dumps:
        axes.axvspan(dumped.at_s, dumped.at_s + dumped.dump.wall_s, color=_DUMP, alpha=0.13, lw=0)
        axes.axvline(dumped.at_s, color=_DUMP, lw=1.2)
    axes.axvspan(story.killed_s, story.stepping_s, color=_KILL, alpha=0.10, lw=0)
    axes.axvline(story.killed_s, color=_KILL, lw=1.4)
    axes.axvline(story.stepping_s, color=_AGAIN, lw=1.4)


def _label(axes: Axes, story: Story) -> None:
    """What the marks mean: the dumps above the axes, the kill and the restore inside, at the top,
    where the loss of a training that has come so far is not.
    """

    def note(at_s: float, text: str, colour: str, *, inside: bool, side: str) -> None:
        axes.annotate(
            text,
            (at_s, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4 if side == "left" else -4, -6 if inside else 4),
            textcoords="offset points",
            ha=side,
            va="top" if inside else "bottom",
            fontsize=8.5,
            color=colour,
        )

    for number, dumped in enumerate(story.dumps, 1):
        dump = dumped.dump
        note(
            dumped.at_s,
            f"dump {number}\n"
            f"stopped {dump.stop_s * 1000:.0f} ms\n"
            f"{dump.raw_bytes / 1e6:.0f} MB as {dump.stored_bytes / 1e6:.0f} MB\n"
            f"durable after {dump.durable_s:.1f} s",
            _DUMP,
            inside=False,
            side="left",
        )
    note(story.killed_s, f"kill -9\nat step {story.killed_step}", _KILL, inside=True, side="right")
    note(
        story.stepping_s,
        f"restore: {story.stepping_s - story.restore_s:.1f} s to the first step,\n"
        f"again from step {story.resumed_step}",
        _AGAIN,
        inside=True,
        side="left",
    )
