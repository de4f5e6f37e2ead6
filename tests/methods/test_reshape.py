"""A network that changes its shape in mid-run continues exactly where it was killed, on one device and on eight."""

import json

import jax
import numpy as np
import optax
import pytest

from launch import config as recipe
from research.errors import UserError
from research.train import loop, reshaping
from research.train.extraction import Trained
from research.train.hooks import Reindex, Reshape
from research.train.reshaping import Moves
from tests.methods import cases  # noqa: F401  (registers halve and widen)
from tests.train.killed import Processes, arrays
from tests.train.reporter import Lines


def tiny(name, **fields):
    given = {k.replace("__", "."): str(v) for k, v in fields.items()}
    return recipe.load(f"tests/methods/tiny.py:{name}", given)


def arrays_of(workdir):
    trained = Trained(workdir)
    trained.programs.close()
    return trained, {k: np.asarray(v) for k, v in trained.state.params.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs of eight updates whose FFNs change from 32 hidden units before the fifth: name -> (workdir, lines)."""
    found = {}
    for name in ("halve", "widen"):
        workdir = tmp_path_factory.mktemp("reshape") / name
        lines = Lines()
        loop.train(tiny(f"{name},ema,sandwich"), str(workdir), lines)
        found[name] = workdir, lines
    return found


@pytest.mark.parametrize(("name", "units"), [("halve", 16), ("widen", 64)])
def test_every_array_follows_by_its_axis_names(whole, name, units):
    workdir, lines = whole[name]
    trained, params = arrays_of(workdir)
    assert any(line.startswith("step 4: the network has") for line in lines.said)
    shapes = {v.shape[-1] for k, v in params.items() if k.endswith("mlp/up/kernel")}
    assert shapes == {units} and trained.setup.space.full.mlp_dim == units
    assert {v.shape for v in trained.state.methods["ema"].values()} == {v.shape for v in params.values()}
    config, small, _ = trained.model("s")
    assert config.mlp_dim == units // 2 and np.isfinite(np.concatenate([np.ravel(v) for v in small.values()])).all()
    losses = [
        json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"loss":' in line
    ]
    assert len(losses) >= 8 and max(losses) < 4


@pytest.fixture(scope="module")
def processes():
    with Processes() as processes:
        yield processes


@pytest.mark.parametrize("name", ["halve", pytest.param("widen", marks=pytest.mark.slow)])
def test_a_run_killed_before_at_and_after_the_change_ends_with_the_same_bits(whole, name, processes, tmp_path):
    (reference, _), workdir, config = whole[name], tmp_path / "run", tiny(f"{name},ema,sandwich")
    for saved in (2, 4, 6):
        processes.kill(config, workdir, at=saved + 1, saved=saved)
    assert "resumed from step 6" in processes.train(config, workdir)
    ours, theirs = arrays_of(workdir)[1], arrays_of(reference)[1]
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    assert (workdir / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_eight_devices_prune_grow_are_killed_and_go_on(tmp_path):
    """Sharded over data, fsdp and tensor, killed after the change."""
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__min_size": 1}
    with Processes(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8") as processes:
        for name, units in (("halve", 16), ("widen", 64)):
            config, reference, workdir = tiny(f"{name},ema", **mesh), tmp_path / name, tmp_path / f"{name}_killed"
            processes.train(config, reference)
            processes.kill(config, workdir, at=7, saved=6)
            said = processes.train(config, workdir)
            assert "resumed from step 6" in said and any(line.endswith("8 device(s)") for line in said)
            ours, theirs = (processes.call(arrays, str(folder)) for folder in (workdir, reference))
            assert jax.tree.structure(ours) == jax.tree.structure(theirs)
            assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
            assert {v.shape[-1] for k, v in theirs["params"].items() if k.endswith("mlp/up/kernel")} == {units}


@pytest.mark.parametrize("name", ["halve", "widen"])
def test_the_report_counts_what_was_compiled_for_every_shape(whole, name):
    """For either shape there is a bound of seven, see `finish.bound`, and at least three programs: gradients of two
    networks and an update. Two evaluations follow at the end; others may have been compiled in the background."""
    report = json.loads((whole[name][0] / "report.json").read_text())
    assert report["programs_bound"] == 14 and 8 <= report["programs"] <= 14


def test_factored_moments_follow_the_axes_that_they_are_of():
    order, grown = Reindex((2, 0, 1)), Reindex((0, 1, 2, -1))
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=2)

    def moved(axes, plan, sizes, new_sizes):
        old = {"w": np.zeros([sizes[a] for a in axes], np.float32)}
        new = {"w": np.zeros([new_sizes[a] for a in axes], np.float32)}
        state = optimizer.init(old)
        numbers = lambda v: np.arange(1.0, v.size + 1, dtype=np.float32).reshape(v.shape)
        filled = {name: {"w": numbers(kept["w"])} for name, kept in (("v_row", state.v_row), ("v_col", state.v_col))}
        state = state._replace(count=np.int32(7), **filled)
        move = Moves(Reshape(None, plan), sizes, new_sizes)
        return reshaping._moments(state, optimizer.init(new), old, new, {"w": axes}, move)

    found = moved(("a", "b"), {"a": order}, {"a": 3, "b": 5}, {"a": 3, "b": 5})
    rows = {len(np.asarray(v["w"])): np.asarray(v["w"]).tolist() for v in (found.v_row, found.v_col)}
    assert rows == {3: [3, 1, 2], 5: [1, 2, 3, 4, 5]} and found.count == 7
    found = moved(("a", "b"), {"a": grown}, {"a": 3, "b": 5}, {"a": 4, "b": 5})
    rows = {len(np.asarray(v["w"])): np.asarray(v["w"]).tolist() for v in (found.v_row, found.v_col)}
    assert rows == {4: [1, 2, 3, 0], 5: [1, 2, 3, 4, 5]}
    square = {"a": 3, "b": 3}
    with pytest.raises(UserError, match=r"means over axes of w, and its sizes do not tell which \(a or b\)"):
        moved(("a", "b"), {"a": order}, square, square)
    found = moved(("a", "b"), {"a": order, "b": order}, square, square)
    assert np.asarray(found.v_row["w"]).tolist() == np.asarray(found.v_col["w"]).tolist() == [3, 1, 2]


def test_moves_copy_fill_and_refuse():
    plan = Reshape(None, {"a": Reindex((2, 0, -1)), "b": Reindex((0, -1), "fresh")})
    move = Moves(plan, {"a": 3, "b": 1, "c": 2}, {"a": 3, "b": 2, "c": 3})
    found = np.asarray(move(np.arange(3.0)[:, None], ("a", "b"), np.full((3, 2), 7.0, np.float32), "x"))
    np.testing.assert_array_equal(found, [[2, 7], [0, 7], [0, 0]])
    np.testing.assert_array_equal(move(np.ones(2), ("c",), np.zeros(3, np.float32), "y"), [1, 1, 0])
    both = Moves(Reshape(None, {n: Reindex((0, -1), "fresh") for n in "ab"}), {"a": 1, "b": 1}, {"a": 2, "b": 2})
    grown = both(np.ones((1, 1)), ("a", "b"), np.full((2, 2), 7.0, np.float32), "x")
    np.testing.assert_array_equal(grown, [[1, 7], [7, 7]])
    with pytest.raises(UserError, match=r"reshape: the new network has no axis 'd'; valid: a"):
        Moves(Reshape(None, {"d": Reindex((0,))}), {"a": 3}, {"a": 3})
    with pytest.raises(UserError, match=r"reshape of axis a: 2 places from 3; the new network has 3"):
        Moves(Reshape(None, {"a": Reindex((0, 1))}), {"a": 3}, {"a": 3})
