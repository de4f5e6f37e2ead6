"""What configs of models with mixtures of experts declare: their options, places in the log, similarity of experts."""

import jax
import jax.numpy as jnp
import pytest

from research.models import registry
from research.models.sequence import SequenceConfig
from research.models.vit import ViTConfig
from research.modules.moe import MoeFfn
from research.modules.moe_options import Moe, mixture_of
from research.modules.moe_similarity import similarity
from research.modules.state import abstract, initialize

SPARSE = SequenceConfig(pattern="hgrn", ffn="moe glu", depth=6, dim=16, moe=Moe(num_experts=4))
IMAGES = ViTConfig(
    dim=16,
    depth=4,
    num_heads=2,
    head_dim=8,
    patch_size=4,
    image_size=8,
    num_classes=3,
    ffn="mlp moe",
    moe=Moe(num_experts=4),
)


def test_labels_follow_the_order_of_the_layers():
    (path,) = abstract(SPARSE).modules_of(MoeFfn)
    assert path == "blocks/layer/layers/0/ffn"
    assert SPARSE.layer_labels(path, (3,)) == ["layer0", "layer2", "layer4"]
    assert SPARSE.layer_labels("norm") == ["norm"]
    assert registry.model_config("lenet5").layer_labels("head", (2,)) == ["head[0]", "head[1]"]


def test_mixtures_are_found_by_their_module_and_their_options_are_told():
    assert mixture_of(SPARSE) == Moe(num_experts=4, ffn_dim=SPARSE.ffn_dim // 2)
    dense = SequenceConfig(pattern="hgrn", ffn="glu", dim=16)
    assert mixture_of(dense) is None and abstract(dense).modules_of(MoeFfn) == []
    assert mixture_of(registry.model_config("lenet5")) is None


@pytest.mark.parametrize("config", [SPARSE, IMAGES], ids=["sequence", "vit"])
def test_an_evaluation_logs_how_alike_the_experts_of_each_layer_are(config):
    params, stats = jax.jit(lambda key: initialize(config, key))(jax.random.key(0))
    (path,) = abstract(config).modules_of(MoeFfn)
    params[f"{path}/up"] = params[f"{path}/up"].at[1].set(params[f"{path}/up"][1, :1])  # all of the second are one
    found = config.observations(params, stats)
    kernels = {k: params[f"{path}/{k}"] for k in ("up", "gate", "down") if f"{path}/{k}" in params}
    labels = config.layer_labels(path, (len(params[f"{path}/up"]),))
    assert labels[:2] == (["layer0", "layer2"] if config is SPARSE else ["layer1", "layer3"])
    expected = dict(zip(labels, similarity(kernels).tolist(), strict=True))
    assert found == {f"experts/{layer}/similarity": pytest.approx(v, abs=1e-6) for layer, v in expected.items()}
    assert expected[labels[1]] > 0.3 > 0.1 > abs(expected[labels[0]])


def test_a_network_without_mixtures_has_nothing_to_tell():
    config = SequenceConfig(pattern="hgrn", ffn="glu", dim=16, depth=2)
    assert config.observations(*initialize(config, jax.random.key(0))) == {}
    lenet = registry.model_config("lenet5")
    assert lenet.observations({"x": jnp.ones(1)}, {}) == {}
