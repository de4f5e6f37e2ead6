"""Which sub-networks methods train: pure functions of (seed, step) with the distribution that they state."""

import collections
import functools
import json
import os
import subprocess
import sys

import pytest

from research.errors import UserError
from research.models import registry
from research.nested.draws import Draw, checked, teaches
from research.nested.space import Space
from research.train.method_registry import known, make
from research.train.methods import Methods

NAMES = ("full", "l", "m", "s", "xs")
WIDTHS = (1.0, 0.8, 0.6, 0.4, 0.2)
STEPS = range(2000)
CHOOSE = ["full", *(name for name, method in known().items() if method.chooses)]


def draw(name, names, count, seed, step):
    options = {"count": count} if name in ("sorted", "sandwich") else {}
    return Methods(() if name == "full" else (make(name, options),)).draws(space_of(names), seed, step)


@functools.cache
def space_of(names):
    """A space of these names, the largest first."""
    full = registry.model_config("lenet5")
    return Space(full, {name: full.shrink(width=width) for name, width in zip(names, WIDTHS, strict=False)})


@pytest.mark.parametrize("scheme", CHOOSE)
def test_draws_are_a_function_of_seed_and_step(scheme):
    draws = [draw(scheme, NAMES, 4, 0, step) for step in range(50)]
    assert draws == [draw(scheme, NAMES, 4, 0, step) for step in range(50)]
    assert [draw(scheme, NAMES, 4, 0, s) for s in (49, 3)] == [draws[49], draws[3]]
    assert all(d.name in NAMES for step in draws for d in step)
    other = [draw(scheme, NAMES, 4, 1, step) for step in range(50)]
    assert (other == draws) == (scheme in ("full", "all"))
    assert (len(set(draws)) == 1) == (scheme in ("full", "all"))


def test_draws_are_equal_in_another_process():
    code = (
        "import json; from tests.methods.test_draws import draw;"
        f"print(json.dumps([[d.name for d in draw(k, {NAMES!r}, 4, 7, s)] for k in ('random', 'sorted', 'sandwich') "
        "for s in range(20)]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.getcwd()}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    here = [[d.name for d in draw(k, NAMES, 4, 7, s)] for k in ("random", "sorted", "sandwich") for s in range(20)]
    assert json.loads(out) == here


def test_random_and_sorted_draw_uniformly():
    for scheme, per_step in (("random", 1), ("sorted", 4)):
        counts = collections.Counter(d.name for s in STEPS for d in draw(scheme, NAMES, 4, 0, s))
        total = per_step * len(STEPS)
        assert sum(counts.values()) == total
        spread = (total * 0.2 * 0.8) ** 0.5
        assert all(abs(counts[n] - total / 5) < 4 * spread for n in NAMES), counts


def test_sorted_gives_each_its_part_of_the_batch():
    for step in range(20):
        draws = draw("sorted", NAMES, 3, 0, step)
        assert [(d.microbatch, d.microbatches) for d in draws] == [(0, 3), (1, 3), (2, 3)] and not any(
            d.distill for d in draws
        )


def test_sandwich_has_the_largest_the_smallest_and_others_between():
    middle = collections.Counter()
    for step in STEPS:
        first, *between, last = draw("sandwich", NAMES, 4, 0, step)
        assert (first.name, first.distill) == ("full", False) and (last.name, last.distill) == ("xs", True)
        assert len(between) == 2 == len({d.name for d in between}) and all(
            d.distill and d.microbatches == 1 for d in between
        )
        middle.update(d.name for d in between)
    assert set(middle) == {"l", "m", "s"} and all(abs(n - 4000 / 3) < 120 for n in middle.values())
    assert [d.name for d in draw("sandwich", NAMES, 2, 0, 0)] == ["full", "xs"]
    assert [d.name for d in draw("sandwich", NAMES, 9, 0, 0)] == list(NAMES)


def test_full_and_all():
    assert [d.name for d in draw("full", NAMES, 4, 0, 9)] == ["full"]
    assert [d.name for d in draw("all", NAMES, 1, 0, 9)] == list(NAMES)


def test_mistakes():
    with pytest.raises(UserError, match="unknown method 'sandwhich'; near: sandwich"):
        make("sandwhich", {})
    with pytest.raises(UserError, match=r"method.sorted.count=0; valid: a whole number from 1"):
        make("sorted", {"count": 0})
    with pytest.raises(UserError, match=r"method.sandwich.counts is unknown to sandwich; near: count"):
        make("sandwich", {"counts": 3})
    with pytest.raises(UserError, match="methods sandwich and sorted both decide which sub-networks an update trains"):
        Methods((make("sandwich", {}), make("sorted", {})))


def test_a_network_that_distils_without_a_teacher_is_refused():
    orphan = (Draw("s", distill=True), Draw("full"))
    message = "'orphan' distils s on microbatch 0 of 1 at update 3, where the network .* full, is not drawn before it"
    with pytest.raises(UserError, match=message):
        checked(orphan, space_of(("full", "s")), "orphan", 3)


def test_who_teaches_follows_from_the_draws():
    full, other, small = (
        Draw("full", microbatch=0, microbatches=2),
        Draw("full", microbatch=1, microbatches=2),
        Draw("s", True, 1, 2),
    )
    assert [teaches(d, (full, other, small)) for d in (full, other, small)] == [False, True, False]
