"""Runs that are read by every command, over and over, while they train and save every few updates."""

import os

import pytest

from tests.faults.base import Runs
from tests.faults.readers import OFTEN, image_readers, language_text, read_beside, text_readers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_run_that_is_read_while_it_trains_ends_as_if_alone(kind, tmp_path):
    runs = Runs(tmp_path, programs=os.environ["JAX_COMPILATION_CACHE_DIR"])
    config, readers = [*OFTEN, "--config.train.duration=800"], image_readers
    if kind == "text":
        config, readers = (
            [*config, "--config=tests/tiny_lm.py:full", f"--config.data.dir={language_text(tmp_path)}"],
            text_readers,
        )
    found = read_beside(runs, kind, config, readers)
    assert found.keys() == readers(runs, tmp_path).keys(), "the run ended before it was read by all"
    assert sum(readings - early for readings, early in found.values()) >= 2
