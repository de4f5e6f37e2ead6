"""Runs inside the test process compile their programs without optimisation: they make a few steps each, and compiling
is what takes the time.

Runs that are started as commands, and those whose bits are compared with one (fixture `whole`), compile as users' do.
"""

import pytest

from research.train.compiler import Compiler
from tests.models.twins import FAST


@pytest.fixture(autouse=True)
def unoptimised_programs(request, monkeypatch):
    if "whole" not in request.fixturenames:
        monkeypatch.setattr(Compiler, "effort", lambda self, program: FAST)
