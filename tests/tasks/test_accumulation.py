"""The microbatches of a batch add up to the batch: losses, distillation and what is logged, for every task, by the
weight that it gives each microbatch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import registry
from research.tasks.base import Example
from research.tasks.classification import Classification
from research.tasks.contrastive import Contrastive
from research.tasks.density import DensityCounting
from research.tasks.in_context import InContextLearning
from research.tasks.language import LanguageModelling
from research.train.method_registry import make

RNG = np.random.default_rng(0)
SIZE, PARTS = 6, 3


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def labels_of_unequal_documents():
    """Two examples of a part are labelled throughout, two at one token, two at a few."""
    labels = RNG.integers(0, 7, (SIZE, 9))
    labels[2:4, 1:] = -1
    labels[4:, 4:] = -1
    return jnp.asarray(labels)


def prompts(targets):
    """A curriculum scores the first prefixes only, here more of them in some prompts."""
    return {
        "vectors": normal(SIZE, 10, 2),
        "targets": jnp.asarray(targets).at[:2, 2:].set(np.nan).at[3, 4:].set(np.nan),
    }


IMAGES = {
    "image": jnp.asarray(RNG.random((SIZE, 4, 4, 1)), jnp.float32),
    "label": jnp.asarray(RNG.integers(0, 5, SIZE)),
}
DENSITY = {"image": normal(SIZE, 48, 48, 1), "density": jnp.asarray(RNG.random((SIZE, 48, 48)) / 100, jnp.float32)}
LABELS = labels_of_unequal_documents()
CASES = {
    "classification": (Classification(5, label_smoothing=0.1), IMAGES, (5,)),
    "language": (LanguageModelling(), {"tokens": LABELS, "labels": LABELS}, (9, 7)),
    "regression": (InContextLearning(5), prompts(normal(SIZE, 5)), (10, 1)),
    "boolean": (InContextLearning(5, boolean=True, scored_from=1), prompts(jnp.sign(normal(SIZE, 5))), (10, 1)),
    "density": (DensityCounting(local=0.5), DENSITY, (48, 48, 8)),
}


def parts(tree):
    size = SIZE // PARTS
    return [jax.tree.map(lambda a, start=start: a[start : start + size], tree) for start in range(0, SIZE, size)]


def shares(task, batch):
    weights = [task.weight(part) for part in parts(batch)]
    return [1 / PARTS] * PARTS if weights[0] is None else [float(w / sum(weights)) for w in weights]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_logs_of_the_parts_add_up(name):
    task, batch, shape = CASES[name]
    outputs, teacher = normal(SIZE, *shape), normal(SIZE, *shape)

    def numbers(outputs, teacher, batch):
        target = task.prepare(batch, jax.random.key(0))[1]
        own = {"loss": task.loss(outputs, target), "distill": task.distill(outputs, teacher, target)}
        return own | task.measure(outputs, batch)

    whole = numbers(outputs, teacher, batch)
    several = [numbers(*part) for part in parts((outputs, teacher, batch))]
    for key, value in whole.items():
        found = sum(share * float(part[key]) for share, part in zip(shares(task, batch), several, strict=True))
        np.testing.assert_allclose(found, value, rtol=2e-6, err_msg=key)
    assert not task.indivisible and len(whole) > 2


@pytest.mark.parametrize("name", ["pgd", "trades"])
def test_objectives_of_robust_training_add_up(name, monkeypatch):
    """The attack that the parts draw for themselves is left out: it differs like any other draw."""
    monkeypatch.setattr(f"research.methods.{name}.pgd", lambda loss, image, key, **how: jnp.clip(image + 0.1, 0, 1))
    method, kernel = make(name, {"steps": 1}), normal(16, 5)
    task = method.wrapped(Classification(5), resnet)
    objective = method.objective(task.objective, task)
    model = lambda x, **how: x.reshape(len(x), -1) @ kernel

    def numbers(batch):
        inputs, target = task.prepare(batch, jax.random.key(0))
        outcome = objective(model, Example(batch, inputs, target, None, "all", jax.random.key(1)))
        return {"loss": outcome.loss, **outcome.measured}

    several = [numbers(part) for part in parts(IMAGES)]
    for key, value in numbers(IMAGES).items():
        np.testing.assert_allclose(sum(float(part[key]) for part in several) / PARTS, value, rtol=2e-6, err_msg=key)
    assert task.weight(IMAGES) is None and not task.indivisible


resnet = registry.model_config("resnet18")


def test_a_contrastive_batch_cannot_be_cut():
    assert "fewer of them" in Contrastive().indivisible


def test_what_is_not_scored_does_not_teach():
    """Distillation divides by what the loss divides by, and so do the logs."""
    task, batch, shape = CASES["regression"]
    mine, teacher = normal(SIZE, *shape), normal(SIZE, *shape)
    scored = ~np.isnan(np.asarray(batch["targets"]))
    distances = np.square(np.asarray(mine - teacher)[:, ::2, 0])
    np.testing.assert_allclose(task.distill(mine, teacher, batch["targets"]), distances[scored].mean(), rtol=1e-5)
