"""Values of settings as people write them: paths, spans of time, sizes, ports.

Promises: pure; what does not make sense is ``errors.InvalidInput`` with an example of what does.
Does not: know which setting a value is for.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import urllib.parse

from agent import errors
from agent.model import storage

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_LAST_PORT = 65535


@dataclasses.dataclass(frozen=True)
class StoreUrl:
    """Where a store is: ``file`` is the only scheme so far; ``path`` is absolute."""

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{urllib.parse.quote(self.path)}"


def store_url(value: object, base: str) -> StoreUrl:
    """Read a path (taken from the directory ``base`` if relative) or a URL.

    Raises:
        errors.InvalidInput: no path, an unknown scheme, or a URL with more than a path.
    """
    text = as_text(value)
    if "://" not in text:
        return StoreUrl("file", posixpath.normpath(posixpath.join(base, text)))
    parts = urllib.parse.urlsplit(text)
    if parts.scheme != "file":
        raise errors.InvalidInput(
            f"no store can be opened with {parts.scheme}://",
            hint="supported are a path and file:///absolute/path (a local or NFS directory)",
        )
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not parts.path:
        raise errors.InvalidInput(
            f"{text!r} is not a file URL", hint="write three slashes: file:///absolute/path"
        )
    return StoreUrl("file", posixpath.normpath(urllib.parse.unquote(parts.path)))


def duration_s(value: object, base: str = "") -> float:
    """Read seconds: a number, or a number with s, m, h, d or w behind it."""
    text = as_text(value)
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhdw]?)", text)
    if match is None or float(match[1]) == 0:
        raise errors.InvalidInput(
            f"{text!r} is not a time span", hint="write 90s, 15m, 12h, 7d or 2w"
        )
    return float(match[1]) * _SECONDS[match[2] or "s"]


def size_bytes(value: object, base: str = "") -> int:
    """Read bytes: a whole number, or one with KiB, MiB, GiB or TiB behind it."""
    text = as_text(value)
    match = re.fullmatch(r"([0-9]{1,15}) ?(|B|[KMGT]iB)", text)
    if match is None:
        raise errors.InvalidInput(f"{text!r} is not a size", hint="write 512MiB or 4GiB")
    return int(match[1]) * _BYTES[match[2]]


def count(value: object, base: str = "") -> int:
    """Read a whole number from 1."""
    text = as_text(value)
    if re.fullmatch(r"[0-9]{1,9}", text) is None or int(text) == 0:
        raise errors.InvalidInput(f"{text!r} is not a whole number from 1", hint="write 1, 2, ...")
    return int(text)


def rate_per_s(value: object, base: str = "") -> float:
    """Read how often a second: a number above 0."""
    text = as_text(value)
    if re.fullmatch(r"[0-9]{1,6}(?:\.[0-9]{1,3})?", text) is None or float(text) == 0:
        raise errors.InvalidInput(f"{text!r} is not a rate", hint="write 20 or 0.5, a second")
    return float(text)


def percent(value: object, base: str = "") -> int:
    """Read a whole number from 0 to 99, with or without a percent sign."""
    text = as_text(value).removesuffix("%")
    if re.fullmatch(r"[0-9]{1,2}", text) is None:
        raise errors.InvalidInput(f"{text!r} is not a part in percent", hint="write 0, 10, 15%")
    return int(text)


def share(value: object, base: str = "") -> int:
    """Read a whole number from 1 to 100, with or without a percent sign."""
    text = as_text(value).removesuffix("%")
    if re.fullmatch(r"[0-9]{1,3}", text) is None or not 1 <= int(text) <= 100:
        raise errors.InvalidInput(f"{text!r} is not a share in percent", hint="write 5, 10%, 100")
    return int(text)


def rate_bytes(value: object, base: str = "") -> int:
    """Read bytes a second, as ``size_bytes``: 1 MiB at least."""
    found = size_bytes(value, base)
    if found < _BYTES["MiB"]:
        raise errors.InvalidInput(f"{value!r} a second is too little", hint="write 100MiB or more")
    return found


def as_text(value: object) -> str:
    """A value as text; raises ``errors.InvalidInput`` for what is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise errors.InvalidInput(f"{value!r} is not a text or number", hint="give one value")
    if isinstance(value, str) and "\0" in value:
        raise errors.InvalidInput("the value holds a zero byte", hint="remove it")
    return str(value)


def stores(value: object, base: str) -> dict[str, str]:
    """Names of storages with their paths."""
    return storage.read(as_text(value))


def word(value: object, base: str) -> str:
    """Any text."""
    return as_text(value)


def path(value: object, base: str) -> str:
    """A path, from the directory ``base`` if relative."""
    return posixpath.normpath(posixpath.join(base, as_text(value)))


def port(value: object, base: str) -> int:
    """A TCP port."""
    text = as_text(value)
    if re.fullmatch(r"[0-9]{1,5}", text) is None or int(text) > _LAST_PORT:
        raise errors.InvalidInput(f"{text!r} is not a port", hint="use 1 to 65535, or 0 for any")
    return int(text)


def yes(value: object, base: str) -> bool:
    """Yes or no."""
    if isinstance(value, bool):
        return value
    text = as_text(value).lower()
    if text not in ("true", "false", "1", "0"):
        raise errors.InvalidInput(f"{text!r} is not yes or no", hint="write true or false")
    return text in ("true", "1")


def criu_log_level(value: object, base: str) -> int:
    """How much CRIU's log tells."""
    text = as_text(value)
    if text not in ("0", "1", "2", "3", "4"):
        raise errors.InvalidInput(f"{text!r} is not a log level of CRIU", hint="use 0 to 4")
    return int(text)
