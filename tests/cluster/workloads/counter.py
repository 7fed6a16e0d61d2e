"""A pod's program that counts: prints each number, appends it to a file, and keeps some memory.

Environment: PERIOD_S (0.1), MEMORY_MB (16), FILE (/var/tmp/count), START (0).
The memory is filled with pages that differ and is summed again all the time: a byte that a
restore lost or changed ends the count with exit status 3.
"""

import os
import sys
import time

period_s = float(os.environ.get("PERIOD_S", "0.1"))
size = int(os.environ.get("MEMORY_MB", "16")) << 20
path = os.environ.get("FILE", "/var/tmp/count")
number = int(os.environ.get("START", "0"))

PAGE = 4096
memory = bytearray(size)
for page in range(0, size, PAGE):
    memory[page : page + 8] = (page * 0x9E3779B97F4A7C15 & (1 << 64) - 1).to_bytes(8, "little")


def intact(page: int) -> bool:
    want = (page * 0x9E3779B97F4A7C15 & (1 << 64) - 1).to_bytes(8, "little")
    return memory[page : page + 8] == want


pages = max(size // PAGE, 1)
with open(path, "a", buffering=1, encoding="ascii") as out:
    while True:
        # A part of the memory at each step, all of it in about ten.
        for page in range(number % 10 * pages // 10, (number % 10 + 1) * pages // 10):
            if size and not intact(page * PAGE):
                print(f"page {page} differs", flush=True)
                sys.exit(3)
        print(number, flush=True)
        print(number, file=out)
        number += 1
        time.sleep(period_s)
