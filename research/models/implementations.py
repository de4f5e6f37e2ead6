"""The config field `implementation` of the models: which implementation of its ops a network takes, checked where it is
set."""

from collections.abc import Mapping, Sequence

from research.errors import UserError
from research.ops import dispatch


def on_cpu(implementation: str) -> str:
    """The implementation to run with on a CPU: what is left to the platform is chosen for it at once, which halves
    tracing."""
    if implementation == "auto":
        return "cpu"
    entries = [entry.strip() for entry in implementation.split(",")]
    return f"{implementation}, cpu" if all("=" in entry for entry in entries) else implementation


def check_implementation(family: str, implementation: str, ops: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError unless every op of the model can take what `implementation` asks of it.

    Args:
      family: name for the message.
      implementation: "auto", "cpu", an implementation that all of the ops have, or a list such as
        "depthwise_conv2d=dft,cpu"; see `ops.dispatch.resolve`.
      ops: name of each op to its implementations.
    """
    named = [entry.split("=")[0].strip() for entry in implementation.split(",") if "=" in entry]
    unknown = [name for name in named if name not in ops]
    if unknown:
        raise UserError(f"{family}: implementation={implementation!r} names {unknown[0]!r}; its ops: {', '.join(ops)}")
    try:
        for op, valid in ops.items():
            dispatch.resolve(implementation, op, valid)
    except ValueError as error:
        raise UserError(f"{family}: {error}") from None
