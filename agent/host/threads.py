"""Starting a thread where there may be none to be had: the kernel refuses beyond a limit of tasks,
of a user or of a control group (``pids.max``).

Promises: a thread that cannot be started is a condition with a way out, not a defect.
Does not: end or wait for threads.
"""

from __future__ import annotations

import threading

from agent import errors


def start(thread: threading.Thread) -> None:
    """Start it, for the first time.

    Raises:
        errors.EnvironmentUnfit: there is none to be had now.
    """
    try:
        thread.start()
    except RuntimeError as exc:
        raise none_left() from exc


def none_left() -> errors.EnvironmentUnfit:
    """What is to be said of a thread that could not be started."""
    return errors.EnvironmentUnfit(
        "no thread can be started: this program's limit of tasks is reached",
        hint="raise the limit (ulimit -u, TasksMax= of its service, pids.max of its control group)"
        " or end what else runs below it",
    )
