"""``kubectl ckpt``: the same program as a plugin of kubectl, for which a cluster is always meant.

kubectl runs ``kubectl-ckpt`` for the verb, and ``kubectl_complete-ckpt`` for the words of a shell,
which answers a word a line and then a number that tells the shell what to make of them.

Promises: every verb and option is that of ``ckpt-agent``.
Does not: take kubectl's own flags from before ``ckpt``; kubectl does not hand them on.
"""

from __future__ import annotations

import sys

import click
from click import shell_completion

from agent.cli import main as program
from agent.cli.invocation import Invocation

_NAME = "kubectl ckpt"
# What kubectl's completion library calls "offer no files" and "nothing special".
_NO_FILES, _FILES = 4, 0


def main() -> None:
    """``kubectl-ckpt``, loaded."""
    program.execute(sys.argv[1:], _invocation(), _NAME)


def complete() -> None:
    """``kubectl_complete-ckpt``, loaded: the words so far, the last one unfinished."""
    *words, unfinished = sys.argv[1:] or [""]
    found = shell_completion.ShellComplete(
        program.cli, {"obj": _invocation()}, _NAME, ""
    ).get_completions(words, unfinished)
    for item in found:
        if item.type == "plain":
            click.echo(f"{item.value}\t{item.help}" if item.help else item.value)
    files = any(item.type != "plain" for item in found)
    click.echo(f":{_FILES if files else _NO_FILES}")


def _invocation() -> Invocation:
    made = Invocation()
    made.flags["use_cluster"] = "true"
    return made
