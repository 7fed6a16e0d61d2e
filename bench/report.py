"""The report: sections of figures, what must be reached, what was slower; Markdown and JSON.

Promises: Markdown and JSON tell the same figures; a target that was missed is called missed.
Does not: round anything in the JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A bar inside a cell of a Markdown table.
PIPE = "\\|"


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that must be reached, and whether it was."""

    measure: str
    required: str
    measured: str
    met: bool


@dataclasses.dataclass
class Section:
    """One experiment. ``slower`` says in words where the agent was behind; ``data`` holds the
    figures as JSON values.
    """

    name: str
    title: str
    how: str
    heads: Sequence[str] = ()
    rows: list[Sequence[str]] = dataclasses.field(default_factory=list)
    targets: list[Target] = dataclasses.field(default_factory=list)
    slower: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


def markdown(sections: Sequence[Section], command: str, facts: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    lines = ["# Bench", "", f"`{command}`", ""]
    lines += [f"- {name}: {fact}" for name, fact in facts.items()]
    lines += ["", "Figures are medians with (lowest-highest).", ""]
    targets = [target for section in sections for target in section.targets]
    if targets:
        lines += ["## What must be reached", ""]
        lines += _table(
            ("measure", "required", "measured", ""),
            [
                (t.measure, t.required, t.measured, "met" if t.met else "**missed**")
                for t in targets
            ],
        )
    slower = [line for section in sections for line in section.slower]
    lines += ["", "## What was slower or larger", ""]
    lines += [f"- {line}" for line in slower] or ["Nothing that was measured in this run."]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.how, ""]
        lines += _table(section.heads, section.rows) if section.rows else []
        lines += ["", *(f"- {note}" for note in section.notes)] if section.notes else []
    return "\n".join(lines) + "\n"


def document(sections: Sequence[Section], command: str, facts: dict[str, Any]) -> str:
    """The whole report as JSON."""
    return json.dumps(
        {
            "apiVersion": "ckpt-agent.dev/v1",
            "kind": "BenchReport",
            "name": "bench",
            "command": command,
            "facts": facts,
            "sections": [dataclasses.asdict(section) for section in sections],
        },
        indent=1,
    )


def known(path: Path) -> dict[str, Section]:
    """The sections of a document that an earlier run left at ``path``, by name; none without."""
    if not path.exists():
        return {}
    sections = {}
    for each in json.loads(path.read_text())["sections"]:
        targets = [Target(**target) for target in each.pop("targets")]
        sections[each["name"]] = Section(**each, targets=targets)
    return sections


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(cell.replace('|', PIPE) for cell in row)} |" for row in rows),
    ]
