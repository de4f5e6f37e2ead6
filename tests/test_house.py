"""The rules of the house: imports point one way, research/ neither prints nor parses flags, every recipe builds."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import config as recipe
from research.modules.state import abstract
from tests import text_pairs

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
    "control": {"modules", "ops"},
    "data": set(),
    "optim": {"modules"},
    "report": set(),
    "interop": {"models", "modules", "ops"},
    "train": {"decode", "nested", "tasks", "robust", "data", "optim", "models", "modules", "report", "interop"},
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


def recipes():
    for path in sorted((ROOT / "configs").glob("*.py")):
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


@pytest.mark.parametrize("text", recipes())
def test_recipe_builds(text, monkeypatch, tmp_path):
    """All of a run is set up but its programs, on one device; then every array is laid out, none is made."""
    monkeypatch.chdir(ROOT)
    from research.train.setup import make_programs, make_setup

    config = recipe.load(text, {})
    if stand_in := STAND_INS.get(config["data"]["name"]):
        name, options = stand_in
        kept = {} if name == "synthetic" else config["data"]["options"]
        config["data"] |= {"name": name, "options": {**kept, **options}, "dir": text_pairs.write(tmp_path, 64)}
        config["train"]["duration"] = "1000"
    config["mesh"] |= {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, "context": 1}
    setup = make_setup(config)
    state = make_programs(setup).state_shapes
    sizes = {name: abstract(small).num_params() for name, small in setup.space.configs.items()}
    assert sum(p.size for p in state.params.values()) == sizes["full"] == max(sizes.values()) > 0
    assert jax.tree.leaves(state.opt_state) and setup.total > 0
    for source in setup.splits.values():
        if len(source):
            setup.transform.evaluate(source.gather(np.arange(1)))


def test_recipe_docstrings_hold_command_and_hardware():
    for path in sorted((ROOT / "configs").glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert "python -m launch." in doc and "Hardware:" in doc, path
