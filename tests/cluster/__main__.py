"""``scripts/cluster``: the test cluster in a person's hands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cluster import agent_code, deployed
from tests.cluster.cluster import Cluster, ClusterError

USAGE = """usage: scripts/cluster COMMAND
  up                     build what is missing, start the cluster (does nothing if it runs)
  down                   end it and remove everything but what was built
  status                 is it up, and what runs on it
  kubectl ARGS...        kubectl as the administrator
  exec NODE CMD...       a command on node n1 or n2
  shell [NODE]           a shell on a node, or without NODE one of this machine that sees the
                         cluster's network, with kubectl and KUBECONFIG set
  image ARCHIVE...       load OCI or Docker archives into both nodes
  deploy                 the project on it as users have it, from this checkout: image, deploy/
  agent [CONTEXT]        build the agent's image from the Dockerfile and load it into both nodes
  agent-code             only this checkout's Python code into that image: seconds, to try things
  logs MACHINE SERVICE   the end of a component's log: control-plane, n1 or n2
"""
HERE = Path(__file__).resolve().parent


def _become(cluster: Cluster, argv: list[str]) -> None:
    """Replaces this program by ``argv``, so that terminals, signals and status are its own."""
    os.environ["KUBECONFIG"] = str(cluster.kubeconfig)
    os.environ["PATH"] = f"{cluster.bin}:{os.environ['PATH']}"
    os.execvp(argv[0], argv)


def _status(cluster: Cluster) -> int:
    if not cluster.running():
        print("the cluster is down")
        return 1
    print(f"the cluster is up: {cluster.state}, KUBECONFIG {cluster.kubeconfig}")
    print(cluster.kubectl("get", "nodes", "-o", "wide"))
    print(cluster.kubectl("get", "pods", "--all-namespaces", "-o", "wide"))
    return 0


def main(arguments: list[str]) -> int:
    """Runs one command; the status to exit with."""
    cluster = Cluster()
    match arguments:
        case ["up"]:
            if not cluster.running():
                subprocess.run([HERE / "build"], check=True)
            cluster.up()
            return _status(cluster)
        case ["down"]:
            cluster.down()
        case ["status"]:
            return _status(cluster)
        case ["kubectl", *words]:
            _become(cluster, cluster.in_control_plane([cluster.bin / "kubectl", *words]))
        case ["exec", node, *words] if words and node in cluster.nodes:
            _become(cluster, cluster.node(node).inside(words))
        case ["shell"]:
            _become(cluster, cluster.in_control_plane([os.environ.get("SHELL", "bash")]))
        case ["shell", node] if node in cluster.nodes:
            _become(cluster, cluster.node(node).inside(["bash"]))
        case ["image", *archives] if archives:
            for archive in archives:
                cluster.import_image(Path(archive))
        case ["deploy"]:
            deployed.deploy(cluster)
        case ["agent", *context]:
            deployed.forget(cluster)
            subprocess.run([HERE / "agent_image", *context], check=True)
        case ["agent-code"]:
            deployed.forget(cluster)
            agent_code.load(cluster)
        case ["logs", machine, service]:
            machines = {"control-plane": cluster.control_plane, **cluster.nodes}
            print(machines[machine].tail(service, 200))
        case _:
            print(USAGE, end="", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        sys.exit(7)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
