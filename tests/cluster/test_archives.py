"""Images as archives that other programs know: what agents give out is read by checkpointctl and
restored by containerd alone, and what a kubelet wrote is taken in and given out again.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli import exits
from tests.cluster.cluster import Cluster, Node
from tests.cluster.oci import write_blobs
from tests.cluster.test_cluster import pod
from tests.cluster.test_kubelet_engine import CHECKPOINTS, ckpt, count, dump

CHECKOUT = Path(__file__).resolve().parents[2]
CONTENT = "var/lib/containerd/io.containerd.content.v1.content/blobs"


@contextlib.contextmanager
def registry(node: Node) -> Iterator[int]:
    """A registry of the images that ``node`` has, on a port of its own loopback."""
    words = [sys.executable, "-m", "tests.fakes.registry", str(node.root / CONTENT)]
    with subprocess.Popen(
        ["nsenter", f"--net=/proc/{node.pid}/ns/net", "--", *words],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def blob(node: Node, digest: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (node.root / CONTENT / digest.replace(":", "/")).read_bytes()
    )
    return found


@pytest.fixture
def image(agents: Cluster, tmp_path: Path) -> Iterator[str]:
    """The image of the counter under another name, which a registry knows by its digest: containerd
    asks the registry for the image that a checkpoint is based on.
    """
    n2 = agents.node("n2")
    known = n2.exec("ctr", "-n", "k8s.io", "images", "ls", "name==localhost/np:1").stdout
    manifest = blob(n2, known.splitlines()[1].split()[2])
    config = blob(n2, manifest["config"]["digest"])
    config["config"]["Env"].append(f"TEST={tmp_path.name}")  # another image with the same layers
    layers = [(layer["digest"], layer["size"]) for layer in manifest["layers"]]
    with registry(n2) as port:
        name = f"localhost:{port}/counter:1"
        archive = tmp_path / "counter.tar"
        write_blobs(archive, name, config, layers, {})
        agents.import_image(archive)
        with tarfile.open(archive) as tar:
            index = tar.extractfile("index.json")
            assert index is not None
            (named,) = json.load(index)["manifests"]
        by_digest = f"localhost:{port}/counter@{named['digest']}"
        for node in agents.nodes.values():
            node.exec("ctr", "-n", "k8s.io", "images", "tag", name, by_digest)
        yield name
    for node in agents.nodes.values():
        ours = node.exec("ctr", "-n", "k8s.io", "images", "ls", "-q").stdout.split()
        ours = [each for each in ours if each.startswith(f"localhost:{port}/")]
        node.exec("ctr", "-n", "k8s.io", "images", "rm", *ours)


def done(cluster: Cluster, *arguments: str) -> dict[str, Any]:
    ran = ckpt(cluster, *arguments)
    assert ran.returncode == exits.DONE, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def members(raw: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return {each.name: file.read() for each in tar if (file := tar.extractfile(each))}


def seen_by_checkpointctl(cluster: Cluster, archive: Path) -> dict[str, Any]:
    program = cluster.bin / "checkpointctl"
    assert program.exists(), "run tests/cluster/build"
    words = [str(program), "inspect", "--all", "--format", "json", str(archive)]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    (found,) = json.loads(ran.stdout)
    return dict(found)


def test_checkpointctl_reads_what_the_agents_give_out_and_containerd_alone_restores_it(
    agents: Cluster, namespace: str, image: str, tmp_path: Path
) -> None:
    source = pod("counter", namespace, "n1")
    source["spec"]["containers"][0]["image"] = image
    agents.apply(source)
    agents.wait_for_pod("counter", namespace)
    agents.wait_for("the count", lambda: count(agents, "counter", namespace) > 20, 30)
    taken = dump(agents, "counter", namespace)["name"]
    counted = count(agents, "counter", namespace)

    archive = tmp_path / "counter-archive.tar"
    report = done(agents, "export", taken, str(archive), "-n", namespace)
    assert report["sizeBytes"] == archive.stat().st_size
    found = seen_by_checkpointctl(agents, archive)
    assert (found["container_name"], found["image"]) == ("c", image)
    # This it reads out of the process's memory.
    assert found["process_tree"]["cmdline"].split() == ["python3", "-u", "/opt/counter.py"]
    assert found["process_tree"]["environment_variables"]["HOSTNAME"] == "counter"

    oci = tmp_path / "counter.oci"
    name = f"{image.partition('/')[0]}/checkpoint:1"
    more = ("--format", "oci", "--reference", name)
    done(agents, "export", taken, str(oci), "-n", namespace, *more)
    n2 = agents.node("n2")
    n2.import_image(oci)
    again = pod("again", namespace, "n2")
    again["spec"]["containers"][0] |= {"image": name, "imagePullPolicy": "Never"}
    agents.apply(again)
    agents.wait_for_pod("again", namespace)
    # Its log begins anew, so all of it is what the restored process printed.
    agents.wait_for("it to count on", lambda: count(agents, "again", namespace) > counted, 30)
    numbers = [int(line) for line in agents.logs("again", namespace).split()]
    assert 20 < numbers[0] <= counted + 1
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    # What it had written into its root file system came with it.
    written = agents.kubectl("exec", "again", "-n", namespace, "--", "cat", "/var/tmp/count")
    assert [int(line) for line in written.split()[:-1]] == list(range(len(written.split()) - 1))


def test_what_a_kubelet_wrote_comes_in_and_goes_out_the_same(
    agents: Cluster, namespace: str, tmp_path: Path
) -> None:
    agents.apply(pod("counter", namespace, "n1"))
    agents.wait_for_pod("counter", namespace)
    called = f"/api/v1/nodes/n1/proxy/checkpoint/{namespace}/counter/c"
    paths: list[str] = []

    def checkpointed() -> bool:
        answer = json.loads(agents.kubectl("create", "--raw", called, "-f", "/dev/null"))
        paths.extend(answer["items"])
        return True

    # On a loaded machine runc sometimes gives up freezing a control group of version 1.
    agents.wait_for("the kubelet's checkpoint", checkpointed, 60)
    written = agents.node("n1").root / CHECKPOINTS / Path(paths[0]).name
    archive = tmp_path / "kubelet.tar"
    archive.write_bytes(written.read_bytes())
    written.unlink()

    taken = done(agents, "import", str(archive), "-n", namespace)["name"]
    assert taken.startswith("counter@")
    assert done(agents, "verify", taken, "-n", namespace)["good"]
    (member,) = done(agents, "show", taken, "-n", namespace)["detail"]
    assert [each["program"] for each in member["processes"]] == ["python3"]
    out = tmp_path / "out.tar"
    done(agents, "export", taken, str(out), "-n", namespace)
    before, after = members(archive.read_bytes()), members(out.read_bytes())
    assert set(before) - set(after) <= {"dump.log", "container.log"}
    differ = {each for each in after if after[each] != before[each]}
    # Page maps are written anew, and the layer was compressed.
    assert differ <= {"checkpoint/pagemap-1.img", "rootfs-diff.tar"}
    assert seen_by_checkpointctl(agents, out)["process_tree"]["command"] == "python3"
    second = done(agents, "import", str(out), "-n", namespace, "--name", "copy")["name"]
    third = tmp_path / "third.tar"
    done(agents, "export", second, str(third), "-n", namespace)
    assert members(third.read_bytes()) == after

    # An archive says itself what its processes may do: no agent gives them that.
    refused = ckpt(agents, "restore", taken, "-n", namespace, "--pod", "counter")
    assert refused.returncode == exits.REFUSED
    assert "was imported" in refused.stderr
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    assert ckpt(agents, "import", str(cut), "-n", namespace).returncode == exits.DATA
    nowhere = ckpt(agents, "export", taken, str(tmp_path / "absent/a"), "-n", namespace)
    assert nowhere.returncode == exits.REFUSED
