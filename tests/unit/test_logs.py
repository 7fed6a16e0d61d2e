"""The log of a service: one JSON object a line, with the facts that were given."""

from __future__ import annotations

import json
import logging

from agent.host.logs import JsonLines


def line(**more: object) -> dict[str, object]:
    record = logging.makeLogRecord({"name": "agent.x", "msg": "it %s", "args": ("ran",), **more})
    made: dict[str, object] = json.loads(JsonLines().format(record))
    del made["ts"]
    return made


def test_facts_are_in_the_line_together_or_one_by_one_and_hide_nothing_of_it() -> None:
    plain = {"level": "info", "logger": "agent.x", "msg": "it ran"}
    info = {"levelname": "INFO"}
    assert line(**info) == plain
    assert line(**info, facts={"pod": "p", "msg": "other"}) == {**plain, "pod": "p"}
    assert line(**info, reason="r", logger="other") == {**plain, "reason": "r"}
