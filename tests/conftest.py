"""Tests run in a process set up as the commands set theirs up: the same allocator, the same compiler flags, the same bits."""

import gc

import pytest

from research.process import set_allocator, set_dispatch, set_xla_flags

set_allocator()
set_dispatch()
set_xla_flags()


@pytest.fixture(autouse=True, scope="module")
def no_leftovers():
    """Drops what a module compiled: kept to the end, all of it is 5 GB in each worker."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
