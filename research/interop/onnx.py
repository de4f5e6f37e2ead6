"""ONNX export through jax2onnx, which is installed apart (see INSTALL)."""

from collections.abc import Mapping
from typing import Any

from research.errors import UserError
from research.files import printable
from research.interop.program_inputs import forward, inputs_of, output_of

INSTALL = "pip install onnx onnx-ir onnxruntime dm-pix equinox einops && pip install --no-deps jax2onnx==0.17.1"
"""jax2onnx asks for orbax-checkpoint below 0.11.37 but never imports it; without --no-deps pip would take orbax
back."""


def export_onnx(
    config: Any, params: Mapping[str, Any], stats: Mapping[str, Any], *, batch: int | None = None, opset: int = 23
) -> bytes:
    """Returns a serialised ONNX model, logits = f(*inputs), of the model in "eval" mode; inputs carry the names of
    `program_inputs`.

    The naive implementations of the ops are exported: other runtimes know convolutions, not our way around XLA's. A
    scanned stack becomes an ONNX Scan, whose weights are stored once.

    Args:
      config: model config.
      batch: number of examples; None leaves it open.
      opset: version of the ONNX operators.

    Raises:
      UserError: jax2onnx is not installed, the model is too large for one ONNX file, or it holds an op that ONNX lacks.
    """
    try:
        from jax2onnx import to_onnx
    except ImportError as e:
        raise UserError(f"ONNX export needs jax2onnx ({e}): {INSTALL}") from None
    if batch is not None and batch < 1:
        raise UserError(f"cannot export for batches of {batch}; valid: 1 or more, or none to leave it open")
    config = config.with_implementation("naive")
    inputs, call = inputs_of(config), forward(config)
    try:
        model = to_onnx(
            lambda *inputs: call(params, stats, *inputs),
            inputs=[i.struct("batch" if batch is None else batch) for i in inputs],
            model_name=config.family,
            opset=opset,
            input_names=[i.name for i in inputs],
            output_names=[output_of(config)],
        )
    except NotImplementedError as e:
        raise UserError(f"ONNX export: jax2onnx does not know an op of {config.family}: {e}") from None
    except Exception as e:  # jax2onnx, JAX and Python each raise their own where a symbol is no number
        if batch is not None:
            raise
        reason = printable(str(e).split("\n")[0], 120)
        raise UserError(
            f"ONNX export: {config.family} cannot leave the number of examples open ({reason}); give it: --batch=N"
        ) from None
    try:
        return model.SerializeToString()
    except ValueError as e:
        raise UserError(
            f"ONNX export: the model does not fit one file of 2 GB ({e}); export stablehlo or safetensors"
        ) from None
