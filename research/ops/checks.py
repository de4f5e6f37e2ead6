"""Shape checks of the ops: one mechanism, errors that name the op, the argument, its shape and what was expected."""

from typing import Any


def shapes(op: str, **arguments: tuple[Any, str]) -> dict[str, Any]:
    """Binds the letters of shape patterns to sizes and checks that all arguments agree.

    Args:
      op: name for the message.
      arguments: name = (array, pattern), e.g. `k=(k, "*B T H K")`. A letter stands for one size, the same in all
        patterns; a number stands for itself; `*B` at the start for any leading axes. Arguments that are None are passed
        over.

    Returns:
      Letter to size; "*B" to the tuple of leading sizes.

    Raises:
      ValueError: naming the op, the argument, its shape and the shape that the arguments before it ask for.
    """
    bound: dict[str, Any] = {}
    for name, (array, pattern) in arguments.items():
        if array is None:
            continue
        letters, shape = pattern.split(), tuple(array.shape)
        leading = letters[0] if letters[0].startswith("*") else None
        letters = letters[1:] if leading else letters
        split = len(shape) - len(letters)
        fits = split >= 0 if leading else split == 0
        if fits and leading:
            fits = bound.setdefault(leading, shape[:split]) == shape[:split]
        for letter, size in zip(letters, shape[split:] if fits else (), strict=fits):
            fits = fits and (int(letter) if letter.isdigit() else bound.setdefault(letter, size)) == size
        if not fits:
            wanted = [str(bound.get(letter, letter)) for letter in letters]
            if leading:
                wanted = [*map(str, bound[leading]), *wanted] if leading in bound else ["...", *wanted]
            raise ValueError(f"{op}: {name} has shape {shape}; expected [{pattern}] = ({', '.join(wanted)})")
    return bound


def require(condition: bool, op: str, argument: str, value: Any, expected: str) -> None:
    """Raises ValueError(`op: argument is value; expected ...`) unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {argument} is {value}; expected {expected}")
