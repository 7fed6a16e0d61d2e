"""The program: reads the command line, runs a verb, turns what happened into an exit status.

Promises: this is the only module that makes exit statuses of errors; an error is told once, on
stderr, as a JSON or YAML object where such output was asked for; a reader that closed standard
output early is no error worth a message.
Does not: know what any verb does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click
from click import shell_completion

from agent import errors, settings
from agent.cli import (
    admit,
    completion,
    coordinator,
    delete,
    diff,
    doctor,
    dump,
    exits,
    export,
    failures,
    import_,
    migrate,
    node,
    operations,
    output,
    plan,
    prune,
    restore,
    show,
    verify,
    watch,
)
from agent.cli import (
    list as list_verb,
)
from agent.cli.invocation import Invocation, Verbs, flush_stdout
from agent.host import clock

_PROGRAM = "ckpt-agent"
_COMPLETE_VARIABLE = "_CKPT_AGENT_COMPLETE"

cli = Verbs(
    name=_PROGRAM,
    help="Checkpoint and restore running process trees. A job is never worse off for being"
    " checkpointed: a dump that fails leaves it running, and no process is ever shown a byte that"
    " was not verified.",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            help="Print the version.",
            callback=lambda ctx, param, value: _version(ctx) if value else None,
        )
    ],
)
for _verb in (
    dump,
    watch,
    restore,
    migrate,
    list_verb,
    show,
    diff,
    verify,
    export,
    import_,
    plan,
    prune,
    delete,
    operations,
    doctor,
    completion,
    admit,
    node,
    coordinator,
):
    cli.add_command(_verb.verb)


def _version(ctx: click.Context) -> None:
    from importlib import metadata  # services do without

    click.echo(f"{_PROGRAM} {metadata.version(_PROGRAM)}")
    ctx.exit()


def main() -> None:
    """The installed program, loaded."""
    execute(sys.argv[1:], Invocation())


def execute(arguments: Sequence[str], invocation: Invocation, name: str = _PROGRAM) -> NoReturn:
    """Run one command line and end the program with its exit status. A Ctrl-C that comes when the
    result is being told, or while the interpreter winds up, is too late to mean anything: it must
    not turn a success into an interruption or a death by signal.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if not invocation.answered:
            raise KeyboardInterrupt

    # Whoever started the program may have it ignored.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    status = run(arguments, invocation=invocation, name=name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


def run(
    arguments: Sequence[str], *, invocation: Invocation | None = None, name: str = _PROGRAM
) -> int:
    """Run one command line and return its exit status. ``name`` is what the program is called as,
    ``invocation`` what was said beforehand.
    """
    invocation = invocation or Invocation()
    instruction = os.environ.get(_COMPLETE_VARIABLE)
    if instruction:
        return shell_completion.shell_complete(
            cli, {"obj": invocation}, _PROGRAM, _COMPLETE_VARIABLE, instruction
        )
    try:
        status = _invoke(arguments, invocation, name)
        flush_stdout()
    except BrokenPipeError:
        _abandon_stdout()
        return exits.PIPE_CLOSED
    except errors.CkptError as exc:
        _tell(failures.error(exc), invocation)
        status = exc.exit_status
    except KeyboardInterrupt:
        _tell(failures.error(errors.Interrupted("interrupted")), invocation)
        status = exits.INTERRUPTED
    except Exception as exc:  # noqa: BLE001  a defect: told in one line, with its trace on request
        _tell(failures.defect(exc), invocation)
        status = exits.INTERNAL
    if status != exits.DONE:
        _abandon_stdout_if_stuck()
    return status


def _invoke(arguments: Sequence[str], invocation: Invocation, name: str) -> int:
    """Run the verb; what click itself raises becomes a status here."""
    try:
        with cli.make_context(name, [*arguments], obj=invocation) as ctx:
            result = cli.invoke(ctx)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return exits.USAGE
    except click.UsageError as exc:
        _note_output(arguments, invocation)
        command = exc.ctx.command_path if exc.ctx else name
        _tell(failures.usage_error(exc.format_message(), command), invocation)
        return exits.USAGE
    return result if isinstance(result, int) else exits.DONE


def _note_output(arguments: Sequence[str], invocation: Invocation) -> None:
    """Find the output format in a command line that could not be parsed."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        for candidate in (following if word in ("-o", "--output") else "", *_attached(word)):
            if candidate in settings.OUTPUTS:
                invocation.flags["output"] = candidate


def _attached(word: str) -> tuple[str, ...]:
    return word.removeprefix("-o"), word.removeprefix("--output=")


def _tell(document: output.Document, invocation: Invocation) -> None:
    form = invocation.form()
    if form not in ("json", "yaml"):
        form = "table"
    try:
        click.echo(output.render(document, form, now_s=clock.wall_s()), err=True)
        if invocation.verbose and sys.exc_info()[1] is not None:
            traceback.print_exc()
    except BrokenPipeError:
        _abandon_stdout()


def _abandon_stdout_if_stuck() -> None:
    """A full disk behind standard output was told already; the last flush must not fail on it."""
    try:
        flush_stdout()
    except OSError:
        _abandon_stdout()


def _abandon_stdout() -> None:
    """Let the interpreter's last flush go nowhere instead of failing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
