"""Whether the agent can do its work: CRIU, the store's volume, the runtime and the API server have
each answered.

Promises: ready only after everything answered; a volume or a runtime that goes away, or that hangs
for longer than ``HANG_S``, makes it unready, and one that comes back ready again; why is logged
once per change.
Does not: end the agent: a pod that is restarted because a volume is away would be away itself when
it comes back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from agent import errors
from agent.host import clock

_log = logging.getLogger(__name__)

EVERY_S = 10.0
# At the start, and after a failure.
_SOON_S = 1.0
HANG_S = 30.0


class Readiness:
    """Looks again and again in a thread of its own. ``checks`` are by name; each returns, or
    raises why not. ``tell`` is called with every change.
    """

    def __init__(
        self, checks: Mapping[str, Callable[[], object]], tell: Callable[[bool], None]
    ) -> None:
        self._checks = checks
        self._tell = tell
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ready = False
        self._reason = ""
        self._current = ""
        self._looked_s = clock.monotonic_s()
        # A check may hang in the kernel, where nothing can end it.
        self._thread = threading.Thread(target=self._run, name="readiness", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more; the agent counts as not ready."""
        self._stop.set()
        self._set(False, "the agent is shutting down")

    @property
    def reason(self) -> str:
        """Why it is not ready; "" if it is."""
        with self._lock:
            return "" if self._ready else self._reason or "not everything was looked at yet"

    def watch(self) -> None:
        """To be called now and then: notices a look that hangs."""
        if clock.monotonic_s() - self._looked_s > HANG_S:
            self._set(False, f"{self._current} does not answer")

    def _run(self) -> None:
        while not self._stop.is_set():
            reason = self._look()
            self._looked_s = clock.monotonic_s()
            self._set(not reason, reason)
            self._stop.wait(_SOON_S if reason else EVERY_S)

    def _look(self) -> str:
        for name, check in self._checks.items():
            self._current = name
            try:
                check()
            except errors.CkptError as exc:
                return f"{name}: {exc.message}"
        return ""

    def _set(self, ready: bool, reason: str) -> None:
        with self._lock:
            if self._stop.is_set() and ready:
                return
            changed = (ready, reason) != (self._ready, self._reason)
            flipped = ready != self._ready
            self._ready, self._reason = ready, reason
        if changed:
            _log.log(
                logging.INFO if ready else logging.WARNING,
                "ready" if ready else f"not ready: {reason}",
            )
        if flipped:
            self._tell(ready)
