"""Arguments that several verbs take: process numbers, time spans, image names.

Promises: what does not parse is refused as wrong usage before anything is opened.
Does not: look up whether a process runs or an image exists.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from agent import errors, settings, wiring
from agent.cli.invocation import Invocation
from agent.model import ids, values

_JOBSETS = ("jobset", "jobsets")
_GROUPS = ("group",)
OF_A_CLUSTER = "is for a cluster (-n, --context, --kubeconfig), not for a store of this host"


def pid(value: str) -> int:
    """A process number; anything but a whole number from 1 is wrong usage."""
    if not (value.isascii() and value.isdigit() and 0 < int(value) < 1 << 31):
        raise click.BadParameter(f"{value!r} is not a process number, such as 4711")
    return int(value)


def span_s(value: str) -> float:
    """A time span such as 90s, 15m, 12h or 7d, in seconds."""
    try:
        return values.duration_s(value)
    except errors.InvalidInput as exc:
        raise click.BadParameter(f"{exc.message}: {exc.hint}") from exc


def complete_image(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of images for the shell; none if the store cannot be read, since completion has no
    place for an error.
    """
    try:
        merged, invocation = _settings(ctx)
        if invocation.in_cluster(merged):
            with wiring.cluster(merged) as session:
                images = session.any_agent(lambda agent: agent.images(session.namespace))
            names = [f"{image.group}@{image.epoch}" for image in images]
        else:
            found = wiring.store(merged).epochs()
            names = [ids.image_name(summary.group, summary.epoch) for summary in found]
    except errors.CkptError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_pod(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Pods of the namespace as ``pod/NAME``; none if the API server does not tell."""
    try:
        with wiring.cluster(_settings(ctx)[0]) as session:
            names = session.pod_names()
    except errors.CkptError:
        return []
    return [CompletionItem(f"pod/{n}") for n in names if f"pod/{n}".startswith(incomplete)]


def complete_node(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Nodes that an agent serves; none if the API server does not tell."""
    try:
        with wiring.cluster(_settings(ctx)[0]) as session:
            names = {agent.node for agent in session.agents()}
    except errors.CkptError:
        return []
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def _settings(ctx: click.Context) -> tuple[settings.Settings, Invocation]:
    """What holds for a command line that is still being written."""
    invocation = ctx.find_object(Invocation) or Invocation()
    return settings.load(invocation.flags, invocation.config, os.environ), invocation


def pod(value: str) -> str:
    """The name in ``pod/NAME``; anything else is wrong usage."""
    kind, _, name = value.partition("/")
    if kind not in ("pod", "pods", "po") or not name or "/" in name:
        raise click.BadParameter(f"{value!r} is not a pod, such as pod/trainer-0")
    return name


@dataclasses.dataclass(frozen=True)
class Target:
    """What a dump is of in a cluster: ``kind`` is pod, jobset or group."""

    kind: str
    name: str


def target(value: str) -> Target:
    """``pod/NAME`` or ``jobset/NAME``; anything else is wrong usage."""
    kind, _, name = value.partition("/")
    if kind in _JOBSETS and name and "/" not in name:
        return Target("jobset", name)
    return Target("pod", pod(value))


def dump_target(value: str) -> Target:
    """As ``target``, or ``group/NAME``."""
    kind, _, name = value.partition("/")
    if kind in _GROUPS and name and "/" not in name:
        return Target("group", name)
    return target(value)


def jobset_image(value: str) -> tuple[str, str] | None:
    """The name and the epoch ("" for the newest) in ``jobset/NAME[@EPOCH]``; None if it is
    something else.
    """
    return _image_of(value, _JOBSETS, "a JobSet's image, such as jobset/train")


def group_image(value: str) -> tuple[str, str] | None:
    """As ``jobset_image``, in ``group/NAME[@EPOCH]``."""
    return _image_of(value, _GROUPS, "a group's image, such as group/solver")


def _image_of(value: str, kinds: Sequence[str], what: str) -> tuple[str, str] | None:
    kind, slash, image = value.partition("/")
    if not slash or kind not in kinds:
        return None
    name, at, epoch = image.partition("@")
    if not name or "/" in image or (at and not epoch):
        raise click.BadParameter(f"{value!r} is not {what}")
    return name, epoch


def one_node(nodes: Sequence[str], flag: str) -> str | None:
    """The node of a verb that takes one."""
    if len(nodes) > 1:
        raise click.UsageError(f"a pod runs on one node: name one {flag}")
    return nodes[0] if nodes else None


def roots(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The option that names trees of this host."""
    return click.option(
        "--pid",
        "pids",
        type=pid,
        metavar="PID",
        multiple=True,
        help="Root of a process tree; repeat it to cut several trees at one moment.",
    )(verb)


def follow(where: str, when: str = "") -> Callable[..., Any]:
    """The option that takes in who is connected with the named trees, ``where`` he is."""
    return click.option(
        "--follow",
        is_flag=True,
        help=f"Cut everybody {where} who is connected with them, too{when}.",
    )


def pace(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how quickly memory is copied while the job runs."""
    cpu = click.option(
        "--precopy-cpu",
        metavar="PERCENT",
        help="Of the cores, or of one where none is idle, for copying memory while a job computes;"
        " 100: no limit [default: 10].",
    )
    rate = click.option(
        "--precopy-rate",
        metavar="SIZE",
        help="Read at most so much memory a second meanwhile [default: no limit].",
    )
    return cpu(rate(verb))


def containers(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The option that names containers of a pod."""
    return click.option(
        "-c",
        "--container",
        "containers",
        multiple=True,
        metavar="NAME",
        help="In a cluster: only this container of the pod; may be repeated.",
    )(verb)


def storage(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The option that names where images lie."""
    return click.option(
        "--storage",
        metavar="NAME",
        default="",
        help="In a cluster: only images in this one of its storages [default: all].",
    )(verb)


def engine(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The option that chooses how containers are captured."""
    return click.option(
        "--engine",
        type=click.Choice(["container", "kubelet"]),
        help="In a cluster: how to capture [default: the agent chooses].",
    )(verb)


def coordinator(what: str) -> Callable[..., Any]:
    """The option that has the cluster's coordinator do ``what``, instead of this program."""
    return click.option(
        "--coordinator/--no-coordinator",
        default=None,
        help=f"For {what}: ask the cluster's coordinator, and follow what it does.",
    )


def queue(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The option that waits for the turn, beside ``coordinator``."""
    return click.option(
        "--queue",
        is_flag=True,
        help="With --coordinator: if another operation is under way with the group, wait for its"
        " end instead of being refused.",
    )(verb)


def followed(kind: str, *, follow: bool) -> str:
    """What a target of ``kind`` ("" for this host) is with ``--follow``: "followed" for a pod with
    whoever is connected with it; wrong usage where that makes no sense.
    """
    if follow and kind not in ("", "pod"):
        raise click.UsageError("--follow begins with a pod, or with processes on this host")
    return "followed" if follow and kind else kind


def by_coordinator(
    merged: settings.Settings, kind: str, *, said: bool | None, queue: bool = False
) -> bool:
    """Whether the coordinator is asked about something of ``kind``, as ``followed`` says it."""
    of_a_group = kind in ("jobset", "group", "followed")
    refuse(
        {"--coordinator": said and not of_a_group, "--queue": queue and not of_a_group},
        "is for a JobSet or a group",
    )
    asked = of_a_group and merged.use_coordinator
    refuse({"--queue": queue and not asked}, "goes with --coordinator")
    return asked


def check_target(
    invocation: Invocation,
    pod: object,
    pids: Sequence[int],
    of_a_pod: Mapping[str, object],
    of_a_host: Mapping[str, object] | None = None,
) -> None:
    """Either a pod or process numbers, and only options that make sense for them."""
    if (pod is None) == (not pids):
        raise click.UsageError("say what: --pid PID on this host, or pod/NAME in a cluster")
    if pod is not None:
        refuse(of_a_host or {}, "is for processes on this host, not for a pod")
        return
    refuse(of_a_pod, "is for a pod, not for processes on this host")
    if invocation.names_cluster():
        raise click.UsageError("--pid is of this host, the other flags of a cluster: name pod/NAME")


def refuse(options: Mapping[str, object], why: str) -> None:
    """Wrong usage if one of ``options`` was given."""
    given = [name for name, value in options.items() if value]
    if given:
        raise click.UsageError(f"{given[0]} {why}")
