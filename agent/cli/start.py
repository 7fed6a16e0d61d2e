"""Where the installed programs begin: what Ctrl-C means while their modules are still being loaded,
which takes most of the time of a short command.

Promises: it ends the program with the exit status and the line that it has later on.
Does not: import anything of the program before that is so; change what who started it had ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

# ``exits.INTERRUPTED``, and what is told then; nothing has been begun that would have to be undone.
_STATUS, _TOLD = 130, b"ckpt-agent: interrupted\n"


def main() -> None:
    """The entry point ``ckpt-agent``."""
    _heed_interrupts()
    from agent.cli import main as program

    program.main()


def kubectl() -> None:
    """The entry point ``kubectl-ckpt``."""
    _heed_interrupts()
    from agent.cli import kubectl as program

    program.main()


def complete() -> None:
    """The entry point ``kubectl_complete-ckpt``."""
    _heed_interrupts()
    from agent.cli import kubectl as program

    program.complete()


def _heed_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    # Not by an exception, which would come up in the middle of somebody's import.
    with contextlib.suppress(OSError):  # nobody may listen
        os.write(2, _TOLD)
    os._exit(_STATUS)
