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


THREAD_PROGRAM = """
import ctypes, threading
from research.process import set_allocator
assert set_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
places = []
def allocate():
    places.append(libc.malloc(1000))
allocate()
thread = threading.Thread(target=allocate); thread.start(); thread.join()
print(abs(places[0] - places[1]) < 2**30)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_threads_share_the_heap_that_is_never_trimmed():
    done = subprocess.run([sys.executable, "-c", THREAD_PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_xla_flags_are_added_once_and_a_users_setting_stays(monkeypatch):
    import importlib.metadata
    import os

    from research.process import NO_PROMOTION, PROMOTION, YNN_FLAG, YNN_KINDS, set_xla_flags

    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    set_xla_flags()
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {YNN_FLAG}={YNN_KINDS} {NO_PROMOTION}={PROMOTION}"
    monkeypatch.setenv("XLA_FLAGS", f"{YNN_FLAG}= {NO_PROMOTION}=x")
    set_xla_flags()
    assert os.environ["XLA_FLAGS"] == f"{YNN_FLAG}= {NO_PROMOTION}=x"
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    set_xla_flags()
    assert "XLA_FLAGS" not in os.environ  # an unknown version could end the process at the flag


def test_other_c_libraries_are_left_alone(monkeypatch):
    from research.process import set_allocator

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert set_allocator() is False


def test_the_environment_can_leave_the_allocator_alone(monkeypatch):
    from research.process import set_allocator

    monkeypatch.setenv("NESTAX_ALLOCATOR", "default")
    assert set_allocator() is False
