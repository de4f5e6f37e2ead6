"""The rules of the house: imports point one way, research/ neither prints nor parses flags, every recipe builds."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.modules.state import abstract

ROOT = Path(__file__).parents[1]

# A room may import the rooms named here (and itself, and research.errors, research.files, research.process,
# research.seeds,
# research.plugins, research.stopping, research.values).
ALLOWED = {
    "ops": set(),
    "modules": {"ops"},
    "models": {"modules", "ops"},
    "nested": {"modules", "models"},
    "robust": {"ops"},
    "tasks": {"ops", "robust"},
    "decode": {"data", "models", "modules", "ops"},
    "control": {"modules", "ops", "report", "train"},
    "data": set(),
    "optim": {"modules"},
    "report": set(),
    "interop": {"models", "modules", "ops"},
    "train": {"decode", "nested", "tasks", "data", "optim", "models", "modules", "report", "interop"},
    "methods": {"modules", "nested", "robust", "tasks", "train"},
    "bench": {"decode", "ops", "modules", "models", "nested", "tasks", "data", "optim", "report", "train"},
    "search": {"tasks", "train", "nested", "models", "modules", "report"},
}


def imports(path: Path):
    """Yields (module, is at the top level of the file)."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in top


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room):
    for path in (ROOT / "research" / room).rglob("*.py"):
        for module, _ in imports(path):
            assert not module.startswith(("launch", "configs", "tests")), f"{path}: {module}"
            if module.startswith("research.") and module.count("."):
                target = module.split(".")[1]
                assert (
                    target
                    in {room, "errors", "files", "process", "plugins", "seeds", "stopping", "values"} | ALLOWED[room]
                ), f"{path} imports {module}"


def test_every_room_is_listed():
    rooms = {p.name for p in (ROOT / "research").iterdir() if p.is_dir() and list(p.glob("*.py"))}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("path", sorted((ROOT / "research").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_research_neither_prints_nor_parses_flags(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"), (
            f"{path}: print"
        )
    assert not any(module.startswith("absl") for module, _ in imports(path)), f"{path}: absl"


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda p: p.name)
def test_heavy_imports_come_after_the_flags(path):
    heavy = (
        "jax",
        "numpy",
        "grain",
        "orbax",
        "tensorflow_datasets",
        "research.train",
        "research.models",
        "research.data",
        "research.report",
        "research.bench",
    )
    for module, top in imports(path):
        light = module in ("research.train.config", "research.train.fields")
        assert not top or light or not module.startswith(heavy), f"{path} imports {module} before the flags are parsed"


OTHER_LEARNERS = ("configs/control_detour.py",)
"""Recipes that are not of supervised training."""


def recipes():
    for path in sorted((ROOT / "configs").glob("*.py")):
        if f"configs/{path.name}" not in OTHER_LEARNERS:
            yield f"configs/{path.name}"
    yield "configs/imagenet_unireplknet_t.py:sandwich"
    yield "configs/imagenet_unireplknet_t.py:shrunken"
    yield "configs/fashion_unireplknet_sandwich.py:alone=w50_d50"
    yield "configs/counting.py:local"
    for name, args in {
        "shakespeare": ("quick", "large"),
        "mqar": ("128", "published"),
        "selective_copying": ("published",),
        "in_context_linear": ("published",),
        "in_context_boolean": ("dnf-published",),
        "wide_deep": ("8",),
        "mamba_130m": ("mamba2", "shrunken"),
        "pixel_sequences": ("fashion",),
        "domain_encoder": ("dense",),
        "moe_lm": ("dense", "switch", "deepseek_v3", "hash"),
        "fashion_vmoe": ("dense", "soft"),
        "fashion_advmoe": ("dense", "small", "joint"),
        "cifar10_advmoe": ("vgg16", "wrn28_10", "dense"),
    }.items():
        yield from (f"configs/{name}.py:{arg}" for arg in args)


def _images(size, channels, classes):
    return {"image_size": size, "in_channels": channels, "num_classes": classes}


FIELDS = {
    "digits": _images(8, 1, 10),
    "fashion_mnist": _images(28, 1, 10),
    "handwriting": _images(28, 1, 10),
    "counting": {"image_size": 64, "in_channels": 1},
    "tfds:cifar10": _images(32, 3, 10),
    "tfds:imagenet2012": _images(224, 3, 1000),
    "synthetic": _images(64, 3, 10),
    "tiny_shakespeare": {"vocab_size": 65},
    "stdlib_text": {"vocab_size": 256},
    "stdlib_pairs": {"vocab_size": 8192, "length": 32, "domains": 5},
    "token_file": {},
    "probe:mqar": {"vocab_size": 256},
    "probe:selective_copying": {"vocab_size": 16},
    "in_context:linear": {"vocab_size": 0, "input_dim": 5, "outputs": 1},
    "in_context:conjunction": {"vocab_size": 0, "input_dim": 10, "outputs": 1},
    "in_context:dnf": {"vocab_size": 0, "input_dim": 28, "outputs": 1},
}
"""Data set -> fields of the model that the data decide."""


@pytest.mark.parametrize("text", recipes())
def test_recipe_builds_under_eval_shape(text, monkeypatch):
    """Model, space, optimizer and every array's layout are built from the config; no data, no arrays."""
    monkeypatch.chdir(ROOT)
    from research.models import registry
    from research.nested.space import make_space, parse_choices, shrink
    from research.optim.build import make_optimizer
    from research.optim.schedules import make_schedule

    config = recipe.load(text, {})
    data = FIELDS[config["data"]["name"]]
    if config["data"]["augment"].get("sequence"):
        data = {"vocab_size": 0, "input_dim": config["data"]["augment"]["sequence"] ** 2, "outputs": 10}
    fields = {**data, **config["model"]}
    subnet = fields.pop("subnet", "")
    model = registry.model_config(fields.pop("name"), **fields)
    model = shrink(model, parse_choices(subnet)) if subnet else model
    space = make_space(model, config["nested"]["points"])
    full = abstract(space.full)
    schedule = make_schedule(config["optim"]["schedule"], peak=config["optim"]["lr"], total=10)
    optimizer = make_optimizer(config["optim"], schedule, {k: full.axes[k] for k in full.params}, full.kinds)
    state = jax.eval_shape(optimizer.init, dict(full.params))
    assert full.num_params() > 0 and jax.tree.leaves(state)
    for name, small in space.configs.items():
        assert abstract(small).num_params() <= full.num_params(), name


@pytest.mark.parametrize(
    "text",
    [
        t
        for t in recipes()
        if recipe.load(str(ROOT / t), {})["data"]["name"].startswith(
            ("probe:", "in_context:", "digits", "counting", "handwriting")
        )
    ],
)
def test_recipe_s_data_model_and_task_fit(text, monkeypatch):
    """Where the data need no files, all of a run is set up but its programs."""
    monkeypatch.chdir(ROOT)
    from research.train.setup import make_setup

    setup = make_setup(recipe.load(text, {}))
    assert setup.total > 0 and all(
        setup.transform.evaluate(source.gather(np.arange(1))) for source in setup.splits.values()
    )


@pytest.mark.parametrize("text", OTHER_LEARNERS)
def test_recipe_of_another_learner_is_set_up(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    from research.train import learner_registry

    config = recipe.load(text, {})
    learner = learner_registry.make(config, lambda: None, lambda title, seconds: None)
    learner.close()
    assert config["learner"]["name"] != "supervised" and learner.total > 0
    assert jax.tree.leaves(learner.wanted().shapes)


def test_recipe_docstrings_hold_command_and_hardware():
    for path in sorted((ROOT / "configs").glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "python -m launch." in doc and "Hardware:" in doc, path


def test_tests_listed_as_slow_exist():
    lines = [line for line in (ROOT / "tests/slow.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(set(lines))
    for line in lines:
        file, name = line.split("[")[0].split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), line


# getattr and hasattr hide from readers and from type checkers what an object must have: a type says it instead. Of the
# standard library's modules what a platform lacks is asked for so.
PLATFORM = {"os", "signal", "pickle"}
PROBES = {
    "research/__init__.py": (
        "importlib.import_module(_HOMES[name])",
        "names of the package are imported when asked for",
    ),
    "research/bench/tune.py": (
        "importlib.import_module(f'research.bench.{module}')",
        "the function that a table names",
    ),
    "research/modules/state.py": (
        "module, layer, jax.checkpoint_policies, array",
        "callers name methods, as in flax's `apply`; policies are JAX's; of arrays, NumPy's lack what JAX's tell",
    ),
    "research/report/run_card.py": ("value", "a report may hold arrays of any library"),
}
"""File -> (objects that are probed there, why)."""
REWRITTEN = ("research/train/", "research/tasks/", "research/control/")
"""Files that are not held to it, for they are being rewritten."""


@pytest.mark.parametrize("folder", ["research", "launch"])
def test_our_own_objects_are_not_probed(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        known = PLATFORM | set(PROBES.get(name, ("", ""))[0].split(", "))
        found = {
            ast.unparse(node.args[0])
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
        }
        if not name.startswith(REWRITTEN):
            assert found <= known, f"{name} probes {found - known}: give the object a type that says what it has"
            assert set(known) - PLATFORM - {""} <= found, f"{name}: remove what is probed no more from PROBES"
