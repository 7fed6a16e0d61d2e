"""CRIU's options for checkpoints that a container runtime takes: ``/etc/criu/runc.conf``.

runc (and crun, where it has no file of its own) hands this file to CRIU, which lets it override
what the runtime asked for. Nothing else reaches CRIU under a kubelet's checkpoint; without
``tcp-established`` a container with one open connection cannot be checkpointed at all.

The agent's options stand in a block of their own at the end of the file, between two comments. The
rule of the merge: every line outside of the block is the administrator's and stays as it is, and
what those lines say, or forbid, is left out of the block. So the previous content is in the file
itself: taking the block out restores it, also after a crash, also if it was edited meanwhile.

Promises: the file is replaced in one step, with its mode and owner; asking twice changes nothing; a
file that the agent made goes when the block goes.
Does not: know which options a CRIU has.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping

from agent import errors

PATH = "/etc/criu/runc.conf"

# What the container engine asks CRIU for as well. ``link-remap`` is missing on purpose: CRIU
# removes its links again before the runtime packs the root file system, so that such an image
# could not be restored; without it the checkpoint fails and says so.
OPTIONS: Mapping[str, str] = {
    "tcp-established": "",
    "file-locks": "",
    "ext-unix-sk": "",
    "ghost-limit": str(1 << 30),
}
# What an administrator may have chosen instead.
_INSTEAD = {"tcp-established": ("tcp-close",)}

_BEGIN = b"# ckpt-agent: begin (added by the node agent; edit what stands outside)"
_BEGIN_OWN = b"# ckpt-agent: begin (the node agent made this file)"
_END = b"# ckpt-agent: end"
_BLOCK = re.compile(rb"^# ckpt-agent: begin.*?^# ckpt-agent: end\n?", re.DOTALL | re.MULTILINE)
_OPTION = re.compile(rb"^\s*(?:--)?([a-z0-9][a-z0-9-]*)", re.MULTILINE)
_FILE_BYTES = 1 << 20


def merged(content: bytes | None, options: Mapping[str, str] = OPTIONS) -> bytes:
    """The file with the block: ``content`` is what it holds now, None if there is none."""
    made = content is None or _BEGIN_OWN in content
    theirs = stripped(content or b"")
    said = {match.decode() for match in _OPTION.findall(theirs)}
    ours = [
        f"{name} {value}".rstrip().encode()
        for name, value in options.items()
        if not said.intersection((name, *_INSTEAD.get(name, ())))
    ]
    if theirs and not theirs.endswith(b"\n"):
        # A last line without its end would swallow ours. It gets one, and keeps it.
        theirs += b"\n"
    begin = _BEGIN_OWN if made and not theirs else _BEGIN
    return b"\n".join([theirs + begin, *ours, _END, b""])


def stripped(content: bytes) -> bytes:
    """The file without the block."""
    return _BLOCK.sub(b"", content)


def install(path: str = PATH, options: Mapping[str, str] = OPTIONS) -> bool:
    """Put the block into the file, or bring it up to date; whether anything changed.

    Raises:
        errors.EnvironmentUnfit: the file cannot be read or replaced.
    """
    with _explained(path):
        content = _read(path)
        wanted = merged(content, options)
        if content == wanted:
            return False
        _replace(path, wanted)
        return True


def remove(path: str = PATH) -> bool:
    """Take the block out; whether there was one.

    Raises:
        errors.EnvironmentUnfit: the file cannot be read or replaced.
    """
    with _explained(path):
        content = _read(path)
        if content is None or not _BLOCK.search(content):
            return False
        rest = stripped(content)
        if not rest and _BEGIN_OWN in content:
            os.unlink(path)
        else:
            _replace(path, rest)
        return True


@contextlib.contextmanager
def installed(path: str = PATH, options: Mapping[str, str] = OPTIONS) -> Iterator[None]:
    """The block is in the file within the context; raises as ``install``."""
    install(path, options)
    try:
        yield
    finally:
        remove(path)


def _read(path: str) -> bytes | None:
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(info.st_mode):
        raise errors.EnvironmentUnfit(
            f"{path} is not a regular file",
            hint="let the file that it stands for hold: " + ", ".join(OPTIONS),
            path=path,
        )
    with open(path, "rb") as file:
        content = file.read(_FILE_BYTES + 1)
    if len(content) > _FILE_BYTES:
        raise errors.EnvironmentUnfit(
            f"{path} is too long to be CRIU's options", hint="look at it", path=path
        )
    return content


def _replace(path: str, content: bytes) -> None:
    try:
        info = os.lstat(path)
        mode, owner = stat.S_IMODE(info.st_mode), (info.st_uid, info.st_gid)
    except FileNotFoundError:
        mode, owner = 0o644, (os.geteuid(), os.getegid())
    new = f"{path}.ckpt-agent-new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)  # of an agent that was killed
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        os.fchown(fd, *owner)
        os.fchmod(fd, mode)
        file.flush()
        os.fsync(fd)
    os.rename(new, path)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise errors.EnvironmentUnfit(
            f"cannot change {path}: {exc.strerror}",
            hint="mount the node's /etc/criu into the agent's pod, writable",
            path=path,
        ) from exc
