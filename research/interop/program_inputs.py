"""What an exported program asks for: the names, shapes and dtypes of a model's inputs, and the function of them that is
exported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from research.models.encoder import EncoderConfig
from research.models.sequence import SequenceConfig
from research.modules.state import abstract, apply


@dataclass(frozen=True)
class Input:
    """One argument of a program; `shape` without the axis of the examples, which comes first."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str

    def struct(self, batch: Any) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype for so many examples, a number or a symbol."""
        return jax.ShapeDtypeStruct((batch, *self.shape), np.dtype(self.dtype))

    def to_json(self, batch: int | None) -> dict[str, Any]:
        """Returns plain data; an open axis is called "batch"."""
        return {
            "name": self.name,
            "shape": ["batch" if batch is None else batch, *self.shape],
            "dtype": self.dtype,
            "meaning": self.meaning,
        }


def inputs_of(config: Any) -> tuple[Input, ...]:
    """Returns the inputs of a model, in the order of the program's arguments."""
    shape = config.input_shape()
    if isinstance(config, EncoderConfig):
        return (
            Input("tokens", shape, "int32", f"ids in 0..{config.vocab_size - 1}; the first of a sentence is not read"),
            Input("domains", (), "int32", f"of each sentence, in 0..{config.num_domains - 1}"),
            Input("mask", shape, "bool", "true where a token is real, false where it fills up"),
        )
    if isinstance(config, SequenceConfig):
        if config.vector_tokens:
            return (Input("vectors", shape, "float32", "tokens as vectors"),)
        return (
            Input(
                "tokens",
                shape,
                "int32",
                f"ids in 0..{config.vocab_size - 1}; shorter texts are filled up behind their end",
            ),
        )
    return (Input("images", shape, "float32", "height, width, channels"),)


def output_of(config: Any) -> str:
    """Returns the name of what the program returns."""
    return "vectors" if isinstance(config, EncoderConfig) else "logits"


def forward(config: Any) -> Callable[..., Array]:
    """Returns f(params, stats, *inputs), the model in "eval" mode."""
    return lambda params, stats, *inputs: apply(config, params, stats, *inputs)[0]


def describe(config: Any, batch: int | None, preprocessing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns what FILE.json says of a program: family, inputs in the order of the arguments, output, and preprocessing
    where it is known."""
    inputs, full = inputs_of(config), abstract(config)
    out = jax.eval_shape(forward(config), dict(full.params), dict(full.stats), *(i.struct(batch or 1) for i in inputs))
    output = {
        "name": output_of(config),
        "shape": ["batch" if batch is None else batch, *out.shape[1:]],
        "dtype": str(out.dtype),
    }
    told = {} if preprocessing is None else {"preprocessing": dict(preprocessing)}
    return {"family": config.family, "inputs": [i.to_json(batch) for i in inputs], "output": output, **told}


def signature(told: Mapping[str, Any]) -> str:
    """Returns one line for people from what `describe` returns."""
    say = lambda array: f"{array['name']} {array['dtype']} [{', '.join(map(str, array['shape']))}]"
    return f"{say(told['output'])} = program({', '.join(map(say, told['inputs']))})"
