"""What the families share to make sub-networks: rounding of widths, kept layers, errors about the space."""

from collections.abc import Sequence

from research.errors import UserError


def scaled(size: int, fraction: float, multiple: int, name: str) -> int:
    """Returns `size * fraction` rounded to a multiple of `multiple`, at least one multiple, at most `size`."""
    check_fraction(fraction, name)
    return min(size, max(multiple, int(size * fraction / multiple + 0.5) * multiple))


def check_fraction(value, name: str) -> float:
    """Raises UserError unless `value` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UserError(f"sub-network {name}={value} is outside its space; valid: a fraction in (0, 1]")
    return float(value)


def kept_layers(current: Sequence[int], count: int, keep: str) -> tuple[int, ...]:
    """Returns `count` of the layers `current`: the first ones, or evenly spaced (DynaBERT: floor(i * n / count)).

    Args:
      current: indices, in the full model, of the layers at hand.
      count: how many stay, 1 to len(current).
      keep: "first" or "even".
    """
    if keep == "first":
        return tuple(current[:count])
    if keep == "even":
        return tuple(current[i * len(current) // count] for i in range(count))
    raise UserError(f"unknown way to keep layers {keep!r}; valid: first, even")


def depth_count(value, size: int, multiple: int, name: str) -> int:
    """Returns how many of `size` layers stay: a float is a fraction (rounded half up), an int a number of layers."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 < value <= size or value % multiple:
            raise UserError(
                f"sub-network {name}={value} is outside its space; valid: multiples of {multiple} up to {size}"
            )
        return value
    fraction = check_fraction(value, name)
    units = size // multiple
    return multiple * max(1, min(units, int(units * fraction + 0.5)))


def count(value, size: int, name: str, follow: float = 1.0) -> int:
    """Returns how many of `size` things stay: a fraction, a whole number, or None for the fraction `follow`."""
    return depth_count(float(follow) if value is None else value, size, 1, name)


def per_stage(value, stages: int, name: str) -> tuple:
    """Spreads one choice over all stages; a tuple must have one entry per stage."""
    if not isinstance(value, tuple | list):
        return (value,) * stages
    if len(value) != stages:
        given = ":".join(map(str, value))
        raise UserError(
            f"sub-network {name}={given} has {len(value)} entries; valid: one number, or {stages} joined by ':'"
        )
    return tuple(value)


def check_choices(choices: dict, valid: dict[str, str]) -> None:
    """Raises UserError when a choice names a dimension that the family does not have."""
    unknown = sorted(set(choices) - set(valid))
    if unknown:
        listed = "; ".join(f"{k}: {v}" for k, v in valid.items())
        raise UserError(f"unknown sub-network dimension {unknown[0]!r}; valid: {listed}")
