"""Somebody else's webhook for the tests: adds a container to each pod that it is asked about.

python -m tests.cluster.sidecar_webhook PORT CERTIFICATE KEY
"""

from __future__ import annotations

import base64
import json
import pathlib
import sys

from agent.admission.certificates import Pair
from agent.admission.server import Server

_SIDECAR = {
    "name": "barrier",
    "image": "localhost/np:1",
    "command": ["python3", "-c", "import time; time.sleep(1000)"],
}


def answer(body: bytes) -> bytes:
    """Allow, with the sidecar in front of the containers unless it is there."""
    review = json.loads(body)
    containers = review["request"]["object"]["spec"]["containers"]
    response = {"uid": review["request"]["uid"], "allowed": True}
    if all(container["name"] != _SIDECAR["name"] for container in containers):
        patch = [{"op": "add", "path": "/spec/containers/0", "value": _SIDECAR}]
        response |= {
            "patchType": "JSONPatch",
            "patch": base64.b64encode(json.dumps(patch).encode()).decode(),
        }
    review.pop("request")
    return json.dumps(review | {"response": response}).encode()


def main() -> None:
    """Serve until killed."""
    port, certificate, key = sys.argv[1:]
    server = Server(int(port), answer)
    server.present(Pair(pathlib.Path(certificate).read_bytes(), pathlib.Path(key).read_bytes()))
    server.serve_forever()


if __name__ == "__main__":
    main()
