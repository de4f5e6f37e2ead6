"""Any single wrong value of any field of any family is refused in a line, or gives a model that can be built: never a
traceback."""

import dataclasses

import pytest

from research.errors import UserError
from research.models import registry

VALUES = (
    -1,
    0,
    7,
    10**9 + 7,
    10**30,
    0.3,
    -0.5,
    1e30,
    float("nan"),
    "",
    "x",
    "no",
    None,
    True,
    (),
    (1,),
    (0, 0),
    (3, 3, 3, 3),
    ((3,),),
    {},
    {"a": 1},
)
FAMILIES = {registry.entry(name).config.family: name for name in reversed(registry.list_models())}


def attempts(name, values):
    entry = registry.entry(name)
    for field in dataclasses.fields(registry.model_config(name, **entry.tiny)):
        for value in values:
            yield {**entry.tiny, field.name: value}, field.name


def judged(name, fields, field, build):
    try:
        model = registry.model_config(name, **fields)
        if build:
            registry.check_buildable(model, name, fields)
    except UserError as error:
        assert str(error).count("\n") <= 1, (field, str(error))


@pytest.mark.parametrize("name", FAMILIES.values())
def test_a_wrong_field_is_no_traceback(name):
    for fields, field in attempts(name, VALUES):
        judged(name, fields, field, build=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.values())
def test_a_wrong_field_is_no_traceback_of_what_builds(name):
    for fields, field in attempts(name, (0, 7, -0.5, "x", (), (1,), (0, 0))):
        judged(name, fields, field, build=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dims": 3.7}, "model.dims=3.7; valid: a list of whole numbers"),
        ({"dims": ("x", 8)}, "model.dims="),
        ({"layer_scale_init_value": "x"}, "model.layer_scale_init_value='x'; valid: a number"),
        ({"depths": (10**5,) * 4}, "valid: a list of whole numbers from 1 up to 9,999"),
        ({"drop_path_rate": 1.5}, "model.drop_path_rate=1.5; valid: a number from 0 below 1"),
        ({"unroll": "maybe"}, "model.unroll='maybe'; valid: True or False"),
    ],
)
def test_types_of_fields_come_from_their_annotations(fields, words):
    with pytest.raises(UserError) as caught:
        registry.model_config("unireplknet_a", **fields)
    assert words in str(caught.value)
    assert registry.model_config("unireplknet_a", unroll="yes").unroll is True
