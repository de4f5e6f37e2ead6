"""The space of sub-networks: how choices are read, what they give, and what a mistake gets."""

import pytest

from research.errors import Notice, UserError
from research.models import registry
from research.modules import elastic
from research.modules.dilated_reparam import BRANCHES, kernel_nests
from research.nested.space import make_space, parse_choices, shrink

T = registry.entry("unireplknet_t").config
R50 = registry.entry("resnet50").config
DEIT = registry.entry("deit_base_patch16_224").config


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("width=0.5,depth=0.5", {"width": 0.5, "depth": 0.5}),
        (" width=1 , keep=even,", {"width": 1, "keep": "even"}),
        ("depth=1:1:3:1,kernel=7", {"depth": (1, 1, 3, 1), "kernel": 7}),
        ("", {}),
    ],
)
def test_choices_are_read(text, choices):
    assert parse_choices(text) == choices
    assert {k: type(v) for k, v in parse_choices(text).items()} == {k: type(v) for k, v in choices.items()}


@pytest.mark.parametrize("text", ["width", "width=", "width=0.5,depth"])
def test_unreadable_choices_are_refused(text):
    with pytest.raises(UserError, match="cannot read sub-network"):
        parse_choices(text)


BAD = [
    (T, "widht=0.5", "unknown sub-network dimension 'widht'; valid: width: .*; depth"),
    (T, "width=0", "width=0 is outside its space; valid: a fraction in"),
    (T, "width=1.5", "width=1.5 is outside its space"),
    (T, "ffn=none", "ffn=none is outside its space"),
    (T, "width=0.5:0.5", "has 2 entries; valid: one number, or 4 joined by ':'"),
    (T, "depth=3:3:5:3", "depth=5 is outside its space; valid: multiples of 2 up to 18"),
    (T, "depth=0:1:2:1", "depth=0 is outside its space; valid: multiples of 1 up to 3"),
    (T, "keep=last", "unknown way to keep layers 'last'; valid: first, even"),
    (T, "kernel=12", r"kernel=12 is outside its space; a kernel of 13 crops to \[7, 9, 11, 13\]"),
    (T, "kernel=5", r"a kernel of 13 crops to \[7, 9, 11, 13\]"),
    (R50, "depth=0:1:1:1", "depth=0 is outside its space"),
    (R50, "kernel=7", "unknown sub-network dimension 'kernel'"),
    (DEIT, "heads=13", "heads=13 is outside its space; valid: multiples of 1 up to 12"),
    (DEIT, "width=x", "width=x is outside its space"),
]


@pytest.mark.parametrize(("config", "text", "message"), BAD)
def test_choices_outside_the_space_are_refused_in_one_line(config, text, message):
    with pytest.raises(UserError, match=message) as error:
        shrink(config, parse_choices(text))
    assert "\n" not in str(error.value)


def test_kernels_nest_along_the_released_tables_only():
    nests = {(s, k) for k in BRANCHES for s in BRANCHES if s < k and s >= 7 and kernel_nests(s, k)}
    assert nests == {(7, 9), (7, 11), (7, 13), (7, 15), (9, 11), (9, 13), (11, 13)}
    wide = registry.model_config("unireplknet_a", kernel_sizes=((3,), (15,), (15,), (15,)))
    with pytest.raises(UserError, match=r"kernel=13 is outside its space; a kernel of 15 crops to \[7, 15\]"):
        wide.shrink(kernel=13)
    assert wide.shrink(kernel=7).kernel_sizes == ((3,), (7,), (7,), (7,))
    wider = registry.model_config("unireplknet_a", kernel_sizes=((3,), (17,), (17,), (17,)))
    with pytest.raises(UserError, match=r"a kernel of 17 crops to \[17\]"):
        wider.shrink(kernel=15)
    narrow = registry.model_config("unireplknet_a", kernel_sizes=((3,), (11,), (11,), (11,)))
    assert narrow.shrink(kernel=15).kernel_sizes == narrow.kernel_sizes  # a limit above the kernel's own size keeps it


def test_kept_layers_are_dynaberts():
    assert elastic.kept_layers(range(12), 9, "even") == (0, 1, 2, 4, 5, 6, 8, 9, 10)
    assert elastic.kept_layers(range(12), 6, "even") == (0, 2, 4, 6, 8, 10)
    assert elastic.kept_layers(range(12), 6, "first") == (0, 1, 2, 3, 4, 5)
    assert elastic.kept_layers((0, 3, 6, 9), 2, "even") == (0, 6)
    assert DEIT.shrink(depth=0.75, keep="even").kept_layers == (0, 1, 2, 4, 5, 6, 8, 9, 10)


def test_deit_base_holds_deit_small_and_tiny():
    for name, width in (("deit_small_patch16_224", 0.5), ("deit_tiny_patch16_224", 0.25)):
        assert DEIT.shrink(width=width) == registry.entry(name).config
    assert DEIT.shrink(width=0.5, heads=1.0).num_heads == 12
    assert DEIT.shrink(heads=0.25, ffn=0.25).num_heads == 3 and DEIT.shrink(ffn=0.25).mlp_dim == 768


def test_resnet_shapes():
    small = R50.shrink(width=0.5, depth=0.5, keep="even")
    assert (small.dims, small.inner_dims, small.stem_dim) == ((128, 256, 512, 1024), (32, 64, 128, 256), 32)
    assert small.kept_layers == ((0, 1), (0, 2), (0, 2, 4), (0, 1)) and small.depths == (2, 2, 3, 2)
    assert R50.shrink(depth=(1, 1, 1, 1)).kept() == {f"stage{i}/layers": () for i in (1, 2, 3, 4)}
    assert R50.shrink(inner=0.5).inner_dims == (32, 64, 128, 256) and R50.shrink(inner=0.5).dims == R50.dims


def test_unireplknet_shapes():
    small = T.shrink(width=0.5, depth=0.5, ffn=0.5, kernel=7)
    assert small.dims == (40, 80, 160, 320) and small.mlp_dims == (80, 160, 320, 640)
    assert small.kernel_sizes == ((3,), (7,), (7, 3), (7,)) and small.depths == (2, 2, 10, 2)
    assert small.kept_layers == ((0, 1), (0, 1), (0, 1, 2, 3, 4), (0, 1))
    assert small.shrink(width=0.5) == T.shrink(width=0.25, depth=0.5, ffn=0.5, kernel=7)


def test_named_and_free_points():
    space = make_space(T, {"full": "", "m": "width=0.5", "s": {"width": 0.25, "depth": 0.5}})
    assert space.names() == ["full", "m", "s"] and space.configs["full"] is T
    assert space.resolve("m") == ("m", T.shrink(width=0.5))
    assert space.resolve("width=0.5") == ("width=0.5", T.shrink(width=0.5))
    with pytest.raises(UserError, match="unknown sub-network 'fulll'; near: full"):
        space.resolve("fulll")
    with pytest.raises(UserError, match="unknown sub-network dimension 'size'"):
        make_space(T, {"x": "size=3"})


def test_a_network_whose_arrays_are_no_slices_is_refused_in_a_line():
    """Of routing attention the size of a head follows from the width where it is left open, and heads are not cut."""
    config = registry.model_config(
        "sequence",
        pattern="routing",
        routing={"num_heads": 2, "num_local_heads": 1},
        dim=32,
        depth=1,
        length=16,
        vocab_size=8,
    )
    with pytest.raises(
        UserError,
        match=r"^width=0.5 of sequence is no part of the network: axis .*head_dim.* of size \d+ cannot be cut",
    ) as error:
        shrink(config, {"width": 0.5})
    assert "\n" not in str(error.value)


def test_a_sub_network_that_chooses_nothing_is_told():
    model = registry.model_config("mamba_small", dim=32)
    with pytest.warns(Notice, match=r"^sub-network half_the_heads \(heads=0.5\) is the same network as full$"):
        space = make_space(model, {"half_the_heads": "heads=0.5", "w50": "width=0.5"})
    assert space.configs["half_the_heads"] == model != space.configs["w50"]
