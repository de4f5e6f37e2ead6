"""Weights of others as values: floating-point numbers that float32 can hold, or an error that names the array."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.errors import UserError
from research.files import printable


def check_values(where: str, arrays: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> None:
    """Refuses weights that no model computes with.

    Args:
      where: what the message calls the source.
      arrays: by name; floating-point numbers, or, for the names in `like`, of the kind of number that it gives.
      like: name -> dtype, of arrays that need not be floating-point.

    Raises:
      UserError: another kind of number (integers, as of a quantised model, or truth values), or NaN, an infinity or a
        number beyond float32; the first three arrays by name, and their number.
    """
    wrong = []
    for name, array in arrays.items():
        values = np.asarray(array)
        wanted = np.dtype((like or {}).get(name, np.float32))
        if not jnp.issubdtype(wanted, jnp.floating):
            if values.dtype != wanted:
                wrong.append(f"{printable(name)} holds {values.dtype}, needs {wanted}")
        elif not jnp.issubdtype(values.dtype, jnp.floating):
            wrong.append(f"{printable(name)} holds {values.dtype}, needs floating-point numbers")
        elif bad := _not_finite(values):
            wrong.append(
                f"{printable(name)} holds {bad:,} of {values.size:,} numbers that are NaN, infinite or beyond float32"
            )
    if wrong:
        raise UserError(f"{where}: {listed(wrong)}")


def listed(items: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3:,} more" if len(items) > 3 else "")


def _not_finite(values: np.ndarray) -> int:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.size - int(np.count_nonzero(np.isfinite(np.asarray(values, np.float32))))
