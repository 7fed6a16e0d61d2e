"""A process tree that checks itself. Run as ``tree.py FOLDER FEATURE...``.

On SIGUSR1 the root runs every feature's check and writes the outcome, a JSON object of feature to
"" or a complaint, to ``FOLDER/answer`` by rename. Nothing else is ever written by name, so that a
dump meets no half-written file. SIGTERM ends it with status 7.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

CHECKS: dict[str, Any] = {}
FOLDER = sys.argv[1]


def feature(setup):
    CHECKS[setup.__name__] = setup
    return setup


def pattern(count, seed):
    block = hashlib.shake_128(str(seed).encode()).digest(1 << 20)
    return (block * (count // len(block) + 1))[:count]


def child(body):
    """Fork; the child serves requests of one byte over a socket pair by ``body``."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        serve = body()
        while request := theirs.recv(1):
            theirs.sendall(serve(request) or b"!")
        os._exit(0)
    theirs.close()

    def ask(request=b"?"):
        ours.settimeout(30)
        ours.sendall(request)
        return ours.recv(4096)

    return pid, ask


@feature
def memory():
    size = int(os.environ.get("MEMORY_MIB", "24")) << 20
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    half = size // 2  # the other half stays zero
    area[:half] = pattern(half, 1)
    area[half : half + 4096] = bytes(4096)  # touched, but zero
    digest = hashlib.sha256(area).hexdigest()
    return lambda: "" if hashlib.sha256(area).hexdigest() == digest else "memory differs"


@feature
def threads():
    counts = [0] * 3
    names = []

    def count(at):
        names.append(threading.get_native_id())
        while True:
            counts[at] += 1
            time.sleep(0.002)

    for at in range(3):
        threading.Thread(target=count, args=(at,), daemon=True).start()
    while len(names) < 3:
        time.sleep(0.01)

    def check():
        before = list(counts)
        deadline = time.monotonic() + 20
        while any(a >= b for a, b in zip(before, counts, strict=True)):
            if time.monotonic() > deadline:
                return "a thread stands still"
            time.sleep(0.005)
        return "" if set(names) <= set(map(int, os.listdir("/proc/self/task"))) else "other tids"

    return check


@feature
def children():
    _, ask = child(lambda: lambda request: request.upper())
    _, ask2 = child(lambda: lambda request: str(os.getppid()).encode())
    parent = str(os.getpid()).encode()
    return lambda: "" if ask(b"x") == b"X" and ask2() == parent else "a child does not answer"


@feature
def pipes():
    reader, writer = os.pipe()
    os.write(writer, b"queued in a pipe")
    state = {"expect": b"queued in a pipe"}

    def check():
        if os.read(reader, 100) != state["expect"]:
            return "other bytes in the pipe"
        state["expect"] = os.urandom(8)
        os.write(writer, state["expect"])
        return ""

    return check


@feature
def unix_sockets():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    a.sendall(b"queued in a socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0ckpt-test-" + str(os.getpid()))
    listener.listen()
    state = {"expect": b"queued in a socket"}

    def check():
        if b.recv(100) != state["expect"]:
            return "other bytes in the socket"
        state["expect"] = os.urandom(8)
        a.sendall(state["expect"])
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(listener.getsockname())
            listener.accept()[0].close()
        return ""

    return check


@feature
def tcp():
    listener = socket.create_server(("127.0.0.1", 0))
    a = socket.create_connection(listener.getsockname())
    b = listener.accept()[0]
    # An agent that was killed leaves connections held for ten seconds, and what was sent then is
    # sent again only some time later, each time twice as long.
    for sock in (a, b):
        sock.settimeout(30)
    big = pattern(200_000, 2)
    a.sendall(big)
    b.sendall(b"back")
    state = {"ab": big, "ba": b"back"}

    def receive(sock, want):
        got = b""
        while len(got) < len(want):
            piece = sock.recv(1 << 16)
            if not piece:
                return False
            got += piece
        return got == want

    def check():
        if not receive(b, state["ab"]) or not receive(a, state["ba"]):
            return "other bytes in the connection"
        state["ab"], state["ba"] = os.urandom(50_000), os.urandom(9)
        a.sendall(state["ab"])
        b.sendall(state["ba"])
        return ""

    return check


@feature
def unlinked():
    path = os.path.join(FOLDER, "unlinked")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    content = pattern(3 << 20, 3)
    os.write(fd, content)
    os.unlink(path)
    os.lseek(fd, 100, 0)

    def check():
        if os.pread(fd, len(content) + 1, 0) != content or os.lseek(fd, 0, 1) != 100:
            return "the unlinked file differs"
        return "" if os.fstat(fd).st_nlink == 0 else "it has a name again"

    return check


@feature
def shared_memory():
    area = mmap.mmap(-1, 4 << 20)
    content = pattern(4 << 20, 4)
    area[:] = content

    def serve(request):
        area[5] = (area[5] + 1) % 256
        return hashlib.sha256(area[16:]).digest()

    _, ask = child(lambda: serve)
    want = hashlib.sha256(content[16:]).digest()

    def check():
        before = area[5]
        if ask() != want or hashlib.sha256(area[16:]).digest() != want:
            return "shared memory differs"
        return "" if area[5] == (before + 1) % 256 else "it is not shared any more"

    return check


@feature
def memfd():
    fd = os.memfd_create("ckpt-test")
    content = pattern(2 << 20, 5)
    os.write(fd, content)
    area = mmap.mmap(fd, 2 << 20)
    return lambda: "" if os.pread(fd, 2 << 20, 0) == content == area[:] else "the memfd differs"


@feature
def timers():
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.timerfd_create(1, 0)

    class Spec(ctypes.Structure):
        _fields_ = [(n, ctypes.c_long) for n in ("is_", "ins", "vs", "vns")]

    libc.timerfd_settime(fd, 0, ctypes.byref(Spec(0, 50_000_000, 0, 50_000_000)), None)
    ticks = {"alarm": 0}

    def on_alarm(*_):
        ticks["alarm"] += 1

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

    def check():
        before = ticks["alarm"]
        os.read(fd, 8)
        if not select.select([fd], [], [], 20)[0]:
            return "the timerfd is silent"
        deadline = time.monotonic() + 20
        while ticks["alarm"] == before:
            if time.monotonic() > deadline:
                return "the interval timer is silent"
            time.sleep(0.01)
        return ""

    return check


@feature
def pending_signals():
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGRTMIN)
    want = {signal.SIGUSR2, signal.SIGRTMIN}
    return lambda: "" if want <= set(signal.sigpending()) else "pending signals are lost"


@feature
def sessions():
    def leader():
        os.setsid()
        return lambda request: f"{os.getsid(0)} {os.getpgid(0)} {os.getpid()}".encode()

    pid, ask = child(leader)
    ask()
    return lambda: "" if ask() == f"{pid} {pid} {pid}".encode() else "the session is another"


@feature
def stopped():
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)

    def check():
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rsplit(") ", 1)[1][0]
        return "" if state == "T" else f"the stopped child is in state {state}"

    return check


@feature
def eventfd():
    fd = os.eventfd(41)
    poller = select.epoll()
    poller.register(fd, select.EPOLLIN)

    def check():
        if not poller.poll(1):
            return "epoll is silent"
        value = os.eventfd_read(fd)
        os.eventfd_write(fd, 41)
        return "" if value == 41 else f"the eventfd holds {value}"

    return check


@feature
def open_file():
    path = os.path.join(FOLDER, "journal")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"line 1\n")
    state = {"expect": b"line 1\n"}

    def check():
        if os.pread(fd, 1 << 16, 0) != state["expect"]:
            return f"the file holds {os.pread(fd, 1 << 16, 0)!r}"
        return ""

    def write():
        state["expect"] += b"more\n"
        os.write(fd, b"more\n")

    check.write = write
    return check


@feature
def hard_link():
    path = os.path.join(FOLDER, "first")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    os.write(fd, b"two names")
    os.link(path, os.path.join(FOLDER, "second"))
    os.unlink(path)
    return lambda: "" if os.pread(fd, 100, 0) == b"two names" else "the linked file differs"


@feature
def sysv_shm():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    number = libc.shmget(0, 1 << 20, 0o1600)
    address = libc.shmat(number, None, 0)
    libc.shmctl(number, 0, None)
    area = (ctypes.c_char * (1 << 20)).from_address(address)
    content = pattern(1 << 20, 6)
    area[:] = content
    return lambda: "" if bytes(area) == content else "SysV shared memory differs"


def main():
    # Before the first thread: a process's signal goes to any thread that does not block it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGRTMIN])
    checks = {name: CHECKS[name]() for name in sys.argv[2:]}

    def answer(*_):
        said = {}
        for name, check in checks.items():
            try:
                said[name] = check()
            except Exception as exc:  # noqa: BLE001 - a complaint like any other
                said[name] = repr(exc)
        path = os.path.join(FOLDER, "answer")
        with open(path + ".new", "w") as file:
            json.dump(said, file)
        os.rename(path + ".new", path)

    def more(*_):
        for check in checks.values():
            if hasattr(check, "write"):
                check.write()

    # A signal may be delivered to another thread: the descriptor wakes this one all the same.
    woken, wake = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGUSR1, answer)
    signal.signal(signal.SIGHUP, more)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    answer()
    while True:
        select.select([woken], [], [])
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)


main()
