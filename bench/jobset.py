"""How long a JobSet stands still: ``python -m bench.jobset [--ranks N] [--rounds N]``.

On the running test cluster, with the agents of this checkout on it: ranks of a small training on
two nodes, that say the time of each step. In each round every rank's pod is dumped by itself, then
all of them as one JobSet.

Promises: prints the stop of the whole JobSet, what it adds to the slowest pod alone, how far apart
the first and the last pod stood still at most, the longest pause between two steps of the training
around a dump, and the same where nothing happened.
Does not: leave anything in the cluster but the agents. Freezing is seen from the coordinator, so
that skew is an upper bound.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from datetime import datetime
from typing import Any

from bench import machine
from bench.figures import Samples
from bench.oncluster import ckpt, delete_all
from tests.cluster.cluster import Cluster
from tests.cluster.test_jobset import jobset

_NAMESPACE = "bench-jobset"
_SELECTOR = ("-l", "jobset.sigs.k8s.io/jobset-name=train")
_WATCHED_S = 3.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cluster = Cluster()
    if not cluster.running():
        sys.exit("the test cluster does not run: scripts/cluster up && scripts/cluster deploy")
    about = machine.facts(".")
    print(f"{about['machine']}; {about['system']}; load before: {about['load before']}")
    cluster.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _NAMESPACE}}])
    try:
        for name, values in _measure(cluster, options.ranks, options.rounds).items():
            print(f"{name}: {Samples.of(values).told('ms', 1, 1e-3)}, {len(values)} values")
    finally:
        delete_all(cluster, _NAMESPACE)


def _measure(cluster: Cluster, ranks: int, rounds: int) -> dict[str, list[float]]:
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
        alone = [_ckpt(cluster, "dump", f"pod/{pod}")["stopSeconds"] for pod in pods]
        _together(cluster, pods[0], max(alone), found)
    return found


def _quiet(cluster: Cluster, pod: str, found: dict[str, list[float]]) -> None:
    since_s = time.time()
    time.sleep(_WATCHED_S)
    found.setdefault("longest pause between steps, nothing happens", []).append(
        _longest_s(cluster, pod, since_s)
    )


def _together(cluster: Cluster, pod: str, slowest_s: float, found: dict[str, list[float]]) -> None:
    since_s = time.time()
    report = _ckpt(cluster, "dump", "jobset/train")
    time.sleep(_WATCHED_S / 3)
    spans_s = report["stepSeconds"]
    measured = {
        "longest pause between steps, around a dump": _longest_s(cluster, pod, since_s),
        "stop of the JobSet": report["stopSeconds"],
        "slowest pod dumped alone, its stop": slowest_s,
        "what the JobSet adds to that": report["stopSeconds"] - slowest_s,
        "word to freeze to all frozen (skew at most)": spans_s["freezing"],
        "request to durable": report["durableSeconds"],
        **{f"step {name}": spans_s[name] for name in ("holding", "capturing", "releasing")},
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
