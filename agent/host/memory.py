"""This program's own memory: a service gives back what an operation took.

Promises: nothing changes but where free memory lies.
Does not: bound what an operation takes.
"""

from __future__ import annotations

import ctypes
import gc

# malloc.h: M_ARENA_MAX. glibc makes eight arenas a core, and each thread that ever allocated keeps
# what it used in one of them. Only of the first one malloc_trim returns the free end, which
# elsewhere may stay as large as twice the largest block that was ever freed (malloc/malloc.c:
# mtrim, heap_trim). Threads that hold the interpreter's lock to allocate do not need more.
_ARENA_MAX = -8
_ARENAS = 1

_libc = ctypes.CDLL(None)


def keep_small() -> None:
    """Use one arena; to be called before the first thread starts. A no-op where the C library
    has no such thing.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, _ARENAS)
    # Modules and what they made at import live as long as the program: no collection looks at them.
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Return what is free to the system; takes milliseconds."""
    gc.collect()
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
