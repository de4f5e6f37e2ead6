"""Compiled-program export through `jax.export`: one file with the network for several platforms, run without its
source.

Where the batch is left open, ops whose programs are cut for a number of rows take an implementation that is not: on a
CPU grouped products of mixtures of experts then compute every row with every expert, so a fixed batch is quicker.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.errors import InconclusiveDimensionOperation

from research.errors import UserError
from research.interop.program_inputs import forward, inputs_of

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
    """Returns a serialised program, logits = f(*inputs), of the model in "eval" mode.

    Args:
      config: model config; its deployed form runs fastest. What its inputs are says `program_inputs.inputs_of`.
      batch: number of examples; None leaves it open until the program is called.
      platforms: what it may be called on; each gets its own implementation of the ops.
      weights: "constants" puts them inside; "arguments" exports f(params, stats, *inputs) instead.

    Raises:
      UserError: a platform, a batch or a place for the weights that does not exist, or a model whose program needs to
        know the batch.
    """
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise UserError(f"cannot export for {', '.join(unknown) or 'no platform'}; valid: {', '.join(PLATFORMS)}")
    if batch is not None and batch < 1:
        raise UserError(f"cannot export for batches of {batch}; valid: 1 or more, or none to leave it open")
    if weights not in ("constants", "arguments"):
        raise UserError(f"cannot export weights as {weights!r}; valid: constants, arguments")
    size = export.symbolic_shape("batch")[0] if batch is None else batch  # one symbol for all inputs
    inputs = [i.struct(size) for i in inputs_of(config)]
    params, stats = jax.tree.map(jnp.asarray, (dict(params), dict(stats)))
    call = forward(config)
    if weights == "constants":
        exported = _export(config, lambda *inputs: call(params, stats, *inputs), platforms, inputs)
    else:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, stats))
        exported = _export(config, call, platforms, [*shapes, *inputs])
    try:
        return bytes(exported.serialize())
    except ImportError:
        raise UserError("StableHLO export needs flatbuffers: pip install flatbuffers") from None


def _export(config: Any, call: Callable[..., Any], platforms: Sequence[str], inputs: Sequence[Any]) -> export.Exported:
    try:
        return export.export(jax.jit(call), platforms=tuple(platforms))(*inputs)
    except (InconclusiveDimensionOperation, TypeError) as error:
        if isinstance(error, TypeError) and "_DimExpr" not in str(
            error
        ):  # what Python says where a symbol cannot be a number
            raise
        reason = str(error).split(".")[0].split("\n")[0]
        raise UserError(
            f"{config.family}: an op needs to know the number of examples ({reason}); give it: --batch=N"
        ) from None


def load_stablehlo(data: bytes) -> export.Exported:
    """Returns the program that `export_stablehlo` serialised; `load_stablehlo(data).call(*inputs)` runs it.

    Raises:
      UserError: the bytes are no such program.
    """
    try:
        return export.deserialize(bytearray(data))
    except ImportError:
        raise UserError("StableHLO import needs flatbuffers: pip install flatbuffers") from None
    except Exception as e:  # flatbuffers and MLIR each raise their own
        raise UserError(f"not a program exported by jax.export: {type(e).__name__}: {str(e)[:100]}") from None
