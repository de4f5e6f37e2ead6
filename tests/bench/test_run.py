"""Measuring on a tiny case: the numbers hang together, peers and implementations come in on demand, donated inputs
last."""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest

from research.bench import case as cases
from research.bench import catalog, run
from research.bench.case import BOTH, FORWARD, Built, directed, fast, foreign, normal, op_case, program
from research.errors import UserError

RATES = {"gemm_flops_per_s": 1e9, "bandwidth_bytes_per_s": 1e9}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 0.01)


def product(direction: str) -> cases.Case:
    """[16, 8] @ [8, 4] with a peer that takes its time."""

    def peer(direction):
        return lambda *arrays: lambda: time.sleep(0.02)

    return op_case(
        "product",
        "16x8x4",
        direction,
        2 * 16 * 8 * 4,
        lambda: (normal(1, (16, 8)), normal(2, (8, 4))),
        {"ours": jnp.matmul, "naive": lambda a, b: (a[:, :, None] * b).sum(1)},
        implementations={"twice": lambda a, b: (2 * a) @ b / 2},
        peers={"torch": peer, "torch slow": peer, "other": peer},
    )


def test_a_measurement_hangs_together(quick):
    rows = run.measure(product(FORWARD), RATES)
    assert [row["contender"] for row in rows] == ["ours", "naive"]
    for row in rows:
        assert 0 < row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["compile_s"] > 0 and row["temp_bytes"] >= 0 and run.FEW <= row["repeats"] <= run.MAX_REPEATS
        # 1024 FLOPs are fewer microseconds at these rates than 4 * (128 + 32 + 64) bytes
        assert row["floor_ms"] == pytest.approx(1.024e-3) and row["of_floor"] == pytest.approx(
            row["median_ms"] / row["floor_ms"]
        )
    assert rows[0]["of_ours"] == 1 and rows[1]["of_ours"] == pytest.approx(rows[1]["median_ms"] / rows[0]["median_ms"])


def test_implementations_and_peers_come_in_on_demand(quick):
    rows = run.measure(product(BOTH), RATES, implementations=True, peers=["torch"])
    assert [row["contender"] for row in rows] == ["ours", "naive", "implementation twice", "torch", "torch slow"]
    peer = rows[3]
    assert peer["median_ms"] >= 20 and peer["of_ours"] > 1 and peer["compile_s"] is None and peer["temp_bytes"] is None
    assert peer["flops"] == 3 * 1024 and peer["num_bytes"] == 4 * (128 + 32 + 64 + 64 + 128 + 32)


def test_floor_is_the_larger_of_products_and_traffic():
    rates = {"gemm_flops_per_s": 2e9, "bandwidth_bytes_per_s": 1e9}
    assert run.floor_ms(4e6, 1e6, rates) == 2 and run.floor_ms(1e6, 4e6, rates) == 4


def test_measured_rates_are_positive_and_in_the_header():
    measured = run.rates()
    assert all(rate > 0 for rate in measured.values())
    header = run.header(measured, [])
    assert (
        header["versions"].startswith("jax 0.")
        and "python 3." in header["versions"]
        and "torch" not in header["versions"]
    )
    assert f"{measured['gemm_flops_per_s'] / 1e9:.1f} GFLOP/s" in header["rates"] and "threads" in header["device"]


def test_slow_contenders_are_timed_fewer_times(monkeypatch):
    """The warm-up's times are given, so that a pause of the machine changes nothing."""
    milliseconds = {"fast": 20.0, "middle": 200.0, "slow": 1e3 * run.SLOW_S + 1}
    counts = dict.fromkeys(milliseconds, 0)

    def call(name):
        def count():
            counts[name] += 1

        count.milliseconds = milliseconds[name]
        return count

    monkeypatch.setattr(run, "_warm_up", lambda call, pause_s: call.milliseconds)
    times = run.timed({name: call(name) for name in counts}, seconds=0.4)
    assert times["slow"]["repeats"] == counts["slow"] == 1  # none leads in
    assert times["middle"]["repeats"] == counts["middle"] == run.FEW
    assert times["fast"]["repeats"] == 20 and counts["fast"] == 20 * (1 + run.LEAD)


def test_a_warm_up_calls_twice_and_once_what_is_slow(monkeypatch):
    calls = []
    assert run._warm_up(lambda: calls.append(time.sleep(0.002)), 0.0) >= 2 and len(calls) == 2
    monkeypatch.setattr(run, "SLOW_S", 0.001)
    run._warm_up(lambda: calls.append(time.sleep(0.002)), 0.0)
    assert len(calls) == 3


def test_gradients_are_of_the_leading_inputs():
    a, b, out = normal(1, (3, 5)), normal(2, (5, 2)), normal(3, (3, 2))
    y, (da, db) = directed(jnp.matmul, BOTH, 2)(out, a, b)
    for found, expected in ((y, a @ b), (da, out @ b.T), (db, a.T @ out)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert len(directed(lambda a, b, n: a @ b, BOTH, 1)(out, a, b, jnp.int32(0))[1]) == 1
    assert directed(jnp.matmul, FORWARD, 2) is jnp.matmul


def test_a_donated_state_goes_from_call_to_call_and_is_not_taken_from_others():
    state = jnp.zeros(4)
    built = program(lambda state, x: (state + x, x.sum()), donated=(0,))(state, jnp.ones(4))
    for expected in (1, 2, 3):
        np.testing.assert_array_equal(built.call()[0], np.full(4, expected))
    np.testing.assert_array_equal(state, np.zeros(4))


def test_foreign_contenders_get_numpy_arrays():
    seen = []
    built = foreign(lambda *arrays: lambda: seen.append(arrays))({"a": jnp.ones(2)}, jnp.zeros(3))
    built.call()
    assert isinstance(built, Built) and isinstance(seen[0][0]["a"], np.ndarray) and isinstance(seen[0][1], np.ndarray)


def test_fast_forms():
    assert fast(("auto", "cpu", "naive", "shift")) == ["shift"]


def test_peers_are_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "installed", lambda peer: peer != "transformers")
    file = tmp_path / "unireplknet.py"
    file.touch()
    assert catalog.parse_peers(["torch", f"unireplknet:{file}"]) == {"torch": "", "unireplknet": str(file)}
    for texts, words in (
        (["numpy"], "unknown peer 'numpy'; valid: torch, transformers, unireplknet"),
        (
            ["transformers"],
            "not installed: it needs packages torch and transformers (pip install torch transformers); installed: "
            "torch",
        ),
        (["unireplknet"], "no file at ''; expected --peer=unireplknet:PATH/unireplknet.py"),
        ([f"unireplknet:{tmp_path}/none.py"], "no file at"),
        ([f"torch:{file}"], "peer torch takes no path"),
    ):
        with pytest.raises(UserError) as error:
            catalog.parse_peers(texts)
        assert words in str(error.value)


def test_a_name_is_registered_once():
    with pytest.raises(UserError, match="op ssd is in the catalogue of benchmarks already"):
        catalog.known("op") and catalog.register("ssd", "again")(lambda peers: [])
    with pytest.raises(UserError, match="suite grouped is in the catalogue of benchmarks already"):
        catalog.register_suite("grouped", catalog.find_suite("grouped"))


@pytest.mark.slow
def test_every_case_of_the_catalogue_can_be_traced():
    """Shapes fit, and what is compared computes arrays of one shape; nothing is compiled."""
    for name, entry in catalog.known("op").items():
        for one in entry.cases({}):
            assert one.name == name and one.flops > 0 and one.num_bytes > 0 and next(iter(one.contenders)) == "ours"
            assert dataclasses.replace(one).key == f"{name} | {one.shape} | {one.direction}"
