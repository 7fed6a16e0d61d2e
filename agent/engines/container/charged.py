"""Files in memory, written at their container's own expense.

A page of a file in memory (tmpfs: /dev/shm, emptyDir of medium Memory) is charged to whoever writes
it first, for as long as it exists. So a process in the container's control groups does it: the
container's limit holds, and the agent does not swell by what it restores.

Promises: as ``unpack.apply``; the process ends with the call.
Does not: check what is written; ``unpack`` does, on both sides.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO

from agent import errors
from agent.engines.container import unpack
from agent.host import cgroups, clock, subprocesses

_PIECE_BYTES = 1 << 20
# An answer is one line.
_ANSWER_BYTES = 1 << 16
_END_S = 10.0


def apply(
    name: str,
    pieces: Iterable[bytes],
    limits: unpack.Limits,
    root: int,
    deadline: clock.Deadline,
    groups: Sequence[str],
    *,
    mounts: Iterable[str] = (),
) -> None:
    """``unpack.apply`` without whiteouts, by a process in the control groups ``groups``.

    Raises:
        errors.Corrupt | errors.RestoreFailed | errors.DeadlineExceeded: as that does.
        errors.EnvironmentUnfit: no process can be moved there.
    """
    order = json.dumps(
        {
            "name": name,
            "entries": limits.entries,
            "content_bytes": limits.content_bytes,
            "root": root,
            "deadline_s": deadline.remaining_s,
            "mounts": list(mounts),
        }
    )
    with contextlib.ExitStack() as owned:
        stream, feed = _pipe(owned)
        answers, answer = _pipe(owned)
        passed = [root, stream.fileno(), answer.fileno()]
        argv = [sys.executable, "-I", "-m", __name__, *map(str, passed[1:]), order]
        child = owned.enter_context(subprocesses.running(argv, pass_fds=passed))
        # A write to a process that stands still would never return.
        timer = threading.Timer(deadline.remaining_s, child.kill)
        owned.callback(timer.cancel)
        timer.start()
        cgroups.join(child.pid, groups)
        stream.close()
        answer.close()
        with contextlib.suppress(BrokenPipeError):  # it says why it reads no more
            for piece in pieces:
                _write(feed, piece)
        feed.close()
        said = answers.read(_ANSWER_BYTES)
        status = child.wait(deadline.sooner(_END_S))
    deadline.check("the restore")
    if status != 0:
        raise _understood(said, status, name)


def _understood(said: bytes, status: int, name: str) -> errors.CkptError:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(said)
        kinds = {each.code: each for each in (errors.Corrupt, errors.DeadlineExceeded)}
        kind = kinds.get(told["code"], errors.RestoreFailed)
        return kind(str(told["message"]), hint=str(told["hint"]))
    return errors.RestoreFailed(
        f"what wrote {name.strip('/')} of the image ended with {status}",
        hint="does the container's memory limit hold its files in memory as well?",
    )


def _pipe(owned: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    reading, writing = os.pipe()
    return owned.enter_context(FileIO(reading, "rb")), owned.enter_context(FileIO(writing, "wb"))


def _write(feed: FileIO, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[feed.write(view) :]


def main(argv: Sequence[str]) -> int:
    """Be the process in the groups: a stream to read, where to answer, and the order."""
    stream, answer, text = int(argv[1]), int(argv[2]), argv[3]
    order = json.loads(text)

    def pieces() -> Iterator[bytes]:
        while piece := os.read(stream, _PIECE_BYTES):
            yield piece

    try:
        unpack.apply(
            order["name"],
            pieces(),
            unpack.Limits(order["entries"], order["content_bytes"]),
            order["root"],
            clock.Deadline.after(order["deadline_s"]),
            whiteouts=False,
            mounts=order["mounts"],
        )
    except errors.CkptError as exc:
        told = {"code": exc.code, "message": exc.message, "hint": exc.hint}
        os.write(answer, json.dumps(told).encode()[:_ANSWER_BYTES])
        return 1
    # What is left in the stream is the archive's padding.
    for _ in pieces():
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
