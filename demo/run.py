"""Dump a training three times, kill it, restore it: ``python -m demo.run --out DIRECTORY``.

Between the last dump and the kill a plain ``criu dump`` shows what that would cost the job.

Promises: the exit status is 0 only if the restored training ended with weights, losses and logs
bit-identical to an uninterrupted one; else the first difference is printed. Below ``--out`` it
leaves ``reference/`` and ``job/`` (logs, weights), ``store/`` (the images), ``loss.png`` and
``timeline.txt``; what an earlier run left under these names is removed first.
Does not: touch processes it did not start.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from demo import cli, compare, job, picture, plain, timeline

# Where in the training the dumps are asked for and the kill comes, as shares of all steps.
_DUMPS_AT = (0.2, 0.4, 0.6)
_KILL_AT = 0.72
# A kill comes at least so many steps after the last dump, so that something is lost.
_LOST_STEPS = 5
_DEADLINE_S = 300.0


class DemoFailed(Exception):
    """The demo did not show what it promises."""


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    out: str
    ranks: int
    steps: int
    hidden: int
    agent: str
    criu: str

    def training(self) -> list[str]:
        """The training program's arguments."""
        return [f"--ranks={self.ranks}", f"--steps={self.steps}", f"--hidden={self.hidden}"]


def _options(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__)
    parser.add_argument("--out", default="out/demo", help="directory for all results")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the hidden layers")
    parser.add_argument("--agent", default=cli.installed(), help="the ckpt-agent program")
    parser.add_argument("--criu", default=plain.installed(), help="CRIU, to compare with")
    return Options(**vars(parser.parse_args(arguments)))


def _say(text: str) -> None:
    print(text, flush=True)


def reference(options: Options) -> list[job.Point]:
    """The uninterrupted training."""
    directory = os.path.join(options.out, "reference")
    with (
        job.Job(directory, options.training()) as training,
        job.Watch(training.log, training.pid, time.monotonic()) as watch,
    ):
        training.wait(_DEADLINE_S)
    _say(f"uninterrupted: {watch.points[-1].at_s:.1f} s, {compare.last_words(directory)}")
    return watch.points


def interrupted(options: Options) -> tuple[timeline.Story, job.Watch]:
    """The training that is dumped, killed and restored."""
    directory = os.path.join(options.out, "job")
    agent = cli.Agent(options.agent, os.path.join(options.out, "store"))
    zero_s = time.monotonic()
    with (
        job.Job(directory, options.training()) as training,
        job.Watch(training.log, training.pid, zero_s) as watch,
    ):
        dumps = []
        for share in _DUMPS_AT:
            watch.wait_for(round(share * options.steps), _DEADLINE_S, training)
            dumps.append(_dump(agent, training, watch, zero_s))
            _say(f"dumped at step {dumps[-1].step}: {dumps[-1].dump.name}")
        beside = _plain(options.criu, training, watch, zero_s)
        kill_step = max(round(_KILL_AT * options.steps), watch.step() + _LOST_STEPS)
        watch.wait_for(kill_step, _DEADLINE_S, training)
        killed_s, killed_step = time.monotonic() - zero_s, watch.step()
        count = training.kill()
        _say(f"killed all {count} processes at step {killed_step}")
        image = dumps[-1].dump.name
        verify_took_s = agent.verify(image)
        restore_s = time.monotonic() - zero_s
        _restore(agent, image)
    if watch.rolled_back_at is None or watch.rolled_back_at >= len(watch.points):
        raise DemoFailed("the restored training wrote nothing to its log")
    first = watch.points[watch.rolled_back_at]
    return (
        timeline.Story(
            dumps=tuple(dumps),
            plain=beside,
            killed_s=killed_s,
            killed_step=killed_step,
            restore_s=restore_s,
            stepping_s=first.at_s,
            resumed_step=first.step,
            ended_s=watch.points[-1].at_s,
            verify_took_s=verify_took_s,
        ),
        watch,
    )


def _dump(agent: cli.Agent, training: job.Job, watch: job.Watch, zero_s: float) -> timeline.Dumped:
    step, at_s, before = watch.step(), time.monotonic() - zero_s, len(watch.points) - 1
    dump = agent.dump([training.pid], "demo")
    return timeline.Dumped(at_s, step, dump, _longest_gap_s(training, watch, before))


def _plain(criu: str, training: job.Job, watch: job.Watch, zero_s: float) -> timeline.Plain:
    step, at_s, before = watch.step(), time.monotonic() - zero_s, len(watch.points) - 1
    size_bytes = plain.dump(criu, training.pid)
    return timeline.Plain(at_s, step, size_bytes, _longest_gap_s(training, watch, before))


def _longest_gap_s(training: job.Job, watch: job.Watch, before: int) -> float:
    """The longest time between two steps since the one that is ``before`` in the log."""
    # The step under way when a dump returned belongs to it, too.
    watch.wait_for(watch.step() + 1, _DEADLINE_S, training)
    return max(b.at_s - a.at_s for a, b in itertools.pairwise(watch.points[before:]))


def _restore(agent: cli.Agent, image: str) -> None:
    """Restore in place and wait for the training's end. The logs have grown since the dump, so
    they are rolled back to it.
    """
    command = agent.command("restore", image, "--files", "rollback", "--wait")
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE_S
    )
    if ran.returncode:
        raise cli.AgentFailed(cli.told(command, ran.returncode, ran.stdout + ran.stderr))


def _clear(out: str) -> None:
    for name in ("reference", "job", "store"):
        shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    os.makedirs(out, exist_ok=True)


def demonstrate(options: Options) -> None:
    """Run all of it.

    Raises:
        DemoFailed | job.JobFailed | cli.AgentFailed | plain.PlainFailed: it did not show what it
            promises.
    """
    _clear(options.out)
    uninterrupted = reference(options)
    story, watch = interrupted(options)
    text = timeline.table(story)
    _say(f"\n{text}\n")
    with open(os.path.join(options.out, "timeline.txt"), "w") as file:
        file.write(text + "\n")
    found = compare.differences(
        os.path.join(options.out, "reference"), os.path.join(options.out, "job"), options.ranks
    )
    drawn = os.path.join(options.out, "loss.png")
    picture.draw(drawn, uninterrupted, watch.points, story, identical=not found)
    if found:
        raise DemoFailed("the restored training differs:\n  " + "\n  ".join(found))
    _say(
        f"bit-identical: {options.ranks} logs of {options.steps} steps and the final weights"
        f" equal those of the uninterrupted training\npicture: {drawn}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    try:
        demonstrate(_options(arguments))
    except (DemoFailed, job.JobFailed, cli.AgentFailed, plain.PlainFailed) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; its processes were ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
