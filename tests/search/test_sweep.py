"""Points of a sweep, the names of their folders, means over seeds, and what they are drawn against."""

import pytest

from research.errors import UserError
from research.search import sweep


def test_grids_are_read_and_combined():
    grid = sweep.axes(["model.dims=(1,2),(3,4)", "model.pattern=a b;c", "seed=0,1"])
    assert grid == [("model.dims", ["(1,2)", "(3,4)"]), ("model.pattern", ["a b", "c"]), ("seed", ["0", "1"])]
    points = sweep.points(grid)
    assert len(points) == 8 and points[1] == {"model.dims": "(1,2)", "model.pattern": "a b", "seed": "1"}


@pytest.mark.parametrize(
    ("texts", "words"),
    [(["dim"], "no FIELD=VALUE"), (["dim=1,1"], "the value '1' twice"), (["dim=1", "dim=2"], "names dim twice")],
)
def test_bad_grids_are_refused(texts, words):
    with pytest.raises(UserError, match=words):
        sweep.axes(texts)


def test_folders_are_named_by_fields_and_values():
    assert sweep.folder_name({"arg": "dense", "seed": "0"}) == "arg=dense_seed=0"
    assert sweep.folder_name({"model.pattern": "mamba2 mamba2 window"}) == "model.pattern=mamba2-mamba2-window"
    odd = [sweep.folder_name({"data.dir": value}) for value in ("/a/b", "/a:b", "../x", "y" * 500, "y" * 499 + "z")]
    assert len(set(odd)) == 5 and all("/" not in name and ":" not in name and len(name) < 140 for name in odd)


def test_the_default_of_x_is_the_first_field_of_numbers():
    assert sweep.default_x(sweep.axes(["seed=0,1", "model.pattern=a,b", "optim.lr=1e-3,1e-2"])) == "optim.lr"
    assert sweep.default_x(sweep.axes(["arg=1,2", "seed=0,1"])) == "params"


def test_seeds_are_averaged_and_failures_do_not_count():
    rows = [
        {"a": "x", "seed": "0", "params": 10, "value": 0.5, "updates": 3, "wall_s": 1.0},
        {"a": "x", "seed": "1", "params": 10, "value": 0.7, "updates": 3, "wall_s": 3.0},
        {"a": "y", "seed": "0", "params": 20, "value": 0.9, "updates": 3, "wall_s": 1.0},
        {"a": "y", "seed": "1", "failed": "loss is not finite"},
        {"a": "z", "seed": "0", "failed": "exit code 2"},
    ]
    x, y, z = sweep.over_seeds(rows, ["a", "seed"])
    assert x == pytest.approx({"a": "x", "seeds": 2, "params": 10, "value": 0.6, "+- value": 0.1, "wall_s": 2.0})
    assert y == pytest.approx({"a": "y", "seeds": 1, "params": 20, "value": 0.9, "+- value": 0.0, "wall_s": 1.0})
    assert z == {"a": "z", "seeds": 0} and sweep.over_seeds(rows, ["a"]) == []
