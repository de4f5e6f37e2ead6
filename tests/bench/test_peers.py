"""What stands beside ours computes the same: outputs and gradients of the ops, loss and gradients of the language
models."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.bench import attention_cases, depthwise_cases, language_models, models
from research.bench.case import BOTH, FORWARD, Case

torch = pytest.importorskip("torch")


def agree(ours, theirs, turned=lambda x: x, tolerance=1e-4):
    ours, theirs = np.asarray(ours), turned(theirs.detach().numpy())
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= tolerance * np.abs(ours).max()


def both(case: Case, peer: str = "torch"):
    inputs = case.inputs()
    return case.contenders["ours"](*inputs).call(), case.peers[peer](*inputs).call()


def test_depthwise_conv2d():
    (y, (dx, dk)), (y_, (dx_, dk_)) = both(depthwise_cases._conv2d(2, 10, 6, 5, BOTH))
    channels_last = lambda a: a.transpose(0, 2, 3, 1)
    agree(y, y_, channels_last)
    agree(dx, dx_, channels_last)
    agree(dk, dk_, lambda a: a[:, 0].transpose(1, 2, 0))
    agree(*both(depthwise_cases._conv2d(2, 10, 6, 5, FORWARD)), channels_last)


def test_depthwise_conv1d():
    (y, (dx, dk)), (y_, (dx_, dk_)) = both(depthwise_cases._conv1d(2, 30, 6, 4, BOTH))
    agree(y, y_, lambda a: a.transpose(0, 2, 1))
    agree(dx, dx_, lambda a: a.transpose(0, 2, 1))
    agree(dk, dk_, lambda a: a[:, 0].T)


def test_attention():
    (y, grads), (y_, grads_) = both(attention_cases._attention(100, BOTH))
    for ours, theirs in zip((y, *grads), (y_, *grads_), strict=True):
        agree(ours, theirs, lambda a: a.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_language_models_have_the_same_loss_and_gradients(name):
    pytest.importorskip("transformers")
    state = {"mamba": 4, "mamba2": 8}[name]
    sizes = language_models.Sizes(vocab=32, width=16, layers=2, state=state, heads=4, batch=2, length=23)
    case = language_models.case(name, sizes, BOTH)
    (loss, grads), (loss_, grads_) = both(case, "transformers")
    agree(loss, loss_)
    assert {f"backbone.{key}" for key in grads} == set(grads_)
    for key, grad in grads.items():
        agree(grad, grads_[f"backbone.{key}"], tolerance=1e-3)
    agree(*both(language_models.case(name, sizes, FORWARD), "transformers"))


def test_gated_linear_attention_is_timed_beside_mamba2_of_about_equal_size():
    pytest.importorskip("transformers")
    case = language_models.gla_cases({})[1]
    ours, theirs = both(case, "transformers")
    count = lambda arrays: sum(a.size if hasattr(a, "dtype") and not torch.is_tensor(a) else a.numel() for a in arrays)
    assert 0.9 < count(ours[1].values()) / count(theirs[1].values()) < 1.1
    assert np.isfinite(float(ours[0]))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("NESTAX_UNIREPLKNET"), reason="NESTAX_UNIREPLKNET=PATH/unireplknet.py names no official file"
)
def test_training_steps_start_from_about_the_same_loss():
    case = models.training_step("unireplknet_a", os.environ["NESTAX_UNIREPLKNET"], 4, 32)
    inputs = case.inputs()
    expected = np.log(models.CLASSES)  # both heads start near zero
    for peer in case.peers.values():
        call = peer(*inputs).call
        first, second = float(call().detach()), float(call().detach())
        assert abs(first - expected) < 0.5 and second != first
    state, images, labels = jax.tree.map(jnp.asarray, inputs)
    call = case.contenders["ours"](state, images, labels).call
    first, second = float(call()[1]), float(call()[1])
    assert abs(first - expected) < 0.5 and second != first
