"""A mixture of feed-forward experts over tokens whose choice is made: dropless, with places, in slots, and as defined.

    y[t] = sum_i weights[t, i] * ffn(x[t], kernels of experts[t, i])

Kernels are {"up": [E, D, F], "down": [E, F, D]} and, for gated linear units, "gate": [E, D, F]: down(act(gate x) * up
x) or down(act(up x)); "up_bias" [E, F] and "down_bias" [E, D] are added where they are given. An expert E (one beyond
the last) stands for none. Activations take k rows per token, or E C rows, whatever E is.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.ops import checks
from research.ops.grouped_matmul import grouped_matmul, permute, sort_by_group, unpermute

Kernels = Mapping[str, Array]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


Affine = Callable[[Array, Array, Array | None], Array]
"""(rows, kernels, biases or None) -> the products of rows with the kernel of their expert, plus its bias."""


def _ffn(x: Array, kernels: Kernels, activation: str, affine: Affine) -> Array:
    up = affine(x, kernels["up"], kernels.get("up_bias"))
    hidden = (
        ACTIVATIONS[activation](affine(x, kernels["gate"], None)) * up
        if "gate" in kernels
        else ACTIVATIONS[activation](up)
    )
    return affine(hidden, kernels["down"], kernels.get("down_bias"))


def _in_rows(
    x: Float[Array, "#E C I"], kernel: Float[Array, "E I O"], bias: Float[Array, "E O"] | None
) -> Float[Array, "E C O"]:
    y = jnp.matmul(x, kernel)
    return y if bias is None else y + bias[:, None]


def _grouped(counts: Int[Array, " E"], implementation: str) -> Affine:
    def affine(
        x: Float[Array, "P I"], kernel: Float[Array, "E I O"], bias: Float[Array, "E O"] | None
    ) -> Float[Array, "P O"]:
        if (
            bias is not None
        ):  # as the kernel of a feature that is always 1: picking a bias for each row would have a scattered gradient
            x = jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], 1)
            kernel = jnp.concatenate([kernel, bias[:, None]], 1)
        return grouped_matmul(x, kernel, counts, implementation=implementation, partial=True)

    return affine


def _check(op: str, x: Array, kernels: Kernels, activation: str, **more) -> dict:
    checks.require(activation in ACTIVATIONS, op, "activation", repr(activation), ", ".join(ACTIVATIONS))
    patterns = {"up": "E D F", "gate": "E D F", "down": "E F D", "up_bias": "E F", "down_bias": "E D"}
    arrays = {name: (kernels.get(name), patterns[name]) for name in patterns}
    return checks.shapes(op, x=(x, "E C D" if x.ndim == 3 else "T D"), **arrays, **more)


def combine_matrix(
    experts: Int[Array, "*G T k"], weights: Float[Array, "*G T k"], num_experts: int
) -> Float[Array, "*G T E"]:
    """Returns the weight that each token gives to each expert."""
    return (weights[..., None] * jax.nn.one_hot(experts, num_experts, dtype=weights.dtype)).sum(-2)


def every_expert(
    x: Float[Array, "T D"], combine: Float[Array, "T E"], kernels: Kernels, *, activation: str = "silu"
) -> Float[Array, "T D"]:
    """The definition, sum over all experts of combine[t, e] ffn_e(x[t]): E times the work.

    Raises:
      ValueError: when shapes do not fit or the activation is unknown.
    """
    _check("every_expert", x, kernels, activation, combine=(combine, "T E"))
    outputs = _ffn(x[None], kernels, activation, _in_rows)
    return jnp.einsum("te,etd->td", combine, outputs).astype(x.dtype)


def dropless(
    x: Float[Array, "T D"],
    experts: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    kernels: Kernels,
    *,
    activation: str = "silu",
    implementation: str = "auto",
    axis: str | None = None,
) -> Float[Array, "T D"]:
    """Every choice is computed: (token, choice) pairs are sorted by expert and multiplied group by group.

    Args:
      x: tokens.
      experts: k of each token; E for none.
      weights: of the outputs.
      kernels: of all experts.
      activation: silu, gelu or relu.
      implementation: of `grouped_matmul`.
      axis: mesh axis over which the experts lie, inside a `shard_map`: `x` holds the tokens of this device, `kernels`
        its experts. The tokens of the axis are gathered, each device computes what goes to its own experts, and the
        sums are scattered back.

    Returns:
      y in the dtype of x; the sum over choices is taken in the dtype of `weights`.

    Raises:
      ValueError: when shapes do not fit or the activation is unknown.

    Source: MegaBlocks (Gale et al. 2022, arXiv 2211.15841), section 5.
    """
    sizes = _check("dropless", x, kernels, activation, experts=(experts, "T k"), weights=(weights, "T k"))
    num_experts = sizes["E"]
    if axis is not None:
        gather = lambda a: lax.all_gather(a, axis, tiled=True)
        own = gather(experts) - lax.axis_index(axis) * num_experts
        own = jnp.where((own >= 0) & (own < num_experts), own, num_experts)
        y = dropless(gather(x), own, gather(weights), kernels, activation=activation, implementation=implementation)
        return lax.psum_scatter(y, axis, tiled=True)
    permutation, inverse, counts = sort_by_group(experts, num_experts + 1)
    rows = permute(x, permutation, inverse)
    rows = _ffn(rows, kernels, activation, _grouped(counts[:num_experts], implementation))
    return _weighted(unpermute(rows, permutation, inverse), weights).astype(x.dtype)


def _weighted(pairs: Float[Array, "P D"], weights: Float[Array, "T k"]) -> Float[Array, "T D"]:
    return (pairs.reshape(*weights.shape, -1) * weights[..., None]).sum(1)


def with_places(
    x: Float[Array, "T D"],
    experts: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    places: Int[Array, "T k"],
    capacity: int,
    kernels: Kernels,
    *,
    activation: str = "silu",
    axis: str | None = None,
) -> Float[Array, "T D"]:
    """Every expert computes `capacity` rows; pairs whose place in its queue lies beyond are dropped and add nothing.

    Args:
      x, experts, weights, kernels, activation: as in `dropless`.
      places: of each pair, from `research.ops.routing.places`.
      capacity: rows of each expert, C.
      axis: mesh axis over which the experts lie, inside a `shard_map`: `x` and `places` are of the tokens of this
        device, each of which sends C rows to every expert; rows and outputs are exchanged all to all.

    Raises:
      ValueError: when shapes do not fit or the activation is unknown.
    """
    of = dict(experts=(experts, "T k"), weights=(weights, "T k"), places=(places, "T k"))
    num_experts = _check("with_places", x, kernels, activation, **of)["E"] * (
        1 if axis is None else lax.axis_size(axis)
    )
    num_slots = num_experts * capacity
    kept = (places < capacity) & (experts < num_experts)
    slot_of_pair = jnp.where(kept, experts * capacity + places, num_slots).reshape(-1)
    pairs = jnp.arange(experts.size, dtype=jnp.int32)
    pair_in_slot = (
        jnp.full(num_slots, experts.size, jnp.int32).at[slot_of_pair].set(pairs, mode="drop", unique_indices=True)
    )
    rows = permute(x, pair_in_slot, slot_of_pair, partial=True).reshape(num_experts, capacity, -1)
    rows = in_slots(rows, kernels, activation=activation, axis=axis).reshape(num_slots, -1)
    return _weighted(unpermute(rows, pair_in_slot, slot_of_pair, partial=True), weights).astype(x.dtype)


def in_slots(
    rows: Float[Array, "E C D"], kernels: Kernels, *, activation: str = "silu", axis: str | None = None
) -> Float[Array, "E C D"]:
    """Returns ffn_e of the rows of each expert e: what soft slots and expert choice compute once their rows are
    gathered.

    Args:
      rows, kernels, activation: as in `dropless`, C rows for each expert.
      axis: mesh axis over which the experts lie, inside a `shard_map`: `rows` are of this device's tokens, for all
        experts, and are exchanged all to all, there and back.

    Raises:
      ValueError: when shapes do not fit or the activation is unknown.
    """
    if axis is not None:  # [E, C, D] of one device's tokens to [E / devices, devices C, D] of one's experts
        rows = lax.all_to_all(rows, axis, 0, 1, tiled=True)
    _check("in_slots", rows, kernels, activation)
    rows = _ffn(rows, kernels, activation, _in_rows)
    return rows if axis is None else lax.all_to_all(rows, axis, 1, 0, tiled=True)


def chosen_by_experts(
    x: Float[Array, "G T D"],
    tokens: Int[Array, "G E C"],
    weights: Float[Array, "G E C"],
    kernels: Kernels,
    *,
    activation: str = "silu",
    axis: str | None = None,
) -> Float[Array, "G T D"]:
    """Every expert computes the tokens that it took of each group; a token gets the weighted sum of those that took it,
    zero from none.

    Args:
      x, kernels, activation: as in `dropless`, in groups.
      tokens, weights: of each group and expert, from `research.ops.expert_routing.expert_choice`.
      axis: as in `in_slots`.

    Raises:
      ValueError: when shapes do not fit or the activation is unknown.
    """
    checks.shapes("chosen_by_experts", x=(x, "G T D"), tokens=(tokens, "G E C"), weights=(weights, "G E C"))
    groups, experts, places = tokens.shape
    rows = jax.vmap(lambda x, tokens: x[tokens])(x, tokens)
    rows = in_slots(
        rows.swapaxes(0, 1).reshape(experts, groups * places, -1), kernels, activation=activation, axis=axis
    )
    rows = rows.reshape(experts, groups, places, -1).swapaxes(0, 1) * weights[..., None]
    add = lambda tokens, rows: jnp.zeros((x.shape[1], rows.shape[-1]), rows.dtype).at[tokens].add(rows)
    return jax.vmap(add)(tokens, rows).astype(x.dtype)
