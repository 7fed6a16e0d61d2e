"""What is mounted where in a process's mount namespace: /proc/PID/mountinfo taken apart.

Promises: one ``Mount`` a line, in the kernel's order, so that later ones cover earlier ones.
Does not: mount or unmount anything.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from agent import errors

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclasses.dataclass(frozen=True)
class Mount:
    """One mount. ``root`` is the directory of its file system that is seen at ``point``;
    ``options`` are those of the file system itself (for overlay: its directories).
    """

    id: int
    device: str
    root: str
    point: str
    kind: str
    source: str
    read_only: bool
    options: tuple[str, ...]

    def option(self, name: str) -> str:
        """The value of ``NAME=VALUE`` among the options; "" if there is none."""
        start = name + "="
        return next((o.removeprefix(start) for o in self.options if o.startswith(start)), "")


def of(pid: int | str) -> list[Mount]:
    """The mounts that process ``pid`` (or ``self``) sees.

    Raises:
        errors.NotFound: there is no such process.
    """
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise errors.NotFound(f"there is no process {pid}", pid=pid) from exc
    except OSError as exc:
        # What the kernel says of a process that has ended but was not reaped.
        raise errors.NotFound(f"process {pid} has no mounts: {exc.strerror}", pid=pid) from exc
    return list(_table(text))


# Processes have few tables between them, which hardly ever change and can have thousands of lines.
@functools.lru_cache(maxsize=4)
def _table(text: str) -> tuple[Mount, ...]:
    return tuple(_mount(line) for line in text.splitlines())


def _mount(line: str) -> Mount:
    # id parent major:minor root point options [optional fields] - type source super-options
    left, _, right = line.partition(" - ")
    fields = left.split(" ")
    kind, source, options = right.split(" ", 2)
    return Mount(
        id=int(fields[0]),
        device=fields[2],
        root=_plain(fields[3]),
        point=_plain(fields[4]),
        kind=kind,
        source=_plain(source),
        read_only="ro" in fields[5].split(","),
        options=tuple(_plain(option) for option in options.split(",")),
    )


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
