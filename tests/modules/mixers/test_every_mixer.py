"""What every mixer of sequence models must do, generated from the kinds there are; wrong mixers are caught."""

import pytest

from research.models import registry
from research.models.sequence import SequenceConfig
from tests.modules.mixers import echo
from tests.modules.mixers.agreement import check_documents

DIM = 16


QUICK = ("attention", "gla", "hgrn", "mamba2", "sla", "window")
"""Kinds of every way of keeping a state, whose check compiles quickly."""


@pytest.mark.slow_unless(*QUICK)
@pytest.mark.parametrize("kind", SequenceConfig.specs())
def test_documents_states_and_padding_are_kept_apart(kind):
    config = registry.model_config(f"{kind}_small", **registry.entry(f"{kind}_small").tiny)
    check_documents(getattr(config, kind), DIM)


def test_a_right_mixer_passes():
    check_documents(echo.Echo(), DIM)


@pytest.mark.parametrize("ignores", ["segments", "state", "steps"])
def test_a_mixer_that_ignores_what_it_is_told_is_caught(ignores):
    with pytest.raises(AssertionError):
        check_documents(echo.Echo(ignores), DIM)


def test_every_kind_names_its_paper():
    assert [kind for kind, spec in SequenceConfig.specs().items() if not spec.paper.startswith("arXiv")] == []
