"""The config field `form` of the models: which form of its ops a network takes, checked where it is set."""

from collections.abc import Mapping, Sequence

from research.errors import UserError
from research.ops import dispatch


def on_cpu(form: str) -> str:
    """The form to run with on a CPU: what is left to the platform is chosen for it at once, which halves tracing."""
    if form == "auto":
        return "cpu"
    entries = [entry.strip() for entry in form.split(",")]
    return f"{form}, cpu" if all("=" in entry for entry in entries) else form


def check_form(family: str, form: str, ops: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError unless every op of the model can take what `form` asks of it.

    Args:
      family: name for the message.
      form: "auto", "cpu", a form that all of the ops have, or a list such as "depthwise_conv2d=dft,cpu"; see
        `ops.dispatch.resolve`.
      ops: name of each op to its forms.
    """
    named = [entry.split("=")[0].strip() for entry in form.split(",") if "=" in entry]
    unknown = [name for name in named if name not in ops]
    if unknown:
        raise UserError(f"{family}: form={form!r} names {unknown[0]!r}; its ops: {', '.join(ops)}")
    try:
        for op, valid in ops.items():
            dispatch.resolve(form, op, valid)
    except ValueError as error:
        raise UserError(f"{family}: {error}") from None
