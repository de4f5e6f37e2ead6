"""Selection of the best sub-network under budgets of parameters, FLOPs and measured latency."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import UserError

BUDGETS = {
    "max_params": "params",
    "max_flops": "flops",
    "max_latency_ms": "latency_ms",
    "max_memory_bytes": "peak_memory_bytes",
}
"""Flag -> column of a row of costs."""


def select(
    rows: Sequence[Mapping[str, Any]],
    value_key: str,
    budgets: Mapping[str, float | None],
    *,
    higher_is_better: bool = True,
) -> Mapping[str, Any]:
    """Returns the row with the best value whose costs are within all budgets; ties go to fewer FLOPs.

    Args:
      rows: one per network, with costs and the value under `value_key` (of validation data, never of test data).
      value_key: what is to be large (or small).
      budgets: a key of BUDGETS -> limit, None = no limit.
      higher_is_better: False for losses and errors.

    Raises:
      UserError: nothing fits; the message names the cheapest network for each budget.
    """
    limits = {BUDGETS[k]: v for k, v in budgets.items() if v is not None}
    for column in limits:
        if any(row.get(column) is None for row in rows):
            raise UserError(f"{column} was not measured for every network")
    fitting = [row for row in rows if all(row[c] <= limit for c, limit in limits.items())]
    if not fitting:
        least = ", ".join(f"{c} from {min(row[c] for row in rows):,.4g}" for c in limits)
        raise UserError(f"no network fits the budget; they need {least}")
    sign = 1 if higher_is_better else -1
    return max(fitting, key=lambda row: (sign * row[value_key], -row.get("flops", math.inf)))
