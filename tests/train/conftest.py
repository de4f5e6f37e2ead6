"""Runs inside the test process compile their programs without optimisation: they make a few steps each, and compiling is what takes the time.

Runs that are started as commands or by a fixture of a module, and so the tests of equal bits after a kill, compile as users' do.
"""

import pytest

from research.train.programs import Programs
from tests.models.twins import FAST


@pytest.fixture(autouse=True)
def unoptimised_programs(monkeypatch):
    monkeypatch.setattr(Programs, "_effort", lambda self, kind: FAST)
