"""What glibc does with freed memory, and how many kernels oneDNN keeps. Knows no tensors.

Elsewhere than glibc nothing happens.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable

# glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX (malloc.h), the first at its largest
_OPTIONS = ((-3, 32 * 2**20), (-1, 2**30), (-2, 64 * 2**20), (-8, 1))
_KERNELS = 256  # kept at a time: of four products, 64 shapes
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and that of torch's bridge to it
_TRIM_EVERY = 32  # new kernels

_libc = ctypes.CDLL(None)
_mallopt: Callable[[int, int], int] | None = getattr(_libc, "mallopt", None)
_setenv: Callable[[bytes, bytes, int], int] | None = getattr(_libc, "setenv", None)
_malloc_trim: Callable[[int], int] | None = getattr(_libc, "malloc_trim", None)


def keep_freed_memory() -> None:
    """Make glibc keep what is freed for the next layer, instead of asking the kernel for fresh pages every time.

    A forward makes and frees megabytes at each step; without this, page faults take up to a tenth of it on a CPU.
    """
    if _mallopt is not None:
        for option, value in _OPTIONS:
            _mallopt(option, value)


class Kernels:
    """The shapes of products for which oneDNN has written a kernel lately. It writes one for each number of rows.

    They are small and lie wherever memory was free, so the large pieces between them never join again: within a
    thousand shapes a process grows by two gigabytes. So oneDNN keeps fewer of them than its 1,024 (to write one anew
    takes a quarter of a millisecond), and after some new ones the free pages go back to the system.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[Hashable, None] = OrderedDict()
        self._num_new = 0
        if _setenv is not None:
            for name in _CACHES:  # read once, at oneDNN's first operator; what is set already stays
                _setenv(name.encode(), str(_KERNELS).encode(), 0)

    def use(self, shape: Hashable) -> None:
        """To be called before each product."""
        if shape in self._recent:
            self._recent.move_to_end(shape)
            return
        if len(self._recent) == _KERNELS:
            self._recent.popitem(last=False)
        self._recent[shape] = None
        self._num_new += 1
        if self._num_new % _TRIM_EVERY == 0 and _malloc_trim is not None:
            _malloc_trim(0)
