"""The dilated re-parameterised block of UniRepLKNet (arXiv 2311.15599, section 3.1): a large depthwise kernel
with parallel small dilated ones in training, exactly one kernel after merging.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from research.modules import mesh
from research.modules.axes import Init
from research.modules.layers import DepthwiseConv
from research.modules.norms import BatchNorm
from research.modules.state import Arrays
from research.ops import depthwise, reparam_conv

BRANCHES: dict[int, dict[int, int]] = {
    5: {1: 3, 2: 3},
    7: {1: 5, 2: 3, 3: 3},
    9: {1: 5, 2: 5, 3: 3, 4: 3},
    11: {1: 5, 2: 5, 3: 3, 4: 3, 5: 3},
    13: {1: 5, 2: 7, 3: 3, 4: 3, 5: 3},
    15: {1: 5, 2: 7, 3: 3, 5: 3, 7: 3},
    17: {1: 5, 2: 9, 4: 3, 5: 3, 7: 3},
}
"""Kernel size -> {dilation: branch kernel size}: the released tables."""


def kernel_nests(small: int, large: int) -> bool:
    """True when the block of kernel size `small` is a centre crop of the one of size `large`."""
    if small > large or large not in BRANCHES:
        return small == large
    if small not in BRANCHES:
        return False
    return all(r in BRANCHES[large] and k <= BRANCHES[large][r] for r, k in BRANCHES[small].items())


class DilatedReparam(nnx.Module):
    """sum over branches of BN(depthwise conv); branches are keyed `d1`, `d2`, ... by their dilation."""

    def __init__(self, channels: int, size: int, axis: str, init: Init, *, implementation: str = "auto"):
        self.implementation = implementation
        self.dilations = tuple(BRANCHES[size])
        self.large = DepthwiseConv(channels, size, axis, init.child("large"))
        self.large_norm = BatchNorm(channels, axis, init.child("large_norm"))
        self.branches = nnx.Dict(
            {
                f"d{r}": DepthwiseConv(channels, k, axis, init.child(f"d{r}"), dilation=r)
                for r, k in BRANCHES[size].items()
            }
        )
        self.norms = nnx.Dict({f"d{r}": BatchNorm(channels, axis, init.child(f"norm_d{r}")) for r in self.dilations})

    def __call__(self, x: Float[Array, "B H W C"], *, mode: str) -> Float[Array, "B H W C"]:
        kernels = [self.large.kernel[...]] + [self.branches[f"d{r}"].kernel[...] for r in self.dilations]
        norms = [self.large_norm] + [self.norms[f"d{r}"] for r in self.dilations]
        dilations = (1, *self.dilations)
        if mode == "eval":
            factors, offsets = (jnp.stack(rows) for rows in zip(*(norm.affine() for norm in norms), strict=True))
            if self.implementation == "naive":  # counted and exported as the network is defined, branch by branch
                outs = depthwise.depthwise_conv2d_multi(x, kernels, dilations, implementation="naive")
                return sum(y * f for y, f in zip(outs, factors, strict=True)).astype(x.dtype) + offsets.sum(0).astype(
                    x.dtype
                )
            kernel = reparam_conv.merged_kernel(kernels, dilations, factors)
            convolve = lambda x, kernel, _: depthwise.depthwise_conv2d(x, kernel, implementation=self.implementation)
            return mesh.on_local_shard(convolve, x, kernel) + offsets.sum(0).astype(x.dtype)
        scales = jnp.stack([norm.scale[...] for norm in norms])
        biases = jnp.stack([norm.bias[...] for norm in norms])

        def train(x, whole, axes):
            kernels, scales, biases = whole
            return reparam_conv.reparam_conv(
                x,
                kernels,
                dilations,
                scales,
                biases,
                self.large_norm.eps,
                implementation=self.implementation,
                axis_name=axes,
            )

        y, mean, var = mesh.on_local_shard(train, x, (kernels, scales, biases), results=(True, False, False))
        for i, norm in enumerate(norms):
            norm.observe(mean[i], var[i], mode)
        return y


def batch_norm_affine(params: Arrays, stats: Arrays, prefix: str, eps: float = 1e-5) -> tuple[Array, Array]:
    """Returns (factor, offset) with BN(x) = factor * x + offset under running moments, for the BN at `prefix`."""
    factor = params[f"{prefix}/scale"] / jnp.sqrt(stats[f"{prefix}/var"] + eps)
    return factor, params[f"{prefix}/bias"] - stats[f"{prefix}/mean"] * factor


def merge_dilated_reparam(params: Arrays, stats: Arrays, prefix: str) -> tuple[Array, Array]:
    """Folds the block at `prefix` into one (kernel [*L, K, K, C], bias [*L, C]); valid under running moments."""
    kernel = params[f"{prefix}/large/kernel"]
    factor, offset = batch_norm_affine(params, stats, f"{prefix}/large_norm")
    size = kernel.shape[-2]
    merged, bias = kernel * factor[..., None, None, :], offset
    for dilation in BRANCHES[size]:
        factor, offset = batch_norm_affine(params, stats, f"{prefix}/norms/d{dilation}")
        branch = params[f"{prefix}/branches/d{dilation}/kernel"] * factor[..., None, None, :]
        merged = merged + depthwise.centre_pad_kernel(depthwise.dilate_kernel(branch, dilation), size)
        bias = bias + offset
    return jax.tree.map(jnp.asarray, (merged, bias))
