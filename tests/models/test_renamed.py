"""Options under the names that they had in earlier versions: what was saved opens, what a user writes is refused."""

import dataclasses
import json
import re
import warnings

import pytest

from research.errors import Notice, UserError
from research.interop.safetensors_io import config_from_json, config_to_json
from research.models import registry
from research.modules import renamed
from research.modules.mixers.base import known
from research.modules.renamed import Renamed
from research.train.upgrade import upgraded


def families():
    """One model of every family; the sequence models hold the options of every mixer."""
    return {registry.entry(name).config.family: name for name in registry.list_models()}


def former_names(config, group=()):
    """(group, former, present) of every option of a config that was renamed, those of groups inside included."""
    for former, present in type(config).former().items():
        yield group, former, present
    for field in dataclasses.fields(config):
        if isinstance(inner := vars(config)[field.name], Renamed):
            yield from former_names(inner, (*group, field.name))


def within(fields, group):
    """The innermost of nested dictionaries that lies at `group`."""
    for name in group:
        fields = fields[name]
    return fields


@pytest.fixture(autouse=True)
def told_again():
    renamed._tell.cache_clear()


def test_every_mixer_and_mixture_is_among_them():
    groups = {group for group, _, _ in former_names(registry.entry(families()["sequence"]).config)}
    assert groups >= {(kind,) for kind, spec in known().items() if spec.former()} | {("moe",)} and len(groups) > 10


@pytest.mark.parametrize("family", families())
def test_former_names_are_no_fields_and_present_ones_are(family):
    for kind in (type(registry.entry(families()[family]).config), *known().values()):
        fields = {field.name for field in dataclasses.fields(kind)}
        assert fields.isdisjoint(kind.former()) and fields.issuperset(kind.former().values()), kind


@pytest.mark.parametrize("family", families())
def test_saved_models_open_and_the_names_are_told(family):
    config = registry.model_config(families()[family], **registry.entry(families()[family]).tiny)
    for group, former, present in former_names(config):
        saved = json.loads(json.dumps(config_to_json(config)))
        options = within(saved, group)
        options[former] = options.pop(present)
        told = f"{'.'.join((*group, former))} is {'.'.join((*group, present))}"
        with pytest.warns(Notice, match=re.escape(told)):
            assert config_from_json(saved) == config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize("family", families())
def test_configs_of_saved_runs_open_and_recipes_are_told_the_name(family):
    name = families()[family]
    for group, former, present in former_names(registry.entry(name).config):
        value = within(json.loads(json.dumps(config_to_json(registry.entry(name).config))), group)[present]
        fields = {former: value}
        for inner in reversed(group):
            fields = {inner: fields}
        with pytest.warns(Notice, match=f"{former} is .*{present}"):
            opened = upgraded({"model": {"name": name, "subnet": "", **fields}})["model"]
        assert within(opened, group) == {present: value} | ({} if group else {"name": name, "subnet": ""})
        place = ".".join(("model", *group, ""))
        with pytest.raises(UserError, match=f"^{re.escape(f'{place}{former} is called {place}{present} now')}$"):
            registry.model_config(name, **fields)


def test_a_run_of_a_model_that_is_not_there_keeps_its_fields():
    assert upgraded({"model": {"name": "nosuchmodel", "heads": 3}})["model"] == {"name": "nosuchmodel", "heads": 3}
