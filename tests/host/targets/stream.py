"""One end of a TCP stream of numbers; complains and ends if one is lost, repeated or reordered.

stream.py serve FOLDER [ADDRESS]   listens on a free port and writes it to FOLDER/port
stream.py send FOLDER [ADDRESS]    connects to that port
Each end sends numbers and checks those it gets; on SIGUSR1 it writes how many to FOLDER/<role>.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
import time

NUMBER = struct.Struct("<Q")


def write(path: str, text: str) -> None:
    with open(path + ".new", "w", encoding="ascii") as file:
        file.write(text)
    os.replace(path + ".new", path)


def connect(role: str, folder: str, address: str = "127.0.0.1") -> socket.socket:
    port = os.path.join(folder, "port")
    if role == "serve":
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as server:
            write(port, str(server.getsockname()[1]))
            return server.accept()[0]
    while not os.path.exists(port):
        time.sleep(0.01)
    with open(port, encoding="ascii") as file:
        return socket.create_connection((address, int(file.read())))


def main(role: str, folder: str, *address: str) -> None:
    sock = connect(role, folder, *address)
    got = 0
    asked = threading.Event()

    def send() -> None:
        number = 0
        while True:
            for _ in range(1000):
                sock.sendall(NUMBER.pack(number))
                number += 1
            time.sleep(0.001)

    signal.signal(signal.SIGUSR1, lambda *_: asked.set())
    threading.Thread(target=send, daemon=True).start()
    pending = b""
    while True:
        data = sock.recv(1 << 16)
        if not data:
            raise SystemExit(f"the peer is gone after {got}")
        pending += data
        whole = len(pending) // NUMBER.size * NUMBER.size
        for (number,) in NUMBER.iter_unpack(pending[:whole]):
            if number != got:
                raise SystemExit(f"got {number} in place of {got}")
            got += 1
        pending = pending[whole:]
        if asked.is_set():
            asked.clear()
            write(os.path.join(folder, role), str(got))


if __name__ == "__main__":
    main(*sys.argv[1:])
