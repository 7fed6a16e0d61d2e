"""What the verbs share: the common options, how a verb looks in --help, where results go.

Promises: a common option means the same before and after the verb; data goes to stdout in one
piece, everything else to stderr; ``--quiet`` silences all but errors.
Does not: turn errors into exit statuses; main.py does.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from agent import errors, settings
from agent.cli import exits, output
from agent.host import clock
from agent.settings import Settings

# Flags that say that a cluster is meant, and which.
_OF_A_CLUSTER = ("namespace", "context", "kubeconfig")


class Invocation:
    """One run of the program: what was said on the command line, and the way out for results.

    ``answered``: the result is told or being told; whoever asks to stop now comes too late.
    """

    def __init__(self) -> None:
        self.flags: dict[str, object] = {}
        self.config: str | None = None
        self.quiet = False
        self.verbose = False
        self.answered = False
        self._settings: settings.Settings | None = None

    def settings(self, **verb_flags: object) -> settings.Settings:
        """The merged settings; ``verb_flags`` are settings that only this verb has a flag for.

        Raises:
            errors.Refused: a value, or the configuration file, does not make sense.
        """
        self._settings = settings.load(self.flags | verb_flags, self.config, os.environ)
        return self._settings

    def in_cluster(self, merged: Settings) -> bool:
        """Whether a cluster is meant: a flag that only makes sense for one was given, or the
        settings say so.
        """
        return merged.use_cluster or self.names_cluster()

    def names_cluster(self) -> bool:
        """Whether a flag that only makes sense for a cluster was given."""
        return any(self.flags.get(key) is not None for key in _OF_A_CLUSTER)

    def form(self) -> str:
        """The output format, as far as it is known yet: errors need it before settings load."""
        if self._settings:
            return self._settings.output
        said = str(self.flags.get("output") or os.environ.get("CKPT_AGENT_OUTPUT"))
        return said if said in settings.OUTPUTS else "table"

    def emit(self, document: output.Document) -> None:
        """Print a result on stdout."""
        text = output.render(document, self.form(), now_s=clock.wall_s())
        self.answered = True
        if not text:
            return
        try:
            click.echo(text)
            flush_stdout()
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise errors.EnvironmentUnfit(
                f"{document['kind']} {document['name']} is complete but cannot be written to"
                f" standard output: {exc.strerror}",
                hint="free space where standard output goes; what the verb did stays done",
                name=document["name"],
            ) from exc

    def say(self, message: str) -> None:
        """Tell a person something on stderr, unless ``--quiet``."""
        if not self.quiet:
            click.echo(message, err=True)


def flush_stdout() -> None:
    """Write out what is buffered; nothing where the caller closed standard output."""
    if not (sys.stdout is None or sys.stdout.closed):
        sys.stdout.flush()


pass_invocation = click.make_pass_decorator(Invocation)


def _note(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Store a common option; one that was not given leaves what the other place said."""
    invocation = ctx.find_object(Invocation)
    if invocation is None or value is None or value is False:
        return
    name = str(param.name)
    if name in ("config", "quiet", "verbose"):
        setattr(invocation, name, value)
    else:
        invocation.flags[name] = value


def _common_options() -> list[click.Option]:
    rows: list[tuple[list[str], dict[str, Any]]] = [
        (["--store"], {"metavar": "PATH|URL", "help": "The store [CKPT_AGENT_STORE]."}),
        (["--config"], {"metavar": "FILE", "help": "Configuration file [CKPT_AGENT_CONFIG]."}),
        (["--criu"], {"metavar": "FILE", "help": "The CRIU program [CKPT_AGENT_CRIU]."}),
        (["--work-dir"], {"metavar": "DIR", "help": "Scratch directory [CKPT_AGENT_WORK_DIR]."}),
        (
            ["-o", "--output"],
            {
                "type": click.Choice(settings.OUTPUTS),
                "help": "Output format [CKPT_AGENT_OUTPUT].",
            },
        ),
        (
            ["-n", "--namespace"],
            {"metavar": "NAMESPACE", "help": "In a cluster: of the pods and images."},
        ),
        (["--context"], {"metavar": "NAME", "help": "In a cluster: the kubeconfig's context."}),
        (["--kubeconfig"], {"metavar": "FILE", "help": "In a cluster: address and identity."}),
        (["--quiet"], {"is_flag": True, "help": "No progress and messages, only errors."}),
        (["--verbose"], {"is_flag": True, "help": "Show where an error came from."}),
    ]
    return [
        # Eager, so that errors about the other arguments already know the output format.
        click.Option(names, expose_value=False, callback=_note, is_eager=True, **more)
        for names, more in rows
    ]


class _CommonOptions(click.Command):
    """Adds the common options and shows them in a section of their own."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        # click's own --help stays last in the section of the verb's options.
        return [*own, *self._common]

    @property
    def _common(self) -> list[click.Option]:
        if not hasattr(self, "_common_made"):
            self._common_made = _common_options()
        return self._common_made

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        common = set(map(id, self._common))
        own = [
            param
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and id(param) not in common
        ]
        for title, params in (("Options", own), ("Common options", self._common)):
            records = [r for p in params if (r := p.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Verb(_CommonOptions):
    """A verb; ``status`` are the exit statuses it has beyond 0, 1 and 2."""

    def __init__(
        self, *args: Any, status: tuple[int, ...] = (), example: str = "", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.status = status
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit statuses and an example below the options."""
        codes = (exits.DONE, exits.INTERNAL, exits.USAGE, *self.status)
        with formatter.section("Exit status"):
            formatter.write_dl([(str(code), exits.MEANING[code]) for code in codes])
        with formatter.section("Example"):
            formatter.write_text(self.example)


class Verbs(_CommonOptions, click.Group):
    """The program itself: the verbs, in the order they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order they were added, not of the alphabet."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the verbs."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
