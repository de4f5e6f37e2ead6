"""Sets the process up for speed before JAX starts. Standard library only: importing this file must not import JAX."""

import ctypes
import os

# Parameter numbers of mallopt(3) in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

TRIM_THRESHOLD_BYTES = 2**31 - 1  # the largest value mallopt's int argument takes
TOP_PAD_BYTES = 64 * 2**20


def set_allocator() -> bool:
    """Tells glibc to keep freed buffers mapped instead of handing them back to the kernel.

    XLA allocates and frees large buffers at every call; by default glibc maps and unmaps each of them, and the page faults
    make memory-bound ops up to three times slower on CPU. Call it first thing in `main`, before JAX is imported.

    Returns: True if all three settings took effect; False on other C libraries (musl, macOS, Windows), where it does nothing.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (AttributeError where the C library is not glibc)
        mallopt = libc.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    settings = [(M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES), (M_TOP_PAD, TOP_PAD_BYTES)]
    return all([mallopt(name, value) == 1 for name, value in settings])  # noqa: C419  (a list: every setting is made)


def set_dispatch() -> None:
    """Runs CPU programs in the thread that calls them, unless the environment says otherwise.

    glibc keeps freed buffers mapped only for the main thread's heap: a step that a worker thread runs pays page faults
    again. No effect on GPU and TPU.
    """
    os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")
