"""Attacks in the ball max|x' - x| <= epsilon on images in [0, 1]: PGD, APGD, and the worst of several.

A model is a function `f(x) -> logits` whose examples do not see one another (batch norm in eval mode). Everything is
pure and runs under jit; loops are `lax` loops, so that compiling takes as long for 100 steps as for 2.
"""

import itertools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.errors import UserError
from research.robust.losses import cross_entropy, dlr, targeted_dlr

Images = Float[Array, "B *S"]
Model = Callable[[Images], Float[Array, "B N"]]


def project(attacked: Images, x: Images, epsilon: float) -> Images:
    """Returns the nearest point of the ball around x that lies in [0, 1]."""
    return jnp.clip(jnp.clip(attacked, x - epsilon, x + epsilon), 0.0, 1.0)


def pgd(
    loss: Callable[[Images], Float[Array, "..."]],
    x: Images,
    key: Array,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    noise: float = 0.0,
) -> Images:
    """Projected gradient ascent by signs: x' <- project(x' + step_size sign grad loss(x')).

    Args:
      loss: of x', one number or one per example, to be made large.
      x: images in [0, 1].
      key: of the start.
      epsilon: radius; steps, step_size: of the ascent.
      noise: the start is x + noise * N(0, 1), as in TRADES (0.001); 0: uniform in the ball.

    Returns:
      x', without a gradient.

    Source: Madry et al. 2018, arXiv 1706.06083, section 2.1.
    """
    draw = (
        jax.random.normal(key, x.shape) * noise
        if noise
        else jax.random.uniform(key, x.shape, minval=-epsilon, maxval=epsilon)
    )
    gradient = jax.grad(lambda attacked: loss(attacked).sum())

    def step(_, attacked):
        return project(attacked + step_size * jnp.sign(gradient(attacked)), x, epsilon)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, project(x + draw.astype(x.dtype), x, epsilon)))


def checkpoints(steps: int) -> list[int]:
    """Returns where APGD may halve its step: ceil(p_j * steps) with p_0 = 0, p_1 = .22 and gaps that shrink by .03 down
    to .06."""
    places, before, now = [0], 0.0, 0.22
    while now <= 1:
        places.append(int(np.ceil(now * steps - 1e-9)))
        before, now = now, now + max(now - before - 0.03, 0.06)
    return sorted({place for place in places if place < steps})


def apgd(
    f: Model,
    x: Images,
    label: Int[Array, " B"],
    key: Array,
    *,
    epsilon: float,
    steps: int,
    loss: Callable[[Array, Array], Float[Array, " B"]] = cross_entropy,
) -> Images:
    """Auto-PGD: steps of size 2 epsilon with momentum, halved per example where progress stalls, each time from the
    best point so far.

    Args:
      f: the model.
      x: images in [0, 1].
      label: their classes.
      key: of the random start.
      epsilon: radius.
      steps: evaluations of the gradient, 1 at least.
      loss: of (logits, label), one number per example.

    Returns:
      For each image the last point on the way that is misclassified, else that of the largest loss.

    Source: Croce and Hein 2020, arXiv 2003.01690, algorithm 1 (momentum .75, rho .75).
    """

    def evaluate(attacked):
        def total(attacked):
            logits = f(attacked)
            values = loss(logits, label)
            return values.sum(), (values, logits.argmax(-1) != label)

        gradient, (values, fooled) = jax.grad(total, has_aux=True)(attacked)
        return gradient, values, fooled

    draw = jax.random.uniform(key, x.shape, minval=-1.0, maxval=1.0)
    draw = draw / jnp.abs(draw).max(tuple(range(1, x.ndim)), keepdims=True)
    start = project(x + (epsilon * draw).astype(x.dtype), x, epsilon)
    step = lambda state, at: (_advance(state, at, evaluate, x, epsilon), None)
    gradient, values, fooled = evaluate(start)
    state, _ = jax.lax.scan(step, _initial(start, gradient, values, fooled, epsilon), _schedule(steps))
    return jax.lax.stop_gradient(_where(state["fooled"], state["found"], state["best"]))


def _where(condition: Bool[Array, " B"], yes: Images, no: Images) -> Images:
    """Chooses among whole images."""
    return jnp.where(condition.reshape(-1, *(1,) * (yes.ndim - 1)), yes, no)


def _initial(start: Array, gradient: Array, values: Array, fooled: Array, epsilon: float) -> dict[str, Array]:
    """What APGD knows of each image: points with their gradients, values of the loss, and what happened since the last
    checkpoint."""
    return {
        "x": start,
        "before": start,
        "gradient": gradient,
        "value": values,
        "best": start,
        "best_gradient": gradient,
        "best_value": values,
        "found": start,
        "fooled": fooled,
        "size": jnp.full(len(start), 2 * epsilon, start.dtype),
        "rises": jnp.zeros(len(start), jnp.int32),
        "halved": jnp.ones(len(start), bool),
        "checked_value": values,
    }


def _advance(
    state: dict[str, Array], at: tuple[Array, Array, Array], evaluate: Callable, x: Images, epsilon: float
) -> dict[str, Array]:
    """One step; `at` is its index, whether a checkpoint ends it, and how many steps that one looks back on."""
    k, halve, window = at
    point, size = state["x"], state["size"].reshape(-1, *(1,) * (x.ndim - 1))
    forward = project(point + size * jnp.sign(state["gradient"]), x, epsilon)
    momentum = jnp.where(k == 0, 1.0, 0.75).astype(x.dtype)
    moved = project(point + momentum * (forward - point) + (1 - momentum) * (point - state["before"]), x, epsilon)
    gradient, values, fooled = evaluate(moved)
    better = values > state["best_value"]
    best = {
        "before": point,
        "best": _where(better, moved, state["best"]),
        "best_gradient": _where(better, gradient, state["best_gradient"]),
        "best_value": jnp.where(better, values, state["best_value"]),
        "found": _where(fooled, moved, state["found"]),
        "fooled": state["fooled"] | fooled,
    }
    rises = state["rises"] + (values > state["value"])
    # Two signs of stalling: few steps rose, or neither the step size nor the best value has changed since the last
    # checkpoint.
    stuck = ~state["halved"] & (best["best_value"] <= state["checked_value"])
    stall = halve & ((rises < 0.75 * window) | stuck)
    return best | {
        "x": _where(stall, best["best"], moved),
        "gradient": _where(stall, best["best_gradient"], gradient),
        "value": jnp.where(stall, best["best_value"], values),
        "size": jnp.where(stall, state["size"] / 2, state["size"]),
        "rises": jnp.where(halve, 0, rises),
        "halved": jnp.where(halve, stall, state["halved"]),
        "checked_value": jnp.where(halve, best["best_value"], state["checked_value"]),
    }


def _schedule(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each step: its index, whether a checkpoint ends it, and how many steps that one looks back on."""
    places = checkpoints(steps)
    halve, window = np.zeros(steps, bool), np.ones(steps, np.float32)
    for before, now in itertools.pairwise(places):
        halve[now - 1], window[now - 1] = True, now - before
    return np.arange(steps), halve, window


def apgd_targeted(
    f: Model, x: Images, label: Int[Array, " B"], key: Array, *, epsilon: float, steps: int, goals: int = 9
) -> Images:
    """APGD on the targeted DLR loss towards each of the likeliest wrong classes in turn (APGD-T of AutoAttack: 9
    goals).

    Arguments and result as in `apgd`; four classes at least, and more than `goals` are not tried than there are wrong
    ones.
    """
    logits = f(x)
    order = jnp.argsort(jnp.where(jax.nn.one_hot(label, logits.shape[-1], dtype=bool), jnp.inf, -logits), axis=-1)
    attack = lambda goal: (
        lambda k: apgd(f, x, label, k, epsilon=epsilon, steps=steps, loss=lambda z, y: targeted_dlr(z, y, goal))
    )
    return worst(f, x, label, key, [attack(order[:, i]) for i in range(min(goals, logits.shape[-1] - 1))])


def worst(
    f: Model, x: Images, label: Int[Array, " B"], key: Array, attacks: Sequence[Callable[[Array], Images]]
) -> Images:
    """Returns for each image the first attack's result that is misclassified, else the last one's: the ensemble's worst
    case."""
    chosen, fooled = x, jnp.zeros(len(x), bool)
    for i, attack in enumerate(attacks):
        attacked = attack(jax.random.fold_in(key, i))
        chosen = _where(fooled, chosen, attacked)
        fooled = fooled | (f(attacked).argmax(-1) != label)
    return chosen


# --- by name ----------------------------------------------------------------------------------------------------------

NAMES = ("pgdN", "apgd_ce", "apgd_dlr", "apgd_t", "apgd")
PARTS = {"apgd": ("apgd_ce", "apgd_dlr")}
"""Ensemble -> the attacks whose worst case it is."""


def check_attacks(names: Sequence[str], where: str) -> None:
    """Raises UserError for a name that no attack has."""
    for name in names:
        if not re.fullmatch(r"pgd[1-9]\d*", name) and name not in NAMES[1:]:
            raise UserError(f"{where}: unknown attack {name!r}; valid: {', '.join(NAMES)} (N steps, e.g. pgd20)")


def attack(
    name: str, f: Model, x: Images, label: Int[Array, " B"], key: Array, *, epsilon: float, steps: int
) -> Images:
    """Returns x' under an attack by name.

    Args:
      name: "pgdN" (cross entropy, N steps of epsilon / 4 from a uniform start), "apgd_ce", "apgd_dlr", "apgd_t"
        (targeted DLR), or "apgd", the worst of the first two.
      steps: of each APGD; AutoAttack takes 100.
    """
    if name.startswith("pgd"):
        loss = lambda attacked: cross_entropy(f(attacked), label)
        return pgd(loss, x, key, epsilon=epsilon, steps=int(name[3:]), step_size=epsilon / 4)
    if name == "apgd_t":
        return apgd_targeted(f, x, label, key, epsilon=epsilon, steps=steps)
    losses: dict[str, list[Callable[..., Array]]] = {
        "apgd_ce": [cross_entropy],
        "apgd_dlr": [dlr],
        "apgd": [cross_entropy, dlr],
    }
    run = lambda loss: lambda k: apgd(f, x, label, k, epsilon=epsilon, steps=steps, loss=loss)
    return worst(f, x, label, key, [run(loss) for loss in losses[name]])


def is_correct(
    name: str, f: Model, x: Images, label: Int[Array, " B"], key: Array, *, epsilon: float, steps: int
) -> Bool[Array, " B"]:
    """Returns which images are classified rightly both as they are and under the attack (see `attack`)."""
    attacked = attack(name, f, x, label, key, epsilon=epsilon, steps=steps)
    return (f(x).argmax(-1) == label) & (f(attacked).argmax(-1) == label)
