"""Durations of a run: 500 or "500" (updates), "10ep" (epochs), "50000ex" (examples), "5%" (of the run)."""

import math
import re

from research.errors import UserError


def to_steps(
    value: int | float | str, *, batch_size: int, num_examples: int, total: int | None, field: str, phases: float = 1
) -> int:
    """Converts a duration to a number of updates.

    Args:
      value: the duration; 0 means never.
      batch_size: examples per update.
      num_examples: examples per epoch.
      total: updates of the whole run, for percentages.
      field: config field, for the message.
      phases: updates that a batch of examples gets, the mean.

    Raises:
      UserError: a text that is no duration, or a percentage of an unknown whole.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ep|ex|%|)\s*", str(value))
    if not match:
        raise UserError(f"{field}={value!r} is not a duration; write 500, '10ep', '50000ex' or '5%'")
    number, unit = float(match[1]), match[2]
    if unit == "":
        return int(number)
    if unit == "%" and total is None:
        raise UserError(f"{field}={value!r}: a percentage needs the length of the run; write updates, 'ep' or 'ex'")
    steps = {"ep": number * num_examples / batch_size, "ex": number / batch_size, "%": number / 100 * (total or 0)}[
        unit
    ]
    steps = max(1, math.ceil(steps - 1e-9)) if number else 0
    return steps if unit == "%" else math.ceil(steps * phases - 1e-9)
