"""CRIU's log: what to quote of it, and what its messages mean for a person.

Promises: a failure carries CRIU's own errors and last lines, bounded in number and length, and a
hint where the cause is known. ``cr_errmsg`` of the reply is shown only where the log has nothing:
it is the first message logged and often has nothing to do with the failure.
Does not: show memory, environments or arguments (CRIU logs none at the levels used here).
"""

from __future__ import annotations

import dataclasses
import re
from typing import BinaryIO

from agent import errors

# Enough for a cause and what followed from it; a bug report wants the whole file anyway.
_TAIL_LINES = 20
_LINE_CHARACTERS = 300
# A log of level 4 can have megabytes; causes stand near its end.
_READ_BYTES = 256 << 10

# A process or a thread could not have its number (17 is EEXIST).
_TAKEN = r"Can't fork for \d+: File exists|Unable to create a thread: -17"
# What is said where memory is to come late; by the name of the source file, or of the socket.
_LAZY = re.compile(r"uffd|userfault|[Ll]azy")

# (pattern over the error lines, what to do about it); the first that matches is shown.
_HINTS = (
    # A ring's descriptor cannot be handed over by a socket, which is how CRIU gets descriptors.
    (r"io_uring|send_fds failed", "CRIU cannot dump io_uring; run the program without it"),
    (
        r"External socket is used|external stream sockets|Can't dump half of stream unix",
        "a Unix socket leads to a process outside the tree; dump the tree of their common parent",
    ),
    (
        r"[Ii]n-flight connection",
        "a program has not accepted a connection yet; try again in a moment",
    ),
    (
        r"ghost limit|ghost file .* too big|Can't dump ghost file",
        "an unlinked open file is larger than the ghost limit; raise it",
    ),
    (
        r"sysvipc|SysV|CLONE_NEWIPC|NEWIPC",
        "System V shared memory needs an IPC namespace of its own (unshare --ipc)",
    ),
    (
        r"Unable to interrupt task.*not permitted|[Ss]eize",
        "another tracer (a debugger, strace, another dump) holds the process; detach it",
    ),
    (
        r"tty.*(outside|dangling|session)|Found slave peer|ctty inheritance",
        "the terminal of the tree belongs to somebody else; start the program with its own",
    ),
    (
        rf"{_TAKEN}|pid \d+ .*(exists|in use)|PID.*mismatch",
        "a pid of the tree is in use here; use --isolate",
    ),
    (
        r"Can't open file|on restore: No such file",
        "a file that the tree uses is not here; put it back where it was",
    ),
    (
        r"has bad size|has bad mode|has bad build-ID|build-ID",
        "a file that the tree uses has changed since the dump",
    ),
    (r"Can't bind|Address already in use", "a listening address of the tree is taken here"),
    (r"hugetlb|huge page", "the tree uses huge pages that cannot be had here"),
    (
        r"Unsupported file type|Can't dump file|unsupported fd|anon_inode:\[(?!event)"
        r"|handle_device_vma|non-regular mapping",
        "the tree holds or maps something that CRIU cannot dump (a device, a GPU, ...)",
    ),
    (
        r"cpu|CPU|xsave|fpu",
        "the CPU lacks what the tree was using; restore on the same or a newer kind",
    ),
    (r"rlimit", "restoring resource limits needs CAP_SYS_RESOURCE"),
    (
        r"not-sent send queue",
        "the peer of a TCP connection answered before both ends were restored; try again",
    ),
    (r"Connection reset by peer", "the peer of a TCP connection has dropped it"),
    (
        r"tcp-established|connected TCP socket|Connected TCP",
        "the tree has live TCP connections; allow them, or close them first",
    ),
    (r"Permission denied|Operation not permitted", "run as root with all capabilities"),
    (r"No space left", "free space in the work directory"),
    (r"Cannot allocate memory", "free memory on this host"),
)
_UNACCEPTED = re.compile(r"[Ii]n-flight connection")
# Logged as errors, but CRIU goes on: it tries to raise its own limits, and it probes the kernel.
_NOISE = re.compile(r"FAILED|RLIMIT_NOFILE for self|Unable to create tun|Can't find tun")
# Said at every start without CAP_SYS_RESOURCE: CRIU raises its own limit if it may.
_HARMLESS = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE for self")
_COMPILED = tuple((re.compile(pattern), hint) for pattern, hint in _HINTS)


@dataclasses.dataclass(frozen=True)
class Log:
    """The telling part of one log: error lines in order, and the last lines of any kind."""

    errors: tuple[str, ...]
    tail: tuple[str, ...]

    @property
    def hint(self) -> str:
        """The way out if the cause is known, else ""."""
        text = "\n".join(line for line in self.errors if not _NOISE.search(line))
        return next((hint for pattern, hint in _COMPILED if pattern.search(text)), "")

    @property
    def cause(self) -> str:
        """The error line to show first: the earliest that matters, since later ones follow."""
        return next((line for line in self.errors if not _NOISE.search(line)), "")


def parse(raw: bytes) -> Log:
    """Take a log, or its end, apart; never fails."""
    lines = [
        line.strip()[:_LINE_CHARACTERS]
        for line in raw.decode(errors="replace").splitlines()
        if line.strip()
    ]
    wrong = [
        _without_stamp(line) for line in lines if "Error (" in line and not _HARMLESS.search(line)
    ]
    return Log(tuple(wrong[-_TAIL_LINES:]), tuple(lines[-_TAIL_LINES:]))


def read(path: str) -> Log:
    """The log at ``path``; an empty one if CRIU did not get so far as to open it."""
    try:
        with open(path, "rb") as file:
            return parse(_end(file))
    except FileNotFoundError:
        return Log((), ())


def failure(action: str, log: Log, errmsg: str = "", **facts: object) -> errors.Failed:
    """The error for a failed ``action`` ("dump" or "restore")."""
    said = "" if _NOISE.search(errmsg) else errmsg.strip()[:_LINE_CHARACTERS]
    cause = log.cause or said or "it gave no reason"
    pending = action == "dump" and _UNACCEPTED.search(cause)
    kind = errors.ConnectionUnaccepted if pending else errors.CriuFailed
    return kind(
        f"CRIU could not {action}: {cause}",
        hint=log.hint or "the last lines of CRIU's log say what it was doing",
        log_errors=list(log.errors),
        log_tail=list(log.tail),
        **facts,
    )


def blames_lazy_mode(failure: BaseException) -> bool:
    """Whether CRIU failed at letting processes wait for their memory."""
    return any(_LAZY.search(line) for line in _quoted(failure))


def blames_numbers(failure: BaseException) -> bool:
    """Whether CRIU failed since somebody had a number of the tree's."""
    return any(re.search(_TAKEN, line) for line in _quoted(failure))


def _quoted(failure: BaseException) -> list[str]:
    quoted = failure.facts.get("log_errors") if isinstance(failure, errors.CriuFailed) else None
    return quoted if isinstance(quoted, list) else []


def died(action: str, status: int | None, path: str, otherwise: str) -> errors.CriuFailed:
    """The error for a CRIU that ended without a reply, with what its log at ``path`` says;
    ``otherwise`` is the hint if that is nothing known. ``status`` is 128 + N for signal N.
    """
    how = f"signal {status - 128}" if status is not None and status > 128 else f"status {status}"
    said = read(path)
    return errors.CriuFailed(
        f"CRIU died during the {action} ({how})",
        hint=said.hint or otherwise,
        log_errors=list(said.errors),
        log_tail=list(said.tail),
    )


def _end(file: BinaryIO) -> bytes:
    size = file.seek(0, 2)
    file.seek(max(0, size - _READ_BYTES))
    return file.read(_READ_BYTES)


def _without_stamp(line: str) -> str:
    """``(00.123456) Error (criu/x.c:12): text`` without the time."""
    return re.sub(r"^\(\d+\.\d+\)\s*(?:\d+:\s*)?", "", line)
