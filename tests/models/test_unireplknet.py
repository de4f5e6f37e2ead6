"""UniRepLKNet against the golden numbers (float64), its counts, its merged form and its stated shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import UserError
from research.models import registry
from research.models.unireplknet import VARIANTS, Block, UniRepLKNetConfig, merge_reparam
from research.modules.axes import Init
from research.modules.dilated_reparam import BRANCHES, DilatedReparam, merge_dilated_reparam
from research.modules.layers import Linear, drop_path, drop_path_rates
from research.modules.squeeze_excite import SqueezeExcite
from research.modules.state import abstract, apply, initialize, merge, split
from research.ops import depthwise as depthwise_ops
from research.ops import gelu_grn
from tests.models import goldens
from tests.models.goldens import W, nchw, nhwc
from tests.models.twins import fast_jit, images, random_arrays, twin

DEPLOY = {"a": 4_437_300, "f": 6_235_216, "p": 10_741_704, "n": 18_318_560, "t": 31_037_980, "s": 55_645_984,
          "b": 98_008_456, "l": 218_454_616, "xl": 386_529_064}  # fmt: skip
STATS = {
    "a": 28_480,
    "f": 34_176,
    "p": 45_568,
    "n": 67_200,
    "t": 96_960,
    "s": 130_176,
    "b": 173_568,
    "l": 260_352,
    "xl": 347_136,
}
TEN = {"a": (4_331_270, 4_119_510), "t": (31_058_830, 30_403_390), "s": (55_695_394, 54_884_674)}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def run(build, params, stats, x, *args, **kwargs):
    """Runs a module with given float64 numbers; every array must be replaced, in its own shape."""
    graphdef, old_params, old_stats, _ = split(build(Init(jax.random.key(0), jnp.float64)))
    for old, new in ((old_params, params), (old_stats, stats)):
        assert {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
    as64 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float64))
    return np.asarray(merge(graphdef, as64(params), as64(stats))(jnp.asarray(x, jnp.float64), *args, **kwargs))


def check(y, total, squares, first4, last):
    expected = np.array([total, squares, *first4, last])
    np.testing.assert_allclose(
        [y.sum(), (y**2).sum(), *y.reshape(-1)[:4], y.reshape(-1)[-1]], expected, rtol=0, atol=1e-8
    )


X = nhwc(W((1, 4, 9, 9), 0.5, 1))


def test_the_golden_input_itself():
    np.testing.assert_allclose(
        [X.sum(), X[0, 0, 0, 0], X[0, 0, 1, 0]], [0.7190922477, 0.4794255386, 0.7643289370], rtol=0, atol=1e-9
    )


def test_g1_global_response_normalisation(x64):
    y = gelu_grn.grn(X, W((4,), 10), W((4,), 11), 1e-6)
    check(y, -49.5076492652, 120.3559591194, [0.2266101192, -0.8674583713, -0.6944433077, 0.4277859850], 0.3854910440)


def test_g2_squeeze_excite(x64):
    def build(init):  # the golden case has two hidden units for four channels
        module = SqueezeExcite(8, "embed", "squeeze", init)
        module.down, module.up = Linear(4, 2, ("embed", "squeeze"), init), Linear(2, 4, ("squeeze", "embed"), init)
        return module

    y = nchw(run(build, goldens.squeeze_excite("", 4, 2), {}, X))
    check(y, 0.6014486826, 42.1533677117, [0.2604407024, 0.4152101821, 0.5137829116, 0.5428175342], 0.2784600784)


DRB = {
    7: (58.3151421885, 823.6586659574, [-0.6794934170, 0.0294002010, 0.9540666077, 2.0392191927], -0.4125887233),
    9: (83.1102023708, 6819.2321546534, [-4.8821578644, -4.2513055169, -2.6153175509, -0.2872851921], 0.6705772887),
    11: (97.7503355654, 395.4084984486, [3.0396853161, 3.1739463591, 2.8300622404, 1.7675868771], -0.8378752607),
    13: (68.0943812932, 257.9536893624, [0.9133464204, 1.5836822318, 2.1954721291, 2.5042659909], -1.0743480798),
    15: (87.4465399232, 196.2323083728, [1.3915521098, 1.5106305260, 1.6312296189, 1.2936259244], -0.1045855585),
    17: (78.8783259918, 276.9538035498, [0.0825713319, 0.4915606424, 1.0673913635, 1.3265647043], 0.4110650430),
}
MERGED_SUMS = {
    7: (0.7146652884, 0.9021629540), 9: (0.2807465005, 0.3639991017), 11: (1.4613929036, 1.1248966070),
    13: (-0.1388656950, 1.1248966070), 15: (0.4374287286, 1.1248966070), 17: (1.0647038099, 1.1248966070),
}  # fmt: skip


@pytest.mark.slow_unless("15", "17")
@pytest.mark.parametrize("size", DRB)
def test_g3_to_g8_dilated_reparam_and_its_merged_kernel(x64, size):
    params, stats = goldens.dilated_reparam("", 4, size)
    y = run(lambda i: DilatedReparam(4, size, "embed", i), params, stats, X, mode="eval")
    check(nchw(y), *DRB[size])
    params, stats = ({f"b/{k}": jnp.asarray(v) for k, v in d.items()} for d in (params, stats))
    kernel, bias = merge_dilated_reparam(params, stats, "b")
    np.testing.assert_allclose([kernel.sum(), bias.sum()], MERGED_SUMS[size], rtol=0, atol=1e-8)
    merged = depthwise_ops.depthwise_conv2d(jnp.asarray(X), kernel, implementation="naive") + bias
    np.testing.assert_allclose(merged, y, rtol=0, atol=1e-10)


BLOCKS = {
    13: (
        (148.3779841078, 231.5707543380, [0.8376139472, 1.1216687757, 1.3012688578, 1.3518517974], 1.0206884762),
        -0.2770518212,
    ),
    3: (
        (147.3377533846, 230.6257516510, [0.8313194945, 1.1158040194, 1.2975878657, 1.3514680938], 1.0102488211),
        0.3322339226,
    ),
}


@pytest.mark.slow_unless("3")
@pytest.mark.parametrize("size", BLOCKS)
def test_g9_g10_block_and_its_merged_form(x64, size):
    golden, kernel_sum = BLOCKS[size]
    config = UniRepLKNetConfig(depths=(1,), dims=(4,), kernel_sizes=((size,),))
    params, stats = goldens.block(size)
    y = run(lambda i: Block(config, 0, size, "stage1/layer", i), params, stats, X, 0.0, None, "eval")
    check(nchw(y), *golden)
    prefix = "stages/0/layer/phases/0"
    stacked = ({f"{prefix}/{k}": jnp.asarray(v)[None] for k, v in d.items()} for d in (params, stats))
    deployed, merged, merged_stats = merge_reparam(config, *stacked)
    block = {k.removeprefix(f"{prefix}/"): v[0] for k, v in merged.items()}
    np.testing.assert_allclose(
        block["down/bias"], [0.6674900093, 0.7794371306, 0.7036126444, 0.5030931705], rtol=0, atol=1e-8
    )
    np.testing.assert_allclose(block["dw/kernel"].sum(), kernel_sum, rtol=0, atol=1e-8)
    assert merged_stats == {}
    again = run(lambda i: Block(deployed, 0, size, "stage1/layer", i), block, {}, X, 0.0, None, "eval")
    np.testing.assert_allclose(again, y, rtol=0, atol=1e-10)


MINI = UniRepLKNetConfig(
    depths=(1,) * 4, dims=(8, 16, 24, 32), kernel_sizes=((3,), (13,), (9,), (5,)), num_classes=10, image_size=64
)
POINTS = [
    ((16, 16, 8), 336.1669271402, 2429.2731670328), ((16, 16, 8), 319.6703308991, 2570.0560969902),
    ((8, 8, 16), 29.9560619238, 1024.8928936645), ((8, 8, 16), 119.5177516827, 2399.8712688120),
    ((4, 4, 24), -3.4708048653, 451.7696567183), ((4, 4, 24), -6.5999496128, 1226.3849569454),
    ((2, 2, 32), 0.7775272508, 136.4000753130), ((2, 2, 32), 7.5781852814, 556.7057170528),
]  # fmt: skip
LOGITS = [0.6959698037, 0.9021596944, 0.7235562700, 0.2533911624, -0.2778932463, -0.6180410636, -0.6181684073,
          -0.3048331337, 0.1369752914, 0.4608510450]  # fmt: skip


@pytest.mark.slow
def test_mini_network_at_every_point_before_and_after_merging(x64):
    params, stats = ({k: jnp.asarray(v) for k, v in d.items()} for d in goldens.mini(MINI.dims, (3, 13, 9, 5), 10))
    shapes = abstract(MINI)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in shapes.params.items()}
    assert {k: v.shape for k, v in stats.items()} == {k: v.shape for k, v in shapes.stats.items()}
    x = jnp.asarray(nhwc(W((1, 3, 64, 64), 0.5, 1)))
    points, _ = fast_jit(functools.partial(apply, MINI, method="features"))(params, stats, x)
    for y, (shape, total, squares) in zip(points, POINTS, strict=True):
        assert y.shape == (1, *shape) and y.dtype == jnp.float64
        np.testing.assert_allclose([y.sum(), (y**2).sum()], [total, squares], rtol=0, atol=1e-8)
    np.testing.assert_allclose(
        fast_jit(functools.partial(apply, MINI))(params, stats, x)[0][0], LOGITS, rtol=0, atol=1e-8
    )
    deployed, merged, _ = merge_reparam(MINI, params, stats)
    assert (
        shapes.num_params() == 39_542
        and abstract(deployed).num_params() == sum(v.size for v in merged.values()) == 35_302
    )
    np.testing.assert_allclose(
        fast_jit(functools.partial(apply, deployed))(merged, {}, x)[0][0], LOGITS, rtol=0, atol=1e-8
    )


COVERAGE = {
    7: (92, 4, 2, 33, [2, 3, 2, 4, 2, 3, 2]),
    9: (149, 5, 3, 49, [3, 2, 3, 2, 5, 2, 3, 2, 3]),
    11: (198, 6, 2, 57, [2, 3, 2, 3, 2, 6, 2, 3, 2, 3, 2]),
    13: (270, 6, 2, 81, [2, 2, 3, 2, 3, 2, 6, 2, 3, 2, 3, 2, 2]),
    15: (326, 6, 2, 89, [2, 2, 2, 2, 2, 3, 2, 6, 2, 3, 2, 2, 2, 2, 2]),
    17: (422, 6, 2, 113, [2, 2, 2, 2, 3, 1, 3, 2, 6, 2, 3, 1, 3, 2, 2, 2, 2]),
}


@pytest.mark.parametrize("size", COVERAGE)
def test_coverage_of_all_ones_kernels(size):
    _, params, stats, _ = split(DilatedReparam(1, size, "embed", Init(jax.random.key(0))))
    ones = {f"b/{k}": jnp.ones(v.shape) if k.endswith("kernel") else v for k, v in params.items()}
    unit = {f"b/{k}": v - (1e-5 if k.endswith("var") else 0) for k, v in stats.items()}
    kernel, bias = merge_dilated_reparam(ones, unit, "b")
    taps = np.asarray(kernel[..., 0])
    total, centre, corner, many, middle = COVERAGE[size]
    np.testing.assert_allclose(taps, np.round(taps), atol=1e-5)
    taps = np.round(taps).astype(int)
    assert (taps.sum(), taps[size // 2, size // 2], taps[0, 0], (taps > 1).sum()) == (total, centre, corner, many)
    assert taps[size // 2].tolist() == middle and total == size**2 + sum(k * k for k in BRANCHES[size].values())
    np.testing.assert_array_equal(bias, 0)


@pytest.mark.parametrize("name", [pytest.param("unireplknet_a", marks=pytest.mark.slow), "unireplknet_t"])
def test_merged_network_agrees_in_float32(name):
    config = twin(name)
    params, stats = random_arrays(config)
    params = {k: jnp.full_like(v, 0.5) if k.endswith("layer_scale") else v for k, v in params.items()}
    x = images(config)
    y = fast_jit(functools.partial(apply, config))(params, stats, x)[0]
    deployed, merged, none = merge_reparam(config, params, stats)
    assert {k: v.shape for k, v in merged.items()} == {
        k: v.shape for k, v in abstract(deployed).params.items()
    } and none == {}
    again = fast_jit(functools.partial(apply, deployed))(merged, none, x)[0]
    assert np.abs(again - y).max() <= 1e-5 * np.abs(y).max()


@pytest.mark.parametrize("size", VARIANTS)
def test_counts_of_statistics_and_of_the_deployed_form(size):
    name = f"unireplknet_{size}"
    assert abstract(VARIANTS[size]).num_stats() == STATS[size]
    assert abstract(registry.model_config(name, deploy=True)).num_params() == DEPLOY[size]
    assert abstract(registry.model_config(name, deploy=True)).num_stats() == 0
    if size in TEN:
        counts = tuple(
            abstract(registry.model_config(name, num_classes=10, deploy=d)).num_params() for d in (False, True)
        )
        assert counts == TEN[size]


def test_stage_outputs_and_block_counts():
    shapes = abstract(VARIANTS["t"])
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    outs, _ = jax.eval_shape(functools.partial(apply, VARIANTS["t"], method="features"), shapes.params, shapes.stats, x)
    assert [o.shape[1:] for o in outs[1::2]] == [(56, 56, 80), (28, 28, 160), (14, 14, 320), (7, 7, 640)]
    for size, expected in {"t": (15, 12), "s": (15, 21), "a": (10, 2)}.items():
        sizes = [
            k
            for d, p in zip(VARIANTS[size].depths, VARIANTS[size].kernel_sizes, strict=True)
            for k in p * (d // len(p))
        ]
        assert (sum(k >= 7 for k in sizes), sum(k < 7 for k in sizes)) == expected


def test_drop_path_rates_and_their_use():
    rates = drop_path_rates(VARIANTS["s"].drop_path_rate, sum(VARIANTS["s"].depths))
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.4) and len(rates) == 36
    np.testing.assert_allclose(np.diff(rates), 0.4 / 35, rtol=1e-9)
    y = np.asarray(drop_path(jnp.ones((4000, 2, 2, 1)), 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)} and (y == y[:, :1, :1]).all()
    assert abs((y[:, 0, 0, 0] > 0).mean() - 0.75) < 0.03


@pytest.mark.slow
def test_initial_values():
    config = UniRepLKNetConfig(
        depths=(1, 2), dims=(16, 32), kernel_sizes=((3,), (3,)), num_classes=10, head_init_scale=0.001
    )
    params, stats = fast_jit(functools.partial(initialize, config))(jax.random.key(0))
    assert all((v == 1e-6).all() for k, v in params.items() if k.endswith("layer_scale"))
    assert all((v == 0).all() for k, v in params.items() if k.endswith("bias") or k.endswith("grn/scale"))
    assert all((v == (1 if k.endswith("var") else 0)).all() for k, v in stats.items())
    assert float(params["head/kernel"].std()) == pytest.approx(2e-5, rel=0.2)
    layers = params["stages/1/layer/phases/0/up/kernel"]
    assert float(layers.std()) == pytest.approx(0.02, rel=0.1) and not np.allclose(layers[0], layers[1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kernel_sizes": ((3,), (12,), (13,), (13,))}, "kernel size 12 in stage 2; valid: 0, 3, 5, 7"),
        ({"dims": (6, 8, 8, 8)}, "must be multiples of 4"),
        ({"depths": (1, 1, 1)}, "one entry per stage"),
        ({"image_size": 16}, "smaller than the total stride 32"),
    ],
)
def test_bad_configs_are_refused_in_one_line(bad, message):
    with pytest.raises(UserError, match=message) as error:
        registry.model_config("unireplknet_a", **bad)
    assert "\n" not in str(error.value)
