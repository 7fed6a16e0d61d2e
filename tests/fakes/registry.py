"""A registry that has what a container runtime of this machine has: the reading half of the OCI
distribution API over a content store of containerd's.

``python -m tests.fakes.registry BLOBS`` serves that directory on a port of loopback, and prints it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_PATH = re.compile(r"/v2/[a-z0-9/_-]+/(manifests|blobs)/sha256:([0-9a-f]{64})(\?.*)?")


def serve(blobs: Path) -> None:
    """Serve the content store whose blobs are in ``blobs`` until the program is ended."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            found = _PATH.fullmatch(self.path)
            path = blobs / "sha256" / found[2] if found else None
            if found is None or path is None or not path.exists():
                self.send_response(200 if self.path == "/v2/" else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            kind = "application/octet-stream"
            if found[1] == "manifests":
                kind = json.loads(path.read_bytes())["mediaType"]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.send_header("Docker-Content-Digest", f"sha256:{found[2]}")
            self.end_headers()
            if body:
                with open(path, "rb") as content:
                    shutil.copyfileobj(content, self.wfile)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
