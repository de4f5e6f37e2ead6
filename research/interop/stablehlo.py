"""Compiled-program export through `jax.export`: one file with the network for several platforms, run without its source."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from research.errors import UserError
from research.modules.state import apply

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_stablehlo(
    config: Any,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    *,
    batch: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    weights: str = "constants",
) -> bytes:
    """Returns a serialised program, logits = f(images), of the model in "eval" mode.

    Args:
      config: model config with `input_shape()`; its deployed form runs fastest.
      batch: number of examples; None leaves it open until the program is called.
      platforms: what it may be called on; each gets its own form of the ops.
      weights: "constants" puts them inside; "arguments" exports f(params, stats, images) instead.

    Raises:
      UserError: a platform, a batch or a place for the weights that does not exist.
    """
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise UserError(f"cannot export for {', '.join(unknown) or 'no platform'}; valid: {', '.join(PLATFORMS)}")
    if batch is not None and batch < 1:
        raise UserError(f"cannot export for batches of {batch}; valid: 1 or more, or none to leave it open")
    if weights not in ("constants", "arguments"):
        raise UserError(f"cannot export weights as {weights!r}; valid: constants, arguments")
    size = export.symbolic_shape("batch")[0] if batch is None else batch
    x = jax.ShapeDtypeStruct((size, *config.input_shape()), jnp.float32)
    params, stats = jax.tree.map(jnp.asarray, (dict(params), dict(stats)))
    if weights == "constants":
        exported = export.export(jax.jit(lambda x: apply(config, params, stats, x)[0]), platforms=tuple(platforms))(x)
    else:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, stats))
        exported = export.export(jax.jit(lambda p, s, x: apply(config, p, s, x)[0]), platforms=tuple(platforms))(*shapes, x)
    try:
        return bytes(exported.serialize())
    except ImportError:
        raise UserError("StableHLO export needs flatbuffers: pip install flatbuffers") from None


def load_stablehlo(data: bytes) -> export.Exported:
    """Returns the program that `export_stablehlo` serialised; `load_stablehlo(data).call(images)` runs it.

    Raises:
      UserError: the bytes are no such program.
    """
    try:
        return export.deserialize(bytearray(data))
    except ImportError:
        raise UserError("StableHLO import needs flatbuffers: pip install flatbuffers") from None
    except Exception as e:  # noqa: BLE001  (flatbuffers and MLIR each raise their own)
        raise UserError(f"not a program exported by jax.export: {type(e).__name__}: {str(e)[:100]}") from None
