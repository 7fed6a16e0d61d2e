"""A JobSet that is killed again and again: ``python -m bench.jobset_torture [--cycles N]
[--minutes M] [--seed N]``.

On the running test cluster, with the agents of this checkout on it: two ranks on two nodes send
each other numbered messages of random lengths, with checksums, as fast as the other takes them. In
each cycle the JobSet is dumped at a random moment, all of its pods are killed at another one, and
it is restored on exchanged nodes. A rank that gets a message twice, out of order, damaged or not at
all says so and ends.

Promises: prints each cycle, and at the end how many there were and how long they took; ends with
status 1 at the first that fails.
Does not: leave anything in the cluster but the agents.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

from bench import machine
from bench.figures import Samples
from bench.oncluster import ckpt, delete_all
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster
from tests.cluster.test_jobset import jobset

_NAMESPACE = "bench-torture"
_DONE_S = 40.0

# A line ten times a second says how many messages came; "broken" what is wrong with one.
PROGRAM = """
import os, random, socket, struct, sys, threading, time, zlib
rank, address = int(os.environ['JOB_COMPLETION_INDEX']), os.environ['MASTER_ADDR']
head = struct.Struct('<QII')
def meet():
    if rank == 0:
        return socket.create_server(('', 29500)).accept()[0]
    while True:
        try:
            return socket.create_connection((address, 29500))
        except OSError:
            time.sleep(0.1)
peer = meet()
def payload(number, who):
    draw = random.Random(number * 2 + who)
    return draw.randbytes(draw.randrange(1, 20000))
def send():
    number = 0
    while True:
        body = payload(number, rank)
        peer.sendall(head.pack(number, len(body), zlib.crc32(body)) + body)
        number += 1
def broken(what):
    print('broken', what, flush=True)
    os._exit(3)
def take(size):
    data = bytearray()
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            broken('the peer is gone')
        data += part
    return bytes(data)
threading.Thread(target=send, daemon=True).start()
got, said = 0, 0.0
while True:
    try:
        number, size, check = head.unpack(take(head.size))
        body = take(size)
    except OSError as exc:
        broken(exc)
    if number != got:
        broken('message %d in place of %d' % (number, got))
    if zlib.crc32(body) != check or body != payload(number, 1 - rank):
        broken('message %d is damaged' % number)
    got += 1
    if time.monotonic() - said > 0.1:
        said = time.monotonic()
        print('got', got, flush=True)
"""


class Torture:
    """The JobSet, and what became of it."""

    def __init__(self, cluster: Cluster, draw: random.Random) -> None:
        self._cluster, self._draw = cluster, draw
        self.times: dict[str, list[float]] = {}

    def start(self) -> None:
        """Both ranks hear each other."""
        document = jobset(_NAMESPACE)
        (job,) = document["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        container["command"] = ["python3", "-c", PROGRAM]
        # Killed pods make JobSet start over, as for a user; a restore takes what it made.
        document["spec"]["failurePolicy"] = {"maxRestarts": 10_000}
        self._cluster.apply(document)
        self._cluster.wait_for("messages", lambda: self._got(3), 120)

    def cycle(self) -> str:
        """Dump, kill, restore elsewhere; what happened."""
        draw, began_s = self._draw, time.monotonic()
        time.sleep(draw.uniform(0, 0.5))
        taken = self._ckpt("dump", "jobset/train")
        lived_s = draw.uniform(0, 1.5)
        time.sleep(lived_s)
        pods = self._pods()
        nodes = [pods[rank]["spec"]["nodeName"] for rank in ("0", "1")]
        heard = {rank: self._last(each) for rank, each in pods.items()}
        names = [each["metadata"]["name"] for each in pods.values()]
        self._cluster.kubectl(
            "delete", "pods", "-n", _NAMESPACE, "--grace-period=0", "--force", *names
        )
        back = ("restore", "jobset/train", "--replace", "--node", nodes[1], "--node", nodes[0])
        asked_s = time.monotonic()
        done = self._ckpt(*back)
        if done["name"] != taken["name"] or done["passedOver"]:
            raise RuntimeError(f"restored {done['name']} instead of {taken['name']}")
        for each in done["pods"]:
            if each["was"]["node"] == each["now"]["node"] or each["lost"]:
                raise RuntimeError(f"a pod was not moved as asked: {each}")
        self._cluster.wait_for("messages", lambda: self._got(5), _DONE_S)
        for name, value in {
            "dump: stop": taken["stopSeconds"],
            "dump: request to durable": taken["durableSeconds"],
            "restore: command to messages again": time.monotonic() - asked_s,
            "cycle": time.monotonic() - began_s,
        }.items():
            self.times.setdefault(name, []).append(value)
        return f"killed {lived_s:.2f} s after the dump, after {heard} messages"

    def _ckpt(self, *words: str) -> dict[str, Any]:
        return ckpt(self._cluster, _NAMESPACE, *words)

    def _pods(self) -> dict[str, dict[str, Any]]:
        found = self._cluster.get("pods", "-n", _NAMESPACE)["items"]
        return {
            each["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: each
            for each in found
            if each["status"].get("phase") == "Running"
            and not each["metadata"].get("deletionTimestamp")
        }

    def _lines(self, pod: dict[str, Any]) -> list[str]:
        text = self._cluster.logs(pod["metadata"]["name"], _NAMESPACE, "-c", "trainer")
        lines = text.splitlines()
        wrong = [line for line in lines if not line.startswith("got ")]
        if wrong:
            raise RuntimeError(f"{pod['metadata']['name']}: {wrong[0]}")
        counts = [int(line.split()[1]) for line in lines]
        if counts != sorted(counts):
            raise RuntimeError(f"{pod['metadata']['name']} counted backwards: {counts}")
        return lines

    def _last(self, pod: dict[str, Any]) -> int:
        lines = self._lines(pod)
        return int(lines[-1].split()[1]) if lines else 0

    def _got(self, lines: int) -> bool:
        """Whether both ranks said so many lines."""
        pods = self._pods()
        return len(pods) == 2 and all(len(self._lines(each)) >= lines for each in pods.values())


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no cycle after these")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    cluster = Cluster()
    if not cluster.running():
        sys.exit("the test cluster does not run: scripts/cluster up && scripts/cluster deploy")
    about = machine.facts(".")
    print(f"{about['machine']}; {about['system']}; load before: {about['load before']}")
    cluster.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _NAMESPACE}}])
    account = ("serviceaccount", "default", "-n", _NAMESPACE)
    cluster.wait_for("the default ServiceAccount", lambda: cluster.get(*account), 30)
    before, until_s = leftovers.of_all(cluster), time.monotonic() + options.minutes * 60
    torture, done = Torture(cluster, random.Random(options.seed)), 0
    try:
        torture.start()
        while done < options.cycles and time.monotonic() < until_s:
            print(f"cycle {done + 1}: {torture.cycle()}", flush=True)
            done += 1
    finally:
        print(
            f"{done} whole cycles, seed {options.seed}: nothing lost, repeated, reordered, damaged"
        )
        for name, values in torture.times.items():
            print(f"{name}: {Samples.of(values).told('s')}, {len(values)} values")
        delete_all(cluster, _NAMESPACE)
    leftovers.assert_none(cluster, before)


if __name__ == "__main__":
    main()
