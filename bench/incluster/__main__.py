"""Measure on the running test cluster: ``python -m bench.incluster [--pairs N] [--memory-mib N]``.

With ``--only SECTION`` a run renews these sections of the report and leaves the others.

Promises: the report tells the command that made it; a missed target is in the report, not an error.
Does not: leave anything in the cluster but the agents.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench import figures, machine, oncluster, report
from bench.figures import Samples
from bench.incluster import pause, workload
from tests.cluster import deployed
from tests.cluster.cluster import Cluster

_NAMESPACE = "bench"
_POD = "clock"
_IDLE_PODS = 50
_IDLE_S = 60.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SECTIONS = ("dump", "pause", "move", "idle")


class _Bench:
    def __init__(self, cluster: Cluster, pairs: int, memory_mib: int) -> None:
        self.cluster = cluster
        self.pairs = pairs
        self.memory_mib = memory_mib
        self._started = False

    def section(self, name: str) -> report.Section:
        """Measure one."""
        if name == "idle":
            return self.idle()
        if name == "pause":
            return pause.measure(self.cluster, _NAMESPACE, self.pairs, self.memory_mib)
        if not self._started:
            body = workload.pod(_POD, "n1", self.memory_mib)
            workload.start(self.cluster, _NAMESPACE, body)
            self._started = True
        return self.dumps() if name == "dump" else self.moves()

    def ckpt(self, *arguments: str) -> dict[str, Any]:
        """Run the program as a person does."""
        return oncluster.ckpt(self.cluster, _NAMESPACE, *arguments)

    def kubelet_call(self) -> float:
        """The kubelet's checkpoint alone; seconds. Its archive is removed."""
        return oncluster.kubelet_checkpoint(self.cluster, "n1", f"{_NAMESPACE}/{_POD}/main")

    def stopped(self, engine: str) -> tuple[float, dict[str, Any]]:
        """One dump: the longest stop that the job saw, and the report."""
        since_s = time.time()
        document = self.ckpt("dump", f"pod/{_POD}", "--engine", engine)
        return workload.longest_s(self.cluster, _NAMESPACE, _POD, since_s), document

    def dumps(self) -> report.Section:
        """Both engines and the bare kubelet, in turns, on one pod."""
        first_s, _ = self.stopped("container")  # the first epoch writes everything
        self.stopped("kubelet")
        calls, durable, by_kubelet, by_container, reported = [], [], [], [], []
        for _ in range(self.pairs):
            calls.append(self.kubelet_call())
            stop_s, document = self.stopped("kubelet")
            by_kubelet.append(stop_s)
            durable.append(document["durableSeconds"])
            stop_s, document = self.stopped("container")
            by_container.append(stop_s)
            reported.append(document["stopSeconds"])
        size_bytes = document["rawBytes"]
        call, whole = Samples.of(calls), Samples.of(durable)
        ingest_s = size_bytes / 200e6
        allowed = Samples.of(1.3 * value + ingest_s for value in calls)
        kubelet, container = Samples.of(by_kubelet), Samples.of(by_container)
        share = container.over(kubelet)
        over = whole.over(allowed)
        return report.Section(
            "dump",
            f"Dumping a container of {self.memory_mib} MiB",
            "One pod under hold, which watches its own clock and writes to nothing; the bare"
            " kubelet call, a dump by the kubelet engine and one by the container engine in turns.",
            ("what", "seconds"),
            [
                ("kubelet call alone", call.told("s")),
                ("kubelet engine, request to durable and archive gone", whole.told("s")),
                ("kubelet engine, the job's longest stop", kubelet.told("s", 3)),
                ("container engine, the job's longest stop", container.told("s", 3)),
                ("container engine, the stop it reports", Samples.of(reported).told("s", 3)),
                ("container engine, first epoch, the job's longest stop", f"{first_s:.3f} s"),
            ],
            [
                report.Target(
                    "kubelet engine: durable / (1.3 x the call + 200 MB/s)",
                    "<= 1",
                    over.told(),
                    over.median <= 1,
                ),
                report.Target(
                    "container engine's stop / kubelet engine's",
                    "<= 0.2",
                    share.told("", 3),
                    share.median <= 0.2,
                ),
            ],
            data={
                "first_stop_s": first_s,
                "call_s": call.document(),
                "durable_s": whole.document(),
                "kubelet_stop_s": kubelet.document(),
                "container_stop_s": container.document(),
            },
        )

    def moves(self) -> report.Section:
        """The pod to the other node and back, and how long each step takes."""
        steps: dict[str, list[float]] = {}
        running, away = [], []
        target = "n2"
        for _ in range(self.pairs):
            document = self.ckpt("migrate", f"pod/{_POD}", "--to", target)
            target = "n1" if target == "n2" else "n2"
            running.append(document["runningSeconds"])
            away.append(document["awaySeconds"])
            for name, span_s in document["stepSeconds"].items():
                steps.setdefault(name, []).append(span_s)
        size_bytes = self.memory_mib << 20
        median_s = statistics.median(running)
        return report.Section(
            "move",
            f"Moving a pod of {self.memory_mib} MiB",
            "ckpt-agent migrate, to the other node and back; the store is a directory on one disk.",
            ("step", "seconds"),
            [
                *((name, Samples.of(each).told("s")) for name, each in steps.items()),
                ("restore, request to running", Samples.of(running).told("s")),
                ("the pod was away", Samples.of(away).told("s")),
            ],
            [
                report.Target(
                    "restore: request (pod created) to process running",
                    "<= 3 s + reading the image (at 400 MB/s)",
                    Samples.of(running).told("s"),
                    median_s <= 3 + size_bytes / 400e6,
                )
            ],
            data={"running_s": running, "away_s": away, "steps": steps},
        )

    def idle(self) -> report.Section:
        """An agent's memory and processor time with many pods on its node."""
        body = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "many"},
            "spec": {
                "replicas": _IDLE_PODS,
                "selector": {"matchLabels": {"app": "many"}},
                "template": {
                    "metadata": {"labels": {"app": "many"}},
                    "spec": {
                        "nodeName": "n1",
                        "terminationGracePeriodSeconds": 0,
                        "automountServiceAccountToken": False,
                        "containers": [{"name": "c", "image": "localhost/pause:1"}],
                    },
                },
            },
        }
        text = json.dumps(body)
        self.cluster.kubectl("create", "-n", _NAMESPACE, "-f", "-", stdin=text)
        self.cluster.wait_for_deployment("many", _NAMESPACE, 300)
        time.sleep(10)
        pid = self._agent_pid("n1")
        before = _cpu_s(pid)
        time.sleep(_IDLE_S)
        share = (_cpu_s(pid) - before) / _IDLE_S
        resident = _resident_bytes(pid)
        return report.Section(
            "idle",
            f"An idle agent, {_IDLE_PODS} pods on its node",
            f"The agent's process over {_IDLE_S:.0f} s, probes included.",
            ("what", "measured"),
            [("resident", figures.mib(resident)), ("of one core", f"{share:.2%}")],
            [
                report.Target(
                    "resident memory", "<= 100 MiB", figures.mib(resident), resident <= 100 << 20
                ),
                report.Target("processor", "<= 1 % of a core", f"{share:.2%}", share <= 0.01),
            ],
            data={"resident_bytes": resident, "core_share": share},
        )

    def _agent_pid(self, node: str) -> int:
        """The agent's process, by the number that this machine knows it by."""
        found = self.cluster.get(
            *("pods", "-n", deployed.NAMESPACE, "-l", "app.kubernetes.io/name=ckpt-agent-node"),
            *("--field-selector", f"spec.nodeName={node}"),
        )
        uid = found["items"][0]["metadata"]["uid"]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"node" in words and uid in (entry / "cgroup").read_text():
                        return int(entry.name)
                except OSError:
                    continue
        raise LookupError(f"no agent process on {node}")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS_PER_S


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


def main(arguments: list[str]) -> int:
    """Measure all and write ``bench/incluster/report.md`` and ``report.json``."""
    parser = argparse.ArgumentParser(prog="python -m bench.incluster", description=__doc__)
    parser.add_argument("--only", action="append", choices=_SECTIONS, help="repeatable")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--out", default="bench/incluster", help="folder of the report")
    options = parser.parse_args(arguments)
    cluster = Cluster()
    if not cluster.running():
        sys.stderr.write("no cluster runs: scripts/cluster up\n")
        return 1
    deployed.deploy(cluster)
    out = Path(options.out)
    sections = report.known(out / "report.json")
    command = shlex.join(["python", "-m", "bench.incluster", *arguments])
    facts = machine.facts(str(cluster.state))
    load = facts.pop("load before")
    machine.warm(3 * options.memory_mib << 20)
    cluster.kubectl("create", "namespace", _NAMESPACE)
    try:
        cluster.wait_for(
            "the ServiceAccount",
            lambda: cluster.get("serviceaccount", "default", "-n", _NAMESPACE),
            30,
        )
        bench = _Bench(cluster, options.pairs, options.memory_mib)
        for name in options.only or _SECTIONS:
            sections[name] = bench.section(name)
            sections[name].notes.append(f"`{command}`, load before {load}")
    finally:
        oncluster.delete_all(cluster, _NAMESPACE)
    chosen = [sections[name] for name in _SECTIONS if name in sections]
    command = "python -m bench.incluster"
    (out / "report.md").write_text(report.markdown(chosen, command, facts))
    (out / "report.json").write_text(report.document(chosen, command, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
