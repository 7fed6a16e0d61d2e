"""How long a JobSet stands still: ``python -m bench.jobset [--ranks N...] [--rounds N]``.

On the running test cluster, with the agents of this checkout on it: ranks of a small training on
two nodes, that say the time of each step. In each round the pods of two ranks are dumped by
themselves, the hub of the others among them, and then all of them as one JobSet.

Promises: prints, and with ``--report`` writes to ``bench/jobset.md`` and ``.json``, the stop of the
whole JobSet, what of it was waiting for others, how far apart at most the first and the last pod
came to stand still by their agents' clocks, the longest pause between two steps of the training
around a dump, and the same where nothing happened.
Does not: leave anything in the cluster but the agents.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.figures import Samples
from bench.oncluster import ckpt, delete_all
from tests.cluster.cluster import Cluster
from tests.cluster.test_jobset import jobset

_NAMESPACE = "bench-jobset"
_SELECTOR = ("-l", "jobset.sigs.k8s.io/jobset-name=train")
_WATCHED_S = 3.0
# Ranks are alike but for the first, which the others are connected with.
_ALONE_PODS = 2
_STEPS = ("freezing", "capturing", "releasing", "resuming")
_ALONE = "slowest pod dumped alone, its stop"
_PAUSE = "longest pause between steps, around a dump"
_STOP = "stop of the JobSet"
_BEYOND = "stop beyond that of the slowest pod alone"
_COORDINATION = "coordination on top of the slowest member's own work"
_SKEW = "skew between first and last member's freeze, at most"
_REQUIRED = {_SKEW: 0.05, _COORDINATION: 0.03, _BEYOND: 0.03, _PAUSE: 0.1}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cluster = Cluster()
    if not cluster.running():
        sys.exit("the test cluster does not run: scripts/cluster up && scripts/cluster deploy")
    about = machine.facts(".")
    print(f"{about['machine']}; {about['system']}; load before: {about['load before']}")
    sections = [_section(cluster, ranks, options.rounds) for ranks in options.ranks]
    if options.report:
        command = f"python -m bench.jobset {' '.join(sys.argv[1:])}"
        folder = Path(__file__).parent
        (folder / "jobset.md").write_text(report.markdown(sections, command, about))
        (folder / "jobset.json").write_text(report.document(sections, command, about) + "\n")


def _section(cluster: Cluster, ranks: int, rounds: int) -> report.Section:
    """Measure and print for so many ranks."""
    cluster.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _NAMESPACE}}])
    try:
        found = {name: Samples.of(values) for name, values in _measure(cluster, ranks, rounds)}
    finally:
        delete_all(cluster, _NAMESPACE)
    rows = [(name, _ms(values)) for name, values in found.items()]
    for name, told in rows:
        print(f"{name}: {told}, {rounds} values", flush=True)
    how = (
        "Ranks of tests/cluster/workloads/trainer.py, half of them on each of two nodes, which"
        " share this machine's cores. The stop is from when the first pod began to freeze until the"
        " last one ran, by the agents' clocks, at most; a step is from its word to the last answer,"
        " so steps are longer. A member's own work is what its agent was at work on in the steps"
        " of the stop; the rest of the stop is coordination."
    )
    return report.Section(
        name=f"jobset-{ranks}",
        title=f"A JobSet of {ranks} ranks",
        how=how,
        heads=("", "measured"),
        rows=list(rows),
        targets=_targets(ranks, found),
        slower=[
            f"{ranks} ranks: the stop is {_times(found[_STOP].over(found[_ALONE]))} that of a pod"
            " dumped alone"
        ],
        notes=[_shared(ranks, found[_ALONE])],
        data={name: values.document() for name, values in found.items()},
    )


def _targets(ranks: int, found: Mapping[str, Samples]) -> list[report.Target]:
    return [
        report.Target(
            f"{ranks} ranks: {name}",
            f"<= {limit_s * 1e3:.0f} ms",
            _ms(found[name]),
            found[name].median <= limit_s,
        )
        for name, limit_s in _REQUIRED.items()
    ]


def _times(ratio: Samples) -> str:
    return f"{ratio.told(digits=1)} times"


def _shared(ranks: int, alone: Samples) -> str:
    cores = os.cpu_count() or 1
    share_s = alone.median * max(1.0, ranks / cores)
    return (
        f"{ranks} captures share {cores} cores here: if each took what it takes alone, and one"
        f" core, that would be {share_s * 1e3:.0f} ms"
    )


def _ms(values: Samples) -> str:
    return values.told("ms", 1, 1e-3)


def _measure(cluster: Cluster, ranks: int, rounds: int) -> Iterable[tuple[str, list[float]]]:
    training = jobset(_NAMESPACE)
    (job,) = training["spec"]["replicatedJobs"]
    job["template"]["spec"] |= {"parallelism": ranks, "completions": ranks}
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    container["env"] = [each for each in container["env"] if each["name"] != "WORLD_SIZE"]
    container["env"].append({"name": "WORLD_SIZE", "value": str(ranks)})
    cluster.wait_for(
        "the default ServiceAccount",
        lambda: cluster.get("serviceaccount", "default", "-n", _NAMESPACE),
        30,
    )
    cluster.apply(training)
    cluster.wait_for("steps of all ranks", lambda: len(_pods(cluster)) == ranks, 120)
    pods = _pods(cluster)
    cluster.wait_for("ten steps", lambda: len(_steps(cluster, pods[0])) > 10, 120)
    _ckpt(cluster, "dump", "jobset/train")  # the first epoch writes everything
    for pod in pods:
        _ckpt(cluster, "dump", f"pod/{pod}")
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        _quiet(cluster, pods[0], found)
        alone = [_ckpt(cluster, "dump", f"pod/{pod}")["stopSeconds"] for pod in pods[:_ALONE_PODS]]
        found.setdefault(_ALONE, []).append(max(alone))
        _together(cluster, pods[0], found)
    return found.items()


def _quiet(cluster: Cluster, pod: str, found: dict[str, list[float]]) -> None:
    since_s = time.time()
    time.sleep(_WATCHED_S)
    found.setdefault("longest pause between steps, nothing happens", []).append(
        _longest_s(cluster, pod, since_s)
    )


def _together(cluster: Cluster, pod: str, found: dict[str, list[float]]) -> None:
    since_s = time.time()
    told = _ckpt(cluster, "dump", "jobset/train")
    time.sleep(_WATCHED_S / 3)
    spans_s, stop_s, slowest_s = told["stepSeconds"], told["stopSeconds"], told["slowestSeconds"]
    measured = {
        _PAUSE: _longest_s(cluster, pod, since_s),
        _STOP: stop_s,
        "slowest member's own work in it": slowest_s,
        _COORDINATION: stop_s - slowest_s,
        _BEYOND: stop_s - found[_ALONE][-1],
        _SKEW: told["skewSeconds"],
        "request to durable": told["durableSeconds"],
        **{f"step {name}": spans_s[name] for name in _STEPS},
    }
    for name, value in measured.items():
        found.setdefault(name, []).append(value)


def _pods(cluster: Cluster) -> list[str]:
    found = cluster.get("pods", "-n", _NAMESPACE, *_SELECTOR)["items"]
    return sorted(
        each["metadata"]["name"] for each in found if each["status"].get("phase") == "Running"
    )


def _steps(cluster: Cluster, pod: str) -> list[float]:
    """When each step was printed, by the container runtime's clock."""
    lines = cluster.logs(pod, _NAMESPACE, "-c", "trainer", "--timestamps").splitlines()
    # datetime knows microseconds, the runtime says nanoseconds.
    return [datetime.fromisoformat(line.split()[0][:26] + "+00:00").timestamp() for line in lines]


def _longest_s(cluster: Cluster, pod: str, since_s: float) -> float:
    steps = [at_s for at_s in _steps(cluster, pod) if at_s >= since_s]
    return max(after - before for before, after in itertools.pairwise(steps))


def _ckpt(cluster: Cluster, *arguments: str) -> dict[str, Any]:
    return ckpt(cluster, _NAMESPACE, *arguments)


if __name__ == "__main__":
    main()
