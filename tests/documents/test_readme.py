"""The README is one page, and its tables list what the registries hold; so do the tables of optimizers, data sets and
axis roles, and the citation."""

import dataclasses
import fnmatch
import re

import yaml

import research
from research.data import registry as registry_of_data
from research.models import registry
from research.models.sequence import SequenceConfig
from research.modules.axes import ROLES
from research.nested.slicing import CUTS
from research.optim.registry import known as known_optimizers
from research.train.method_registry import known
from research.train.sharding import RULES
from tests.documents.pages import ROOT, rows

README = (ROOT / "README.md").read_text()
CONCEPTS = (ROOT / "docs/concepts.md").read_text()


def test_it_is_one_page():
    assert README.count("\n") <= 150


def test_models_and_their_papers():
    names, listed = registry.list_models(), []
    for _, patterns, paper in rows(README, "| architecture |"):
        found = [n for pattern in re.findall(r"`(.+?)`", patterns) for n in fnmatch.filter(names, pattern)]
        assert found and {registry.entry(n).paper for n in found} == {paper}, patterns
        listed += found
    small = [f"{kind}_small" for kind in SequenceConfig.specs()]
    assert sorted(listed + small) == names


def test_mixers_and_their_papers():
    listed = {cells[0].strip("`"): cells[2] for cells in rows(README, "| mixer |")}
    assert listed == {kind: spec.paper for kind, spec in SequenceConfig.specs().items()}


def known_methods():
    """The project's own: other tests register methods in the same process."""
    return {name: method for name, method in known().items() if method.__module__.startswith("research.methods.")}


def test_training_methods_and_their_papers():
    listed = {cells[0].strip("`"): cells[2] for cells in rows(README, "| method |")}
    assert listed == {name: method.paper for name, method in known_methods().items()}


def test_training_methods_and_their_options():
    """Of each the file, and its options with their defaults."""
    listed = {cells[0].strip("`"): cells for cells in rows(CONCEPTS, "| method |")}
    methods = known_methods()
    assert list(listed) == list(methods)
    for name, (_, source, options, _) in listed.items():
        file = methods[name].__module__.rpartition(".")[2]
        assert source == f"[{file}.py](../research/methods/{file}.py)"
        fields = {field.name: field.default for field in dataclasses.fields(methods[name])}
        named = re.findall(r"`(\w+)` ([^,;]+)", options)
        assert {field for field, _ in named} == set(fields), name
        for field, default in named:
            value = fields[field]
            shown = ",".join(value) if isinstance(value, tuple) else str(value) or "empty"
            assert default in (shown, f"{255 * value:g}/255" if isinstance(value, float) else shown), (name, field)


def test_optimizers_and_their_constants():
    listed = rows((ROOT / "docs/optimizers.md").read_text(), "| name |")
    expected = [
        [
            f"`{key}`",
            "-" if own.lr is None else f"{own.lr:g}",
            f"{own.weight_decay:g}",
            ", ".join(f"{name} {value}" for name, value in {**own.constants, **own.options}.items()) or "-",
            own.source,
        ]
        for key, own in known_optimizers().items()
    ]
    assert listed == expected


def test_data_sets_and_their_examples():
    registry_of_data.find("digits")  # which imports all of them
    listed = [cells[:2] for cells in rows((ROOT / "docs/data-sets.md").read_text(), "| name |")]
    named = {re.sub(r":[A-Z]+$", ":", name.strip("`")): examples for name, examples in listed}
    assert named == {name: own.examples.name for name, own in registry_of_data._SETS.items()}


def test_axis_roles():
    cuts = {"whole": "kept whole", "leading": "leading slice", "kept": "the kept layers", "centre": "around the centre"}
    listed = rows((ROOT / "docs/reference/axis-roles.md").read_text(), "| role |")
    expected = [
        (f"`{role}`", cuts[CUTS[role]], ", ".join(f"`{axis}`" for name, axis in RULES if name == role and axis) or "-")
        for role in ROLES
    ]
    assert [(role, cut, axes) for role, _, cut, axes in listed] == expected


def test_the_citation_can_be_read():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == research.__version__ and all(author["name"] for author in citation["authors"])
