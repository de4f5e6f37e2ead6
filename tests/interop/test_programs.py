"""Programs of every family: exported with an open batch, they equal the model at any batch; tests are generated from
the registry."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flatbuffers")

from research.errors import UserError
from research.interop.program_inputs import describe, forward, inputs_of, signature
from research.interop.safetensors_io import save_folder
from research.interop.stablehlo import export_stablehlo, load_stablehlo
from research.models import registry
from research.modules.state import abstract
from tests.interop.test_commands import command
from tests.models.twins import distinct_twins, fast_jit, random_arrays, twin

TWINS = {names[0]: config for config, names in distinct_twins().items()}
QUICK = ("mamba_small", "cosformer_small", "advmoe_vgg16", "lenet5")
"""A scan, chunks, routed convolutions and images; the others are slow."""


def values(config, batch, seed=5):
    """Returns inputs of a model, tokens and labels in their ranges."""
    rng = np.random.default_rng(seed)

    def draw(i):
        shape = (batch, *i.shape)
        if i.dtype == "bool":
            return jnp.asarray(rng.random(shape) < 0.7)
        if i.dtype == "int32":
            return jnp.asarray(
                rng.integers(0, config.num_domains if i.name == "domains" else config.vocab_size, shape), jnp.int32
            )
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return [draw(i) for i in inputs_of(config)]


def agrees(config, program, batch):
    """Compares a program with the model, and the dtypes of its arguments with what is said of them."""
    params, stats = random_arrays(config)
    inputs = values(config, batch)
    ours = np.asarray(fast_jit(program.call)(*inputs))
    wanted = np.asarray(fast_jit(forward(config))(params, stats, *inputs))
    assert np.abs(ours - wanted).max() <= 1e-5 * np.abs(wanted).max(), batch
    assert [str(a.dtype) for a in program.in_avals] == [i.dtype for i in inputs_of(config)]


def has_mixture(config):
    return any(name.endswith("/load") for name in abstract(config).stats)


@pytest.mark.slow_unless(*QUICK)
@pytest.mark.parametrize("name", sorted(TWINS))
def test_a_program_with_an_open_batch_is_the_model_at_any(name):
    config = TWINS[name]
    if has_mixture(config) and config.mixture.group_size > 1:
        with pytest.raises(UserError, match="needs to know the number of examples .*--batch=N"):
            export_stablehlo(config, *random_arrays(config))
        return
    program = load_stablehlo(export_stablehlo(config, *random_arrays(config)))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for batch in (1, 3):
        agrees(config, program, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TWINS))
def test_a_program_for_two_examples_is_the_model(name):
    config = TWINS[name]
    agrees(config, load_stablehlo(export_stablehlo(config, *random_arrays(config), batch=2, platforms=("cpu",))), 2)


def test_vectors_in_the_place_of_tokens():
    config = twin("gla_small", vocab_size=0, input_dim=3, output_dim=5)
    program = load_stablehlo(export_stablehlo(config, *random_arrays(config), platforms=("cpu",)))
    agrees(config, program, 2)
    told = describe(config, None)
    assert signature(told) == "logits float32 [batch, 12, 5] = program(vectors float32 [batch, 12, 3])"


def test_what_is_said_of_the_inputs():
    told = describe(twin("encoder_small"), 4)
    assert [(i["name"], i["shape"], i["dtype"]) for i in told["inputs"]] == [
        ("tokens", [4, 12], "int32"),
        ("domains", [4], "int32"),
        ("mask", [4, 12], "bool"),
    ]
    assert told["output"] == {"name": "vectors", "shape": [4, 10], "dtype": "float32"}
    assert (
        signature(describe(twin("lenet5"), None))
        == "logits float32 [batch, 10] = program(images float32 [batch, 28, 28, 1])"
    )


def test_the_weights_are_inside_once():
    config = registry.model_config("mamba_small", vocab_size=2000, dim=64, depth=2)
    params, stats = random_arrays(config)
    size = sum(p.nbytes for p in params.values())
    assert size < len(export_stablehlo(config, params, stats)) < 1.15 * size + 300_000


def test_the_command_writes_what_the_program_asks_for_beside_it(tmp_path):
    config = twin("retention_small")
    params, stats = random_arrays(config)
    save_folder(tmp_path / "model", config, params, stats, {"source": "test"})
    (tmp_path / "m.shlo").write_bytes(b"an older file")
    done = command("export", f"--workdir={tmp_path}/model", "--format=stablehlo", f"--out={tmp_path}/m.shlo")
    assert (done.returncode, done.stderr) == (0, "")
    assert "logits float32 [batch, 12, 10] = program(tokens int32 [batch, 12])" in done.stdout
    data, told = (tmp_path / "m.shlo").read_bytes(), json.loads((tmp_path / "m.shlo.json").read_text())
    assert told["sha256"] == hashlib.sha256(data).hexdigest() and told["inputs"][0]["meaning"].startswith("ids in 0..9")
    assert "preprocessing" not in told
    agrees(config, load_stablehlo(data), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.shlo", "m.shlo.json", "model"]
