"""Sets the process up for speed before JAX starts. Standard library only: importing this file must not import JAX."""

import ctypes
import os

# Parameter numbers of mallopt(3) in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8

NEVER_TRIM = -1
TOP_PAD_BYTES = 64 * 2**20


def set_allocator(arenas: int = 1) -> bool:
    """Tells glibc to keep freed buffers mapped instead of handing them back to the kernel.

    XLA allocates and frees large buffers at every call; by default glibc maps and unmaps each of them, and the page
    faults make memory-bound ops much slower on CPU. XLA's worker threads allocate too: they must share the one heap
    that is never trimmed, since the arena that glibc would give each of them unmaps what it frees. Call it first thing
    in `main`, before JAX is imported.

    Args:
      arenas: heaps that threads may have; only a process that also runs another library wants more.

    Returns: True if all settings took effect; False on other C libraries (musl, macOS, Windows), and under
      NESTAX_ALLOCATOR=default in the environment, where it does nothing.
    """
    if os.environ.get("NESTAX_ALLOCATOR") == "default":
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (AttributeError where the C library is not glibc)
        mallopt = libc.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    settings = [(M_ARENA_MAX, arenas), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER_TRIM), (M_TOP_PAD, TOP_PAD_BYTES)]
    return all([mallopt(name, value) == 1 for name, value in settings])  # noqa: C419  (a list: every setting is made)


def set_dispatch() -> None:
    """Runs CPU programs in the thread that calls them, unless the environment says otherwise.

    A step of many small programs gains a few percent by it: compare `python -m launch.bench
    --config=configs/quickstart.py` under JAX_CPU_ENABLE_ASYNC_DISPATCH=0 and 1. No effect on GPU and TPU.
    """
    os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")


YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
YNN_KINDS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
NO_PROMOTION = "--xla_disable_hlo_passes"
PROMOTION = "all-reduce-promotion"
"""A pass of XLA:CPU that ends the process at a bfloat16 sum over devices whose code is in part its own and in part the
partitioner's."""
KNOWN_JAXLIBS = ("0.10.", "0.11.")
"""XLA ends the process at a flag that it does not know: only releases that have this one get it."""


def set_xla_flags() -> None:
    """Has XLA:CPU's library of kernels compute matrix products and reductions, but not convolutions, before JAX starts.

    By default it computes dense convolutions too, slower than XLA's own: compare `python -m launch.bench
    --config=configs/fashion_fast.py` with the same under `XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=LIST` of
    other kinds. A setting of the user's in XLA_FLAGS stays.
    """
    from importlib import metadata  # here: it takes as long to import as everything else in this file

    flags = os.environ.get("XLA_FLAGS", "")
    if not metadata.version("jaxlib").startswith(KNOWN_JAXLIBS):
        return
    for flag, value in ((YNN_FLAG, YNN_KINDS), (NO_PROMOTION, PROMOTION)):
        if flag not in flags:
            flags = f"{flags} {flag}={value}".strip()
    os.environ["XLA_FLAGS"] = flags
