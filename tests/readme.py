"""The scheduler's client that README.md shows, word for word."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def client() -> str:
    """Its text: a program that takes a namespace, a JobSet and an idempotency key."""
    (found,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return str(found)
