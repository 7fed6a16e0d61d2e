"""What went wrong, as documents.

Promises: what ``documents`` promises; facts that JSON does not know become text.
Does not: decide with what status the program ends (``exits``).
"""

from __future__ import annotations

from typing import Any

from agent import errors
from agent.cli.documents import document
from agent.cli.output import Document


def error(exc: errors.CkptError) -> Document:
    """What went wrong, on purpose."""
    return document(
        "Error",
        exc.code,
        code=exc.code,
        message=exc.message,
        hint=exc.hint,
        retryable=exc.retryable,
        facts={key: _plain(value) for key, value in exc.facts.items()},
    )


def usage_error(message: str, command: str) -> Document:
    """A command line that was not understood."""
    return document(
        "Error",
        "usage",
        code="usage",
        message=message,
        hint=f"see {command} --help",
        retryable=False,
        facts={},
    )


def defect(exc: Exception) -> Document:
    """Something nobody meant to happen."""
    return document(
        "Error",
        "internal",
        code="internal",
        message=f"internal error: {type(exc).__name__}: {exc}",
        hint="this is a defect; run again with --verbose to see where, and report it",
        retryable=False,
        facts={},
    )


def _plain(value: object) -> Any:
    """A fact as a JSON value; what JSON does not know becomes text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return str(value)
