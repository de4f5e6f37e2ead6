"""The rules of the codebase: imports point one way, research/ neither prints nor parses flags, every recipe builds."""

import ast
import graphlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.modules.state import abstract
from tests import import_graph, text_pairs

ROOT = Path(__file__).parents[1]

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
    "methods": {"models", "modules", "nested", "optim", "report", "robust", "tasks", "train"},
    "bench": {"decode", "ops", "modules", "models", "nested", "tasks", "data", "optim", "report", "train"},
    "search": {"tasks", "train", "nested", "models", "modules", "report"},
}
"""Package of research/ -> packages that it may import beside itself and `EVERYWHERE`."""
EVERYWHERE = {"errors", "files", "process", "plugins", "sections", "seeds", "stopping", "values"}


def packages_imported(package: str) -> dict[str, str]:
    """Returns the packages that a package imports, in functions too -> a file that does."""
    return {
        module.split(".")[1]: str(path.relative_to(ROOT))
        for own, path in import_graph.FILES.items()
        if own.startswith(f"research.{package}.") or own == f"research.{package}"
        for module in import_graph.imports(path, late=True)
        if module.startswith("research.")
    }


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package):
    beyond = {
        target: path
        for target, path in packages_imported(package).items()
        if target not in {package} | EVERYWHERE | ALLOWED[package]
    }
    assert not beyond


def test_training_knows_no_method():
    assert not packages_imported("train").keys() & {"methods", "robust", "search"}


def test_research_imports_no_command_recipe_or_test():
    for own, path in import_graph.FILES.items():
        if own.startswith("research"):
            for module in import_graph.imports(path, late=True):
                assert module.split(".")[0] not in ("launch", "configs", "tests"), f"{path}: {module}"


def test_every_package_is_listed_and_the_map_says_the_same():
    packages = {p.name for p in (ROOT / "research").iterdir() if p.is_dir() and list(p.glob("*.py"))}
    assert packages == set(ALLOWED)
    rows = re.findall(r"^\| `research/(\w+)/` \|.*\| ([^|]+) \|$", (ROOT / "WORKSPACE.md").read_text(), re.MULTILINE)
    assert {package for package, _ in rows} == packages
    for package, text in rows:
        named = set(re.findall(r"\w+", text))
        if named <= packages:  # others say "all of the above" or "below"
            assert named == ALLOWED[package], package


TYPES_ONLY = {
    "research.train.method": {"research.train.evaluation"},  # an Evaluation is given the Evaluator, which knows the run
}
"""Imports for type checkers alone that close a circle: module -> (what it names; why)."""


@pytest.mark.parametrize("late", [False, True], ids=["at the start", "also in functions"])
def test_no_module_imports_itself_in_a_circle(late):
    graph = import_graph.graph(late=late)
    for module, named in TYPES_ONLY.items():
        assert named <= graph[module], f"{module}: remove what it imports no more from TYPES_ONLY"
        assert not named & set(import_graph.imports(import_graph.FILES[module], late=True, types=False))
        graph[module] -= named
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", sorted((ROOT / "research").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_research_neither_prints_nor_parses_flags(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"), (
            f"{path}: print"
        )
    assert not any(module.startswith("absl") for module in import_graph.imports(path, late=True)), f"{path}: absl"


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
    for module in import_graph.imports(path, late=False):
        light = module in ("research.train.config", "research.train.sections")
        assert light or not module.startswith(heavy), f"{path} imports {module} before the flags are parsed"


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


STAND_INS = {
    "fashion_mnist": ("synthetic", {"image_size": 28, "channels": 1}),
    "tfds:cifar10": ("synthetic", {"image_size": 32}),
    "tfds:imagenet2012": ("synthetic", {"image_size": 256, "examples": 64, "test_examples": 16}),
    "tiny_shakespeare": ("stdlib_text", {"max_bytes": 100_000}),
    "stdlib_text": ("stdlib_text", {"max_bytes": 100_000}),
    "stdlib_pairs": ("text_pairs", {}),
    "token_file": ("probe:mqar", {"pairs": 2, "train_examples": 64, "test_examples": 16}),
}
"""Data set that is large or needs files -> one of the same kind that does not, and its options."""


@pytest.mark.parametrize("text", list(recipes()))
def test_recipe_builds(text, monkeypatch, tmp_path):
    """All of a run is set up but its programs, on one device; then every array is laid out, none is made."""
    monkeypatch.chdir(ROOT)
    from research.train.build import make_programs
    from research.train.setup import make_setup

    config = recipe.load(text, {})
    if stand_in := STAND_INS.get(config["data"]["name"]):
        name, options = stand_in
        kept = {} if name == "synthetic" else config["data"]["options"]
        config["data"] |= {"name": name, "options": {**kept, **options}, "dir": text_pairs.write(tmp_path, 64)}
        config["train"]["duration"] = "1000"
    config["mesh"] |= {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, "context": 1}
    setup = make_setup(config)
    state = make_programs(setup).shapes
    sizes = {name: abstract(small).num_params() for name, small in setup.space.configs.items()}
    assert sum(p.size for p in state.params.values()) == sizes["full"] == max(sizes.values()) > 0
    assert jax.tree.leaves(state.opt_state) and setup.total > 0
    for source in setup.splits.values():
        if len(source):
            setup.transform.evaluate(source.gather(np.arange(1)))


@pytest.mark.parametrize("text", OTHER_LEARNERS)
def test_recipe_of_another_learner_is_set_up(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    from research.train import learner_registry
    from research.train.sections import RunConfig

    config = recipe.load(text, {})
    learner = learner_registry.make(RunConfig.of(config), lambda: None, lambda title, seconds: None)
    learner.close()
    assert config["learner"]["name"] != "supervised" and learner.total > 0
    assert jax.tree.leaves(learner.wanted().shapes)


def test_recipe_docstrings_hold_command_and_hardware():
    for path in sorted((ROOT / "configs").glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "python -m launch." in doc and "Hardware:" in doc, path


# getattr and hasattr hide from readers and from type checkers what an object must have: a type says it instead. Of the
# standard library's modules what a platform lacks is asked for so.
PLATFORM = {"os", "signal", "pickle"}
PROBES = {
    "research/__init__.py": (
        "importlib.import_module(_HOMES[name])",
        "names of the package are imported when asked for",
    ),
    "research/modules/state.py": (
        "module, layer, jax.checkpoint_policies, array",
        "callers name methods, as in flax's `apply`; policies are JAX's; of arrays, NumPy's lack what JAX's tell",
    ),
    "research/train/sharding.py": ("d", "JAX's CPU devices lack what those of TPU slices have"),
    "research/report/run_card.py": ("value", "a report may hold arrays of any library"),
}
"""File -> (objects that are probed there, why)."""


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
        assert found <= known, f"{name} probes {found - known}: give the object a type that says what it has"
        assert set(known) - PLATFORM - {""} <= found, f"{name}: remove what is probed no more from PROBES"


def test_files_of_the_harness_are_short():
    lengths = {path.name: path.read_text().count("\n") for path in (ROOT / "research/train").glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 300} == {}
