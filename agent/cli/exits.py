"""Exit statuses: one table, shown by every ``--help`` and in docs/cli.md.

Promises: the numbers are those of ``errors``; they do not change within a major version.
Does not: exit.
"""

from __future__ import annotations

DONE = 0
INTERNAL = 1
USAGE = 2
REFUSED = 3
FAILED = 4
DATA = 5
VOLUME = 6
ENVIRONMENT = 7
MOVE_INCOMPLETE = 8
INTERRUPTED = 130
# What a shell reports of a program that SIGPIPE ended, which is what happened in effect.
PIPE_CLOSED = 141

MEANING = {
    DONE: "done",
    INTERNAL: "internal error: a defect of ckpt-agent",
    USAGE: "wrong usage",
    REFUSED: "refused; nothing was touched",
    FAILED: "failed; a job that ran is as it was, of a restored one nothing runs",
    DATA: "an image is damaged or parts of it are missing",
    VOLUME: "the store's volume failed, is full or is not there",
    ENVIRONMENT: "CRIU, the kernel or privileges do not suffice, or the cluster does not answer",
    MOVE_INCOMPLETE: "a move stopped midway; the image is committed, the message says what goes on",
    INTERRUPTED: "interrupted; a job that was dumped goes on, of a restored one nothing runs",
    PIPE_CLOSED: "nobody reads standard output any more",
}
