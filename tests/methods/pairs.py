"""Every ordered pair of methods in small, and what becomes of it: it runs, or is refused for a reason.

`python -m tests.methods.pairs` writes pairs.json anew, with which the tests compare.
"""

import itertools
import json
from pathlib import Path

import jax
import numpy as np

from launch import config as recipe
from research.errors import UserError
from research.train.method_registry import known
from research.train.setup import make_setup
from research.train.supervised import Supervised
from research.train.update import Update
from tests.methods.cases import NEEDS, source

FOUND = Path(__file__).with_name("pairs.json")
OURS = [name for name, method in known().items() if method.__module__.startswith("research.methods.")]
PAIRS = list(itertools.permutations(OURS, 2))
ROBUST = {"pgd", "trades", "advmoe"}


def tiny(*names, **fields):
    """The config of a run of four updates, saved after the second, of a model that these methods can have."""
    if robust := ROBUST & set(names) if not set(NEEDS) & set(names) else set():
        text = f"tests/tiny_robust.py:{min(robust)}," + ("attacks" if "attacks" in names else "")
        given = {"nested.points.s": "width=0.5", "model.dims": "(16, 32)", "model.stem_dim": "16"}
    else:
        text, given = "tests/methods/tiny.py:" + ",".join(names), {}
    given |= {"methods": ",".join(names), "train.duration": "4", "checkpoint.every": "2", "eval.every": "0"}
    for name in names:
        if name == "upcycling" and "customisation" in names:
            continue  # whose model has no place for experts: refused, whatever the rest
        given |= NEEDS[name]() if name in NEEDS else {}
    given |= {f"method.{name}.count": "2" for name in names if name in ("sorted", "sandwich")}
    return recipe.load(text, given | {k.replace("__", "."): str(v) for k, v in fields.items()})


def outcome(*names) -> str:
    """Returns "runs" where every program of a round can be traced, else why the methods are refused."""
    try:
        learner = Supervised(make_setup(tiny(*names)))
    except UserError as refused:
        return str(refused).replace(source(), "SOURCE")
    try:
        programs = learner.programs
        for step in range(len(learner.setup.phases)):
            _trace(learner, programs, step)
    finally:
        learner.close()
    return "runs"


def _trace(learner, programs, step):
    draws, phase = learner.setup.draw(step), learner.setup.phase(step)
    for program in {p.title: p for p in learner.execution.programs(draws, phase)}.values():
        held, params = programs.held_shapes(), dict(programs.full.params)
        shapes = jax.eval_shape(program.program(programs), held, params, program.microbatch(programs))
        assert shapes.grads.keys() == programs.full.params.keys()
    shapes, at = programs.shapes, jax.ShapeDtypeStruct((), np.int32)
    update = Update(phase.name).program(programs)
    moved = jax.eval_shape(update, shapes, dict(programs.full.params), at, shapes.stats, shapes.stats)
    assert jax.tree.structure(moved.state.methods) == jax.tree.structure(shapes.methods)


def read() -> dict[str, str]:
    """Returns what is stored: "FIRST SECOND" -> "runs" or a reason."""
    return json.loads(FOUND.read_text())


if __name__ == "__main__":
    found = {" ".join(pair): outcome(*pair) for pair in PAIRS}
    FOUND.write_text(json.dumps(found, indent=1) + "\n")
