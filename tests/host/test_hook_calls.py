"""What hooks do in real containers: requests, and the agent's own actions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from agent import errors
from agent.host import proc
from agent.model import hooks
from agent.model.pods import Placement
from agent.node import hookcalls
from tests.host.boxes import Boxes
from tests.host.nodes import wait_for
from tests.host.test_hooks import Job, Jobs, jobs

__all__ = ["jobs"]

# Answers each request with the status in its path, and says so; "slow" trickles for ever.
SERVER = """
import http.server, os, socket, socketserver, sys, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        open('/disk/asked', 'ab').write(self.path.encode() + b' ' + body + b'\\n')
        if self.path == '/slow':
            while True:
                self.wfile.write(b'H')
                time.sleep(0.05)
        if self.path == '/hangup':
            return
        if self.path == '/garbage':
            self.send_response(200)
            self.end_headers()
            self.wfile.write(os.urandom(300000))
            return
        self.send_response(int(self.path[1:]))
        self.send_header('Location', '/200')
        self.end_headers()
        self.wfile.write(b'because')
    def log_message(self, *args): pass
class Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    def get_request(self):
        made, _ = super().get_request()
        peer = made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        open('/disk/peers', 'a').write('%d\\n' % int.from_bytes(peer[4:8], 'little'))
        return made, ('unix', 0)
servers = [
    http.server.ThreadingHTTPServer(('127.0.0.1', 8000), Handler),
    Unix('/disk/socket', Handler),
]
os.chmod('/disk/socket', int(sys.argv[1], 8))
for each in servers:
    threading.Thread(target=each.serve_forever, daemon=True).start()
n = 0
while True:
    time.sleep(0.02)
    n += 1
    print(n, flush=True)
"""
BY: dict[str, dict[str, Any]] = {"http": {"port": 8000}, "unix": {"socket": "/disk/socket"}}


def asking(name: str, by: str, path: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, by: BY[by] | {"path": path}, **fields}


def serving(
    jobs: Jobs, name: str, wanted: dict[str, Any], mode: str = "600", **options: Any
) -> Job:
    job = jobs.start(name, wanted, "python3", "-c", SERVER, mode, **options)
    wait_for(lambda: job.box.log.read_text())
    subprocess.run(["nsenter", "-t", str(job.box.pid), "-n", "ip", "link", "set", "lo", "up"])
    return job


@pytest.mark.parametrize("by", ["http", "unix"])
def test_requests_tell_the_workload_what_happens_and_it_is_dumped_right_after(
    jobs: Jobs, by: str
) -> None:
    job = serving(
        jobs,
        "job",
        {
            "pre": [asking("ask", by, "/200"), asking("odd", by, "/garbage")],
            "post": [asking("go", by, "/204")],
        },
    )
    outcome = job.dump()
    assert outcome.hook_problems == ()
    asked = [line.split(" ", 1) for line in job.box.root("/disk/asked").read_text().splitlines()]
    assert [path for path, _ in asked] == ["/200", "/garbage", "/204"]
    said = [json.loads(body) for _, body in asked]
    assert [(each["phase"], each["outcome"]) for each in said] == [
        ("pre", ""),
        ("pre", ""),
        ("post", "captured"),
    ]
    assert said[0]["now"] == {"pod": "job", "podUid": job.uid, "node": "n1", "addresses": []}
    job.goes_on()


@pytest.mark.parametrize("by", ["http", "unix"])
@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/500", "answered with 500"),
        ("/302", "answered with 302"),
        ("/hangup", "does not answer as an HTTP server does"),
        ("/slow", "did not end within"),
    ],
)
def test_requests_that_fail_give_the_epoch_up(jobs: Jobs, by: str, path: str, word: str) -> None:
    # Long enough for the server to have heard of it.
    short = {"deadlineSeconds": 5.5} if path == "/slow" else {}
    hook = asking("ask", by, path, **short)
    job = serving(jobs, "job", {"pre": [hook], "post": [asking("go", by, "/200")]})
    with pytest.raises(errors.HookFailed, match=word) as failed:
        job.dump()
    if path == "/500":
        assert failed.value.facts["output"] == "because"
    assert '"outcome": "aborted"' in job.box.root("/disk/asked").read_text().splitlines()[-1]
    job.goes_on()


def test_a_request_where_nobody_listens_fails_at_once_and_reaches_nothing_of_the_node(
    jobs: Jobs,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as here:
        port = here.getsockname()[1]
        away = {"name": "away", "http": {"port": port}, "onFailure": "ignore"}
        missing = {"name": "missing", "unix": {"socket": "/disk/none"}, "onFailure": "ignore"}
        out = {"name": "out", "unix": {"socket": "/disk/out"}, "onFailure": "ignore"}
        file = {"name": "file", "unix": {"socket": "/etc/passwd"}, "onFailure": "ignore"}
        job = jobs.start("job", {"pre": [[away, missing, out, file]]})
        listener = socket.socket(socket.AF_UNIX)
        outside = jobs.boxes.folder / "node-socket"
        listener.bind(str(outside))
        listener.listen()
        job.box.root("/disk/out").symlink_to(outside)
        outcome = job.dump()
        listener.close()
    said = "\n".join(outcome.hook_problems)
    for word in (
        f"port {port}",
        "/disk/none",
        "/disk/out",
        "'file' failed: /etc/passwd is no socket",
    ):
        assert word in said
    job.goes_on()


@pytest.mark.parametrize("user", [0, 1234])
def test_a_socket_is_asked_with_the_rights_of_the_containers_own_user(
    boxes: Boxes, user: int
) -> None:
    box = boxes.start("box", "python3", "-c", SERVER, "600", user=user)
    wait_for(lambda: box.log.read_text())
    calls = hookcalls.Calls(cast("hookcalls.Executes", None))
    hook = hooks.Hook("ask", hooks.Unix("/disk/socket", "/200"))
    told = hooks.Told("ask", hooks.Phase.PRE, "default", Placement("p", "u", "n", ()))
    calls.call(hook, [box.container], told)
    assert box.root("/disk/peers").read_text() == f"{user}\n"
    # Somebody else's socket, such as one of the node that the pod mounts: root without capabilities
    # may not open it either.
    os.chown(box.root("/disk/socket"), 4321, 4321)
    with pytest.raises(errors.HookFailed, match="Permission denied"):
        calls.call(hook, [box.container], told)
    assert os.geteuid() == 0
    assert proc.rights(threading.get_native_id()) == proc.rights(os.getpid())
    assert os.stat("/proc/self/mem").st_uid == 0


def test_the_agents_own_actions_reach_the_containers_files_and_no_others(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr("os.fsync", fsync)
    drop = {"name": "drop", "action": "drop-caches", "path": "/disk/data"}
    # After the stop, in which the dump reads what it stores.
    job = jobs.start(
        "job", {"pre": [{"name": "all", "action": "sync"}], "post": [drop | {"when": "decided"}]}
    )
    folder = job.box.root("/disk/data")
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "big").write_bytes(bytes(1 << 22))
    (folder / "away").symlink_to("/etc")
    os.mkfifo(folder / "fifo")
    assert cached(folder / "inner" / "big") > 0
    job.dump()
    assert synced.count("big") == 2
    assert "passwd" not in synced
    assert cached(folder / "inner" / "big") == 0
    job.goes_on()


@pytest.mark.parametrize(
    ("path", "word"),
    [("/nowhere", "no /nowhere"), ("/proc/version", "holds no data"), ("/dev/null", "neither")],
)
def test_an_action_on_what_is_no_data_is_refused(jobs: Jobs, path: str, word: str) -> None:
    job = jobs.start("job", {"pre": [{"name": "drop", "action": "drop-caches", "path": path}]})
    with pytest.raises(errors.HookFailed, match=word):
        job.dump()
    job.goes_on()


def cached(path: Path) -> int:
    """Pages of a file that the kernel keeps."""
    done = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "PAGES", str(path)],
        capture_output=True,
        check=True,
    )
    return int(done.stdout)
