"""`load_splits(name)` gives train, validation and test of a named data set.

The validation split is cut from the training data; the test split is read as it is and never touched by anything else.
"""

import inspect
from collections.abc import Callable
from typing import Any

from research import seeds
from research.data.kinds import Kind
from research.data.registry import find
from research.data.source import Source
from research.data.splits import stratified_split
from research.errors import UserError
from research.values import fit_options


def load_splits(
    name: str,
    *,
    data_dir: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> dict[str, Source]:
    """The splits 'train', 'validation' and 'test' of a named data set.

    Args:
      name: one of those that are registered, e.g. `digits`, `fashion_mnist`, `arrays`, `tfds:NAME` (images); `text`,
        `token_file`, `probe:KIND` (tokens); `in_context:TASK` (vectors); `stdlib_pairs`, `text_pairs` (pairs of texts).
      data_dir: where the files lie, for the data sets that are read from files.
      validation_fraction: of images, the part of the training data held out for validation, stratified by class; 0 for
        none. The other data sets have splits of their own, as have `arrays` that hold validation examples.
      seed: keys the choice of the validation examples. The test split does not depend on it.
      **options: options of that data set; an unknown one is an error that lists the valid ones.

    Raises:
      UserError: unknown name or option, missing or damaged files, or a fraction outside [0, 1), or a seed out of range.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"validation_fraction={validation_fraction} is not in [0, 1): "
            "give the part of the training data to hold out."
        )
    found, positional = find(name)
    loader = found.loader
    options = _typed_options(name, loader, options)
    seeds.check(seed, "data.options.seed")
    takes = inspect.signature(loader).parameters
    place = {
        key: value for key, value in {"data_dir": data_dir, "seed": seed}.items() if key in takes and key not in options
    }
    if found.ready:
        splits: dict[str, Source] = loader(*positional, **place, **options)
        return _checked(name, splits)
    train, *own, test = loader(*positional, **place, **options)
    _checked(name, {"train": train, "test": test})
    if own:
        return _checked(name, {"train": train, "validation": own[0], "test": test})
    held_out = round(validation_fraction * len(train))
    kept, held = stratified_split(train.labels, held_out, seed)
    if len(kept) == 0:
        raise UserError(
            f"{name}: no training example is left of {len(train)} with validation_fraction={validation_fraction}; "
            "lower it."
        )
    return {
        "train": train.subset(kept, f"{name}/train"),
        "validation": train.subset(held, f"{name}/validation"),
        "test": test,
    }


def kind_of_examples(name: str) -> Kind:
    """Returns what the examples of a named data set are, without reading any.

    Raises:
      UserError: an unknown name.
    """
    return find(name)[0].examples


def settings_read(name: str) -> tuple[str, ...]:
    """Returns which of data.dir, data.validation_fraction and data.augment a named data set goes by.

    Raises:
      UserError: an unknown name.
    """
    found, _ = find(name)
    files = ("data.dir",) if "data_dir" in inspect.signature(found.loader).parameters else ()
    whole = () if found.ready else ("data.validation_fraction",)
    return (*files, *whole, *(("data.augment",) if found.examples.augmented else ()))


def _checked(name: str, splits: dict[str, Source]) -> dict[str, Source]:
    """Returns the sources of a data set if that is what they are."""
    for source in splits.values():
        if not isinstance(source, Source):
            raise UserError(
                f"data set {name}: {type(source).__name__} is no source; derive it from research.data.source.Source"
            )
    return splits


def _typed_options(name: str, loader: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options with the types that the loader's annotations ask for."""
    parameters = inspect.signature(loader).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "data_dir"]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)  # it checks the rest itself
    for option in options:
        if option not in valid and not open_ended:
            raise UserError(f"Data set {name!r} has no option {option!r}. Valid: {', '.join(valid) or 'none'}.")
    return fit_options(options, loader, "data.options.")
