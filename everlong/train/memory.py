"""Memory: what a process does with it between one step and the next."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's <malloc.h>
_MIB = 1 << 20


def keep_freed_memory() -> bool:
    """Tells glibc to keep large blocks that are freed instead of giving them back to the system; True where it will.

    By default a tensor of 32 MB or more is mapped afresh each time that it is made, and every page of it faults: the
    float32 training step of a small Llama takes 1.3 times as long for that alone. The price is that the process holds
    on to the most memory that it has needed. It acts on the whole process, so only the command line
    asks for it; calling it twice does no harm. Other systems and C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # glibc before 2.35 takes no threshold above 32 MiB, half the size of a thread's heap.
    mapped = any(library.mallopt(_MMAP_THRESHOLD, size) for size in (1024 * _MIB, 32 * _MIB))
    # -1 is "never": with the largest number instead, 2 GiB, steps that free more than that are mapped afresh.
    return bool(mapped and library.mallopt(_TRIM_THRESHOLD, -1))
