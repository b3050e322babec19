"""What glibc does with memory that is freed; with another C library nothing happens."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of its malloc.h
KEPT_BYTES = 1 << 28  # more than the activations of a batch on a CPU
LARGE_BYTES = 1 << 25  # the most that glibc takes for M_MMAP_THRESHOLD


def keep() -> None:
    """Keep freed memory at the end of the heap, up to 256 MB: the next batch needs no new pages.

    It acts on the whole process. Blocks of 32 MB and more still go back at once: kept, they would
    be pinned by what is small and outlives them.
    """
    _call("mallopt", M_MMAP_THRESHOLD, LARGE_BYTES)
    _call("mallopt", M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Give what is kept, and the holes between what is in use, back to the system."""
    _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
    """Call a function of glibc."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library
        return
    function(*args)
