"""How results look: documents in, text out; the one place where columns are decided.

A *document* is a JSON object with ``apiVersion``, ``kind`` and ``name``, as
docs/output-schema.json describes it. JSON and YAML print it whole; a table shows some of it.

Promises: rendering is pure; nothing is cut off, whatever the width; ``name`` prints one name a
line, and each name is what another verb takes.
Does not: make documents (documents.py) or write (invocation.py).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable
from typing import Any

from agent.cli import stopping

Document = dict[str, Any]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# A person compares ages by their largest unit; from the second of a unit on it is used.
_AGES = (("d", 86400), ("h", 3600), ("m", 60))


def human_bytes(size_bytes: float | None) -> str:
    """``size_bytes`` with three digits and a binary unit; "-" if it is not known."""
    if size_bytes is None:
        return "-"
    value = float(size_bytes)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def human_s(span_s: float | None) -> str:
    """A time span: milliseconds below a second, else seconds or minutes; "-" if not known."""
    if span_s is None:
        return "-"
    if span_s < 1:
        return f"{span_s * 1000:.0f} ms"
    return f"{span_s:.1f} s" if span_s < 120 else f"{span_s / 60:.1f} min"


def age(created_at: str, now_s: float) -> str:
    """How long ago an RFC 3339 time was: ``42s``, ``5m``, ``3h``, ``12d``."""
    passed_s = max(0.0, now_s - datetime.datetime.fromisoformat(created_at).timestamp())
    for unit, seconds in _AGES:
        if passed_s >= 2 * seconds:
            return f"{int(passed_s // seconds)}{unit}"
    return f"{int(passed_s)}s"


@dataclasses.dataclass(frozen=True)
class Column:
    """One column: its title, its cell for an item, and whether it holds numbers."""

    title: str
    cell: Callable[[Document, float], str]
    right: bool = False


def _text(key: str) -> Callable[[Document, float], str]:
    return lambda item, now_s: str(item[key]) if item.get(key) not in (None, "") else "-"


def _size(key: str) -> Callable[[Document, float], str]:
    return lambda item, now_s: human_bytes(item.get(key))


def _yes(key: str) -> Callable[[Document, float], str]:
    return lambda item, now_s: "yes" if item[key] else "no"


def _ratio(item: Document, now_s: float) -> str:
    return f"{item['rawBytes'] / item['storedBytes']:.1f}" if item["storedBytes"] else "-"


_IMAGE = (
    Column("NAME", _text("name")),
    Column("AGE", lambda item, now_s: age(item["createdAt"], now_s), right=True),
    Column("MEMBERS", lambda item, now_s: str(len(item["members"])), right=True),
    Column("RAW", _size("rawBytes"), right=True),
    Column("NEW", _size("newBytes"), right=True),
    Column("STORED", _size("storedBytes"), right=True),
    Column("STATUS", lambda item, now_s: "damaged" if item["damage"] else "ok"),
)
_IMAGE_WIDE = (
    *_IMAGE,
    Column("RATIO", _ratio, right=True),
    Column("PAGES", _text("pages"), right=True),
    Column("ZERO", _text("zeroPages"), right=True),
    Column("CREATED", _text("createdAt")),
    Column("DAMAGE", _text("damage")),
)
# In a cluster.
_STORAGE = Column("STORAGE", _text("storage"))
_RESTORED = (
    Column("MEMBER", _text("name")),
    Column("PID", _text("pid"), right=True),
    Column("EXIT", _text("exitStatus"), right=True),
)
_RESTORED_POD = (
    Column("POD", _text("pod")),
    Column("NODE", _text("node")),
    Column("IMAGE", _text("name")),
    Column("RUNNING", lambda item, now_s: human_s(item["runningSeconds"]), right=True),
)
_MOVED = (
    Column("POD", _text("pod")),
    Column("FROM", _text("source")),
    Column("TO", _text("target")),
    Column("AWAY", lambda item, now_s: human_s(item["awaySeconds"]), right=True),
    Column("IMAGE", _text("name")),
)
_BACK = (
    Column("POD", _text("member")),
    Column("FROM", lambda item, now_s: item["was"]["node"]),
    Column("TO", lambda item, now_s: item["now"]["node"]),
    Column("NOW", lambda item, now_s: item["now"]["pod"]),
)
_OPERATIONS = (
    Column("ID", _text("name")),
    Column("AGE", lambda item, now_s: age(item["createdAt"], now_s), right=True),
    Column("OPERATION", _text("operation")),
    Column("GROUP", _text("group")),
    Column("STATE", _text("state")),
    Column("STEP", _text("step")),
    Column("IMAGE", lambda item, now_s: item["image"]["name"] if item["image"] else "-"),
)
_OPERATIONS_WIDE = (
    *_OPERATIONS,
    Column("CALLER", _text("caller")),
    Column("TAKEOVERS", _text("takeovers"), right=True),
    Column("ENDED", _text("endedAt")),
    Column("ERROR", lambda item, now_s: item["error"]["message"] if item["error"] else "-"),
)
_MEMBER_PLANS = (
    Column("MEMBER", _text("name")),
    Column("POD", _text("pod")),
    Column("NODE", _text("node")),
    Column("DUMP", lambda item, now_s: "would work" if item["plan"]["feasible"] else "would fail"),
    Column(
        "CAPTURED",
        lambda item, now_s: human_bytes(item["plan"]["estimate"]["rawBytes"]),
        right=True,
    ),
    Column(
        "STOP",
        lambda item, now_s: human_s(item["plan"]["estimate"]["stopSeconds"]),
        right=True,
    ),
)
_COMPARED = (
    Column("MEMBER", _text("name")),
    Column("SAME", _size("sameBytes"), right=True),
    Column("CHANGED", _size("changedBytes"), right=True),
    Column("ADDED", _size("addedBytes"), right=True),
    Column("REMOVED", _size("removedBytes"), right=True),
    Column("FILES", lambda item, now_s: str(len(item["files"])), right=True),
)
_CHANGED_FILES = (Column("CHANGE", _text("change")), Column("PATH", _text("path")))
_VERIFIED = (
    Column("NAME", _text("name")),
    Column("STATUS", lambda item, now_s: "ok" if item["good"] else "damaged"),
    Column("READ", _size("readBytes"), right=True),
    Column("DAMAGED", lambda item, now_s: str(len(item["damaged"])), right=True),
)
_EXPORTED = (
    Column("IMAGE", _text("name")),
    Column("MEMBER", _text("member")),
    Column("SIZE", _size("sizeBytes"), right=True),
    Column("PATH", _text("path")),
)
_DAMAGED = (Column("PART", _text("part")), Column("PROBLEM", _text("problem")))
_REMOVED = (Column("NAME", _text("name")), Column("ACTION", _text("action")))
_CHECKS = (
    Column("STATUS", _text("status")),
    Column("CHECK", _text("name")),
    Column("FOUND", _text("found")),
)
_PROCESSES = (
    Column("PID", _text("pid"), right=True),
    Column("PARENT", _text("parent"), right=True),
    Column("THREADS", _text("threads"), right=True),
    Column("MEMORY", _size("memoryBytes"), right=True),
    Column("STATE", _text("state")),
    Column("PROGRAM", _text("program")),
)
_MEMORY = (
    Column("KIND", _text("kind")),
    Column("SIZE", _size("bytes"), right=True),
    Column("CAPTURED", _yes("captured")),
)
_FILES = (
    Column("KIND", _text("kind")),
    Column("SIZE", _size("bytes"), right=True),
    Column("TRAVELS", _yes("travels")),
    Column("PATH", _text("path")),
)
_SOCKETS = (
    Column("KIND", _text("kind")),
    Column("STATE", _text("state")),
    Column("LOCAL", _text("local")),
    Column("PEER", _text("peer")),
)
_FOLLOWED = (
    Column("ROOT", _text("root"), right=True),
    Column("PROGRAM", _text("program")),
    Column("BECAUSE", _text("because")),
)
_LEAVING = (
    Column("CONNECTION", _text("link")),
    Column("PID", _text("pid"), right=True),
    Column("PROGRAM", _text("program")),
    Column("WHY", _text("reason")),
    Column("BLOCKS", _yes("blocks")),
)
_FINDINGS = (
    Column("SUBJECT", _text("subject")),
    Column("REASON", _text("reason")),
    Column("WAY OUT", _text("cure")),
)


def _printable(text: str) -> str:
    """Escape what is not printable: a line break in a file's name would forge a row, and an
    escape sequence would reach the terminal.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(columns: Iterable[Column], items: Iterable[Document], now_s: float) -> list[str]:
    """Aligned lines, the titles first."""
    columns = tuple(columns)
    rows = [[c.title for c in columns]]
    rows += [[_printable(c.cell(item, now_s)) for c in columns] for item in items]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _section(
    title: str, columns: Iterable[Column], items: list[Document], now_s: float
) -> list[str]:
    if not items:
        return [f"{title}: none"]
    return [f"{title}:", *(f"  {line}" for line in table(columns, items, now_s))]


def _files(items: list[Document], wide: bool, now_s: float) -> list[str]:
    """The files that travel; those that must be there at restore, often many, only if ``wide``."""
    shown = [item for item in items if wide or item["travels"]]
    lines = _section("Files", _FILES, shown, now_s)
    if len(shown) < len(items):
        lines.append(
            f"  and {len(items) - len(shown)} that do not travel but must be there: see -o wide"
        )
    return lines


def _pairs(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max(len(key) for key, _ in rows) + 2
    return [f"{key + ':':<{width}}{value}" for key, value in rows]


def _image_list(document: Document, wide: bool, now_s: float) -> list[str]:
    columns = _IMAGE_WIDE if wide else _IMAGE
    if any("storage" in item for item in document["items"]):
        columns = (*columns, _STORAGE)
    return table(columns, document["items"], now_s)


def _image(document: Document, wide: bool, now_s: float) -> list[str]:
    change = ""
    where = f" in storage {document['storage']}" if document.get("storage") else ""
    if document.get("previous"):
        change = f" (against {document['previous']})"
    lines = _pairs(
        (
            ("Name", document["name"]),
            ("Created", f"{document['createdAt']} ({age(document['createdAt'], now_s)} ago)"),
            ("Memory", human_bytes(document["rawBytes"])),
            ("New", human_bytes(document["newBytes"]) + change),
            ("Stored", human_bytes(document["storedBytes"]) + where),
            ("Pages", f"{document['pages']}, of these zero: {document['zeroPages']}"),
            ("Damage", document["damage"] or "none known"),
        )
    )
    for member in document.get("detail", ()):
        lines += ["", f"Member {member['name']}, engine {member['engine'] or 'unknown'}"]
        lines += stopping.told(member.get("stop", {}))
        lines += _section("Processes", _PROCESSES, member["processes"], now_s)
        lines += _section("Memory", _MEMORY, member["memory"], now_s)
        lines += _files(member["files"], wide, now_s)
        lines += _section("Sockets", _SOCKETS, member["sockets"], now_s)
    return lines


def _dump_report(document: Document, wide: bool, now_s: float) -> list[str]:
    # The name alone, so that IMAGE=$(ckpt-agent dump ...) holds what restore takes.
    return [document["name"]]


def _restore_report(document: Document, wide: bool, now_s: float) -> list[str]:
    if document.get("jobset") or document.get("group"):
        return table(_BACK, document["pods"], now_s)
    if document.get("pod"):
        return table(_RESTORED_POD, [document], now_s)
    return table(_RESTORED, document["members"], now_s)


def _move_report(document: Document, wide: bool, now_s: float) -> list[str]:
    if document.get("jobset"):
        return table(_BACK, document["pods"], now_s)
    return table(_MOVED, [document], now_s)


def _image_diff(document: Document, wide: bool, now_s: float) -> list[str]:
    lines = _pairs((("Name", document["name"]), ("Against", document["base"])))
    lines += ["", *table(_COMPARED, document["members"], now_s)]
    for member in document["members"]:
        if member["files"]:
            title = f"Files of {member['name']}"
            lines += ["", *_section(title, _CHANGED_FILES, member["files"], now_s)]
    return lines


def _verify_report(document: Document, wide: bool, now_s: float) -> list[str]:
    lines = table(_VERIFIED, document["items"], now_s)
    for item in document["items"]:
        if item["damaged"]:
            lines += ["", *_section(item["name"], _DAMAGED, item["damaged"], now_s)]
    return lines


def _export_report(document: Document, wide: bool, now_s: float) -> list[str]:
    return table(_EXPORTED, [document], now_s)


def _import_report(document: Document, wide: bool, now_s: float) -> list[str]:
    return [document["name"]]


def _prune_report(document: Document, wide: bool, now_s: float) -> list[str]:
    return table(_REMOVED, document["items"], now_s)


def _doctor_report(document: Document, wide: bool, now_s: float) -> list[str]:
    head, *rows = table(_CHECKS, document["checks"], now_s)
    lines = [head]
    for check, row in zip(document["checks"], rows, strict=True):
        lines.append(row)
        if check["status"] != "ok":
            lines += [f"    consequence: {check['consequence']}", f"    cure: {check['cure']}"]
    return lines


def _plan(document: Document, wide: bool, now_s: float) -> list[str]:
    estimate = document["estimate"]
    rates = estimate["rates"]
    written = estimate.get("written")
    pairs = [
        ("Name", document["name"]),
        ("Dump", "would work" if document["feasible"] else "would be refused or fail"),
        ("Captured", human_bytes(estimate["rawBytes"])),
        (
            "Stop",
            f"{'about' if written else 'at most about'} {human_s(estimate['stopSeconds'])}, at"
            f" {human_bytes(rates['captureBytesPerSecond'])}/s and"
            f" {human_s(rates['fixedSeconds'])} + {human_s(rates['processSeconds'])} a process",
        ),
    ]
    if written:
        wrote = (
            f"{human_bytes(written['bytes'])} in {human_s(written['seconds'])}, of"
            f" {human_bytes(written['followedBytes'])}; a stop reads"
            f" {human_bytes(written['leftForStopBytes'])}"
        )
        pairs.append(("Written", wrote))
        reasons = "; ".join(written["notFollowedBecause"])
        if reasons:
            pairs.append(
                (
                    "Apart",
                    f"{human_bytes(written['notFollowedBytes'])} cannot be followed: {reasons}",
                )
            )
    lines = _pairs(pairs)
    if "members" in document:
        lines += ["", *_section("Members", _FOLLOWED, document["members"], now_s)]
        lines += ["", *_section("Leaving", _LEAVING, document["leaving"], now_s)]
    for title, columns, key in (
        ("Blockers", _FINDINGS, "blockers"),
        ("Warnings", _FINDINGS, "warnings"),
        ("Processes", _PROCESSES, "processes"),
        ("Memory", _MEMORY, "memory"),
        ("Sockets", _SOCKETS, "sockets"),
    ):
        lines += ["", *_section(title, columns, document[key], now_s)]
    return [*lines, "", *_files(document["files"], wide, now_s)]


def _operation(document: Document, wide: bool, now_s: float) -> list[str]:
    if document["pods"]:
        return table(_BACK, document["pods"], now_s)
    return _operation_table([document], wide, now_s)


def _operation_list(document: Document, wide: bool, now_s: float) -> list[str]:
    return _operation_table(document["items"], wide, now_s)


def _operation_table(items: list[Document], wide: bool, now_s: float) -> list[str]:
    return table(_OPERATIONS_WIDE if wide else _OPERATIONS, items, now_s)


def _epoch_plan(document: Document, wide: bool, now_s: float) -> list[str]:
    lines = _pairs(
        (
            ("Name", document["name"]),
            ("Dump", "would work" if document["feasible"] else "would be refused or fail"),
        )
    )
    lines += [f"  - {_printable(reason)}" for reason in document["obstacles"]]
    return [*lines, "", *_section("Members", _MEMBER_PLANS, document["members"], now_s)]


def _error(document: Document, wide: bool, now_s: float) -> list[str]:
    lines = [f"ckpt-agent: {document['message']}"]
    facts = document["facts"]
    lines += [f"  - {_printable(str(reason))}" for reason in facts.get("reasons", ())]
    tail = facts.get("log_tail", ())
    lines += [f"  | {line}" for line in (tail.splitlines() if isinstance(tail, str) else tail)]
    lines += [f"  | {_printable(line)}" for line in str(facts.get("output", "")).splitlines()]
    if document["hint"]:
        lines.append(f"hint: {document['hint']}")
    return lines


_LAYOUTS: dict[str, Callable[[Document, bool, float], list[str]]] = {
    "Image": _image,
    "ImageList": _image_list,
    "ImageDiff": _image_diff,
    "DumpReport": _dump_report,
    "RestoreReport": _restore_report,
    "MoveReport": _move_report,
    "VerifyReport": _verify_report,
    "ExportReport": _export_report,
    "ImportReport": _import_report,
    "PruneReport": _prune_report,
    "DoctorReport": _doctor_report,
    "Plan": _plan,
    "EpochPlan": _epoch_plan,
    "Operation": _operation,
    "OperationList": _operation_list,
    "Error": _error,
}


def _names(document: Document) -> list[str]:
    if "items" in document:
        return [item["name"] for item in document["items"]]
    if "checks" in document:
        return [check["name"] for check in document["checks"]]
    return [document["name"]]


def render(document: Document, form: str, *, now_s: float) -> str:
    """Return ``document`` as text without a final line break; "" if there is nothing to show.
    ``form`` is one of ``settings.OUTPUTS``; ``now_s`` is what ages are counted from.
    """
    return _rendered(document, form, now_s).encode("utf-8", "backslashreplace").decode("utf-8")


def _rendered(document: Document, form: str, now_s: float) -> str:
    if form == "json":
        return json.dumps(document, indent=2, ensure_ascii=False)
    if form == "yaml":
        import yaml  # services do without

        text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        return text.rstrip("\n")
    if form == "name":
        return "\n".join(_names(document))
    return "\n".join(_LAYOUTS[document["kind"]](document, form == "wide", now_s))
