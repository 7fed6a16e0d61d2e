"""Arguments that several verbs take: process numbers, time spans, image names.

Promises: what does not parse is refused as wrong usage before anything is opened.
Does not: look up whether a process runs or an image exists.
"""

from __future__ import annotations

import os

import click
from click.shell_completion import CompletionItem

from agent import errors, settings, wiring
from agent.model import ids


def pid(value: str) -> int:
    """A process number; anything but a whole number from 1 is wrong usage."""
    if not (value.isascii() and value.isdigit() and 0 < int(value) < 1 << 31):
        raise click.BadParameter(f"{value!r} is not a process number, such as 4711")
    return int(value)


def span_s(value: str) -> float:
    """A time span such as 90s, 15m, 12h or 7d, in seconds."""
    try:
        return settings.duration_s(value)
    except errors.InvalidInput as exc:
        raise click.BadParameter(f"{exc.message}: {exc.hint}") from exc


def complete_image(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of images for the shell; none if the store cannot be read, since completion has no
    place for an error.
    """
    try:
        found = wiring.store(settings.load({}, None, os.environ)).epochs()
    except errors.CkptError:
        return []
    names = [ids.image_name(summary.group, summary.epoch) for summary in found]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
