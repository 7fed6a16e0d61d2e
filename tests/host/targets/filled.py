"""A tree whose large memory has a known content: ``filled.py FOLDER``. At each SIGUSR1 it does what
FOLDER/do says, one word after the other, and writes what was wrong to FOLDER/answer.
"""

import ctypes
import errno
import mmap
import os
import signal
import sys
import threading
import time

PAGE = 4096
AREA = 24 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def area():
    return _libc.mmap(None, AREA, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)


def pattern(seed, page):
    return (seed << 32 | page | 1 << 60).to_bytes(8, "little") * (PAGE // 8)


def fill(at, seed):
    for page in range(AREA // PAGE):
        ctypes.memmove(at + page * PAGE, pattern(seed, page), PAGE)


def robust():
    """Mutexes in memory that is large, and otherwise not looked at: each in two pages."""
    at = area()
    fill(at, 5)
    mutexes = [ctypes.c_void_p(at + 64 * PAGE * n - 16) for n in range(1, 5)]
    attributes = (ctypes.c_int * 2)()
    assert _libc.pthread_mutexattr_init(attributes) == 0
    assert _libc.pthread_mutexattr_setrobust(attributes, 1) == 0
    for each in mutexes:
        assert _libc.pthread_mutex_init(each, attributes) == 0
    return mutexes


def wrong(at, seed, pages, content=None):
    """Which of these pages of the area differ."""
    return [
        (seed, page)
        for page in pages
        if ctypes.string_at(at + page * PAGE, PAGE)
        != (pattern(seed, page) if content is None else content)
    ][:3]


def mappings():
    with open("/proc/self/maps") as file:
        lines = [line.split()[:2] for line in file]
    return [(*(int(each, 16) for each in place.split("-")), flags) for place, flags in lines]


class Memory:
    def __init__(self):
        self.at = {seed: area() for seed in range(1, 5)}
        for seed, at in self.at.items():
            fill(at, seed)
        self.mutexes = robust()
        self.held, self.ending = threading.Event(), threading.Event()
        self.holder = threading.Thread(target=self.hold)
        self.holder.start()
        self.held.wait()

    def hold(self):
        for each in self.mutexes:
            assert _libc.pthread_mutex_lock(each) == 0
        self.held.set()
        self.ending.wait()

    def abandoned(self):
        """A thread ends that has held robust mutexes all the time."""
        self.ending.set()
        self.holder.join()
        latest = (ctypes.c_long * 2)(int(time.time()) + 30, 0)
        said = [_libc.pthread_mutex_timedlock(each, latest) for each in self.mutexes]
        return [] if said == [errno.EOWNERDEAD] * len(said) else [("mutexes", said)]

    def some(self):
        return wrong(self.at[1], 1, range(0, AREA // PAGE, 997))

    def moved(self):
        """Moved, with a piece cut out, and protected in between."""
        new = _libc.mmap(None, 2 * AREA, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        _libc.munmap(new, 2 * AREA)
        old, self.at[2] = self.at[2], _libc.mremap(self.at[2], AREA, AREA, 3, ctypes.c_void_p(new))
        assert self.at[2] == new != old
        assert _libc.mprotect(new + 64 * PAGE, 64 * PAGE, 1) == 0
        return wrong(new, 2, range(0, AREA // PAGE, 1009))

    def warmed(self):
        """All but the areas is there: from now on only they can have to be waited for."""
        for low, high, flags in mappings():
            for page in range(low, high, PAGE) if flags.startswith("rw") else ():
                if not any(at <= page < at + AREA for at in self.at.values()):
                    ctypes.string_at(page, 1)
        return []

    def crossed(self):
        """One thread moves memory away, another moves other memory to where it was."""
        new = _libc.mmap(None, AREA, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        old, other, self.at[1], self.at[4] = self.at[1], self.at[4], new, self.at[1]

        def follow():
            while _libc.msync(old, PAGE, 1) == 0:  # until nothing is mapped there
                pass
            move(other, old)

        def move(at, to):
            _libc.mremap(at, AREA, AREA, 3, ctypes.c_void_p(to))

        # Both are there before: a stack must not come to be where something moves.
        threads = [
            threading.Thread(target=follow),
            threading.Thread(target=move, args=(old, new)),
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return []

    def forgotten(self):
        """Let go of: zero from now on."""
        assert _libc.madvise(self.at[3] + 100 * PAGE, 1000 * PAGE, mmap.MADV_DONTNEED) == 0
        return wrong(self.at[3], 3, (100, 101, 600, 1099), bytes(PAGE))

    def discarded(self):
        """Pages that were there, let go of in ways which the kernel tells nobody: by guard pages
        (Linux 6.13), and in a child.
        """
        at, page = self.at[1] + 700 * PAGE, pattern(1, 700)
        said = wrong(self.at[1], 1, [700])
        if _libc.madvise(at, PAGE, 102) == 0:  # MADV_GUARD_INSTALL
            assert _libc.madvise(at, PAGE, 103) == 0  # MADV_GUARD_REMOVE
            said += wrong(self.at[1], 1, [700], bytes(PAGE))
        ctypes.memmove(at, page, PAGE)
        assert _libc.madvise(at, PAGE, 18) == 0  # MADV_WIPEONFORK
        if (child := os.fork()) == 0:
            os._exit(1 if wrong(self.at[1], 1, [700], bytes(PAGE)) else 0)
        assert _libc.madvise(at, PAGE, 19) == 0  # MADV_KEEPONFORK
        status = os.waitpid(child, 0)[1]
        return said + ([("child", status)] if status else [])

    def forked(self):
        """A child that finds all of it, and one that outlives its parent."""
        child = os.fork()
        if child == 0:
            ctypes.memmove(self.at[4] + 5 * PAGE, bytes(PAGE), PAGE)
            os._exit(1 if wrong(self.at[1], 1, range(3, AREA // PAGE, 499)) else 0)
        status = os.waitpid(child, 0)[1]
        return [("child", status)] if status else wrong(self.at[4], 4, (4, 5, 6))

    def orphaned(self):
        """Leave a grandchild that waits for a page."""
        if (child := os.fork()) == 0:
            if os.fork() == 0:
                with open(os.path.join(FOLDER, "orphan.new"), "w") as file:
                    file.write(str(os.getpid()))
                os.rename(os.path.join(FOLDER, "orphan.new"), os.path.join(FOLDER, "orphan"))
                while not wrong(self.at[1], 1, range(AREA // PAGE)):
                    pass
                with open(os.path.join(FOLDER, "hole"), "w") as file:
                    file.write("a page was not what it was")
            os._exit(0)
        os.waitpid(child, 0)
        return []

    def all(self):
        told = range(AREA // PAGE)
        gone = range(100, 1100)
        return [
            *wrong(self.at[1], 1, told),
            *wrong(self.at[2], 2, told),
            *wrong(self.at[3], 3, [page for page in told if page not in gone]),
            *wrong(self.at[3], 3, gone, bytes(PAGE)),
            *wrong(self.at[4], 4, told),
        ]


FOLDER = sys.argv[1]


def main():
    asked = [signal.SIGUSR1]
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    memory = Memory()
    what = []
    while True:
        said = [found for word in what for found in getattr(memory, word)()]
        with open(os.path.join(FOLDER, "answer.new"), "w") as file:
            file.write(repr(said) if said else "right")
        os.rename(os.path.join(FOLDER, "answer.new"), os.path.join(FOLDER, "answer"))
        signal.sigwait(asked)
        with open(os.path.join(FOLDER, "do")) as file:
            what = file.read().split()


main()
