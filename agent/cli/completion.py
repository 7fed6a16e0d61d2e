"""``ckpt-agent completion``: scripts that teach a shell the verbs, options and image names."""

from __future__ import annotations

import click
from click import shell_completion

from agent.cli import exits
from agent.cli.invocation import Verb

_SHELLS = ("bash", "zsh", "fish")


@click.command(
    "completion",
    cls=Verb,
    short_help="Print a completion script for a shell.",
    status=(exits.PIPE_CLOSED,),
    example="source <(ckpt-agent completion bash)",
)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def verb(ctx: click.Context, shell: str) -> None:
    """Print a script that teaches SHELL this program's verbs, options and image names."""
    program = ctx.find_root()
    kind = shell_completion.get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}", ctx)
    name = str(program.info_name)
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    maker = kind(program.command, {}, name, variable)
    # Of the class above: bash's own would start a bash to look at its version.
    click.echo(shell_completion.ShellComplete.source(maker))
