"""Whether two trainings were the same, bit for bit.

Promises: every rank's log is compared as bytes, line by line, the final weights as the bytes of
their file; each difference is told with the first place where it shows.
Does not: allow a tolerance anywhere.
"""

from __future__ import annotations

import itertools
import os


def differences(expected: str, actual: str, ranks: int) -> list[str]:
    """What differs between the training directories ``expected`` and ``actual``."""
    found = []
    for rank in range(ranks):
        name = f"rank-{rank}.log"
        found += _of_lines(name, _read(expected, name), _read(actual, name))
    if _read(expected, "weights.npy") != _read(actual, "weights.npy"):
        found.append("weights.npy: the final weights differ")
    return found


def last_words(directory: str) -> str:
    """The last line of rank 0's log: accuracy and digest of the weights."""
    content = _read(directory, "rank-0.log") or b""
    return content.decode().rstrip("\n").rpartition("\n")[2]


def _read(directory: str, name: str) -> bytes | None:
    try:
        with open(os.path.join(directory, name), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _of_lines(name: str, expected: bytes | None, actual: bytes | None) -> list[str]:
    if expected == actual and expected is not None:
        return []
    if expected is None or actual is None:
        return [f"{name}: missing"]
    pairs = itertools.zip_longest(expected.splitlines(True), actual.splitlines(True))
    for number, (one, other) in enumerate(pairs, 1):
        if one != other:
            return [f"{name}: line {number} is {_shown(other)} instead of {_shown(one)}"]
    raise ValueError("equal lines of unequal files")


def _shown(line: bytes | None) -> str:
    return "missing" if line is None else repr(line.decode(errors="replace"))
