"""Tests run in a process set up as the commands set theirs up, but compile faster and keep what they compiled.

Compiling is most of their time. Without LLVM's optimisation and its expensive passes it takes a third less; code is
slower then, and may differ in the last bits, in all processes alike. A level that is given in XLA_FLAGS stays. JAX
keeps programs in .pytest_cache/xla by their text, flags and versions, for all processes of a run and for later runs.
"""

import contextlib
import gc
import os
import signal
from pathlib import Path

import pytest

from research.process import set_allocator, set_dispatch, set_xla_flags

set_allocator()
set_dispatch()
set_xla_flags()
if os.environ.get("NESTAX_CHECK_ANNOTATIONS"):
    import tests.annotations

    tests.annotations.install()
for flag, value in {"--xla_backend_optimization_level": 0, "--xla_llvm_disable_expensive_passes": "true"}.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent.parent / ".pytest_cache/xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
for name, value in CACHE.items():
    os.environ.setdefault(name, value)


# Runs leave ignored signals alone, and a background job, as of CI, starts with some ignored; what tests send is to be
# heard.
for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, usual)


@pytest.fixture(autouse=True, scope="module")
def no_leftovers():
    """Drops what a module compiled: kept to the end, all of it is 5 GB in each worker."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of the cases of a test marked `slow_unless`, marks those slow that it does not name; each it names must exist."""
    cases: dict = {}
    for item in items:
        if mark := item.get_closest_marker("slow_unless"):
            if item.callspec.id not in mark.args:
                item.add_marker(pytest.mark.slow)
            cases.setdefault(item.nodeid.split("[")[0], set(mark.args)).discard(item.callspec.id)
    if not any("::" in arg for arg in config.args):
        for test, unknown in cases.items():
            if unknown:
                raise pytest.UsageError(f"{test} has no cases {sorted(unknown)}, which slow_unless names")
