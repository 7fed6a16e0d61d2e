"""The log of a service: one JSON object a line on standard error.

Promises: each line has ``ts`` (RFC 3339, UTC), ``level``, ``logger`` and ``msg``, and the facts
that were given with it (``extra={"facts": {...}}``, or one by one in ``extra``); a trace is in
``trace``; a line never breaks.
Does not: rotate, send or filter; whoever runs the service does.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import TextIO

# What every record has; all else was given with it.
_OWN = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "facts", "taskName"}


class JsonLines(logging.Formatter):
    """Makes a line of a record."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "ts": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        facts = {key: value for key, value in vars(record).items() if key not in _OWN}
        together = getattr(record, "facts", None)
        if isinstance(together, dict):
            facts |= together
        line |= {key: value for key, value in facts.items() if key not in line}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Lines(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        # It would be told on standard error, which takes nothing, or ends up here again (nativelog)
        # until all wait for it.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def to_stderr(level: int, stream: TextIO | None = None) -> None:
    """Send every log of this process from ``level`` on to standard error, or to ``stream``."""
    handler = _Lines(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # It tells each retry of a connection as a warning; what comes of it is told by us.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
