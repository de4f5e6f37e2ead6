"""The allocator setting takes effect, and needs no JAX."""

import ctypes
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from research.process import set_allocator
assert "jax" not in sys.modules
ok = set_allocator()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults(size=64 * 2**20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    p = libc.malloc(size); ctypes.memset(p, 1, size); libc.free(p)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(ok, first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_buffers_stay_mapped():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    ok, first, second = done.stdout.split()
    assert ok == "True"
    assert int(first) > 20  # a fresh buffer faults at every page (at huge pages still some)
    assert int(second) < 5


def test_other_c_libraries_are_left_alone(monkeypatch):
    from research.process import set_allocator

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert set_allocator() is False
