"""What a mixer is asked for is judged before anything is trained, each mistake in one line."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import pytest
from flax import nnx

from research.errors import UserError
from research.models.registry import check_buildable, entry
from research.models.sequence import SequenceConfig
from research.modules.axes import Kind
from research.modules.layers import normal_02
from research.modules.mixers import base, contract
from research.modules.mixers.base import Spec, known
from tests.modules.mixers.echo import Echo, EchoMixer


class Right(EchoMixer):
    """One that tests derive from."""


class NoStep(nnx.Module):
    def __init__(self, whole):
        self.whole = whole

    def __call__(self, x, call, state=None):
        return self.whole(x, call, state)

    def init_state(self, batch, capacity, dtype=jnp.float32):
        return self.whole.init_state(batch, capacity, dtype)


class NoCapacity(EchoMixer):
    def init_state(self, batch, dtype=jnp.float32):
        return {"sum": jnp.zeros((batch, 16), dtype), "ids": jnp.zeros(batch, jnp.int32)}


class NoPair(EchoMixer):
    def __call__(self, x, call, state=None):
        return super().__call__(x, call, state)[0]


class OtherName(EchoMixer):
    def __call__(self, x, call, state=None):
        y, state = super().__call__(x, call, state)
        return y, {"total": state["sum"], "ids": state["ids"]}


class OtherType(EchoMixer):
    def step(self, x, call, state):
        y, state = super().step(x, call, state)
        return y, {**state, "sum": state["sum"].astype(jnp.bfloat16)}


class Narrow(EchoMixer):
    def __call__(self, x, call, state=None):
        y, state = super().__call__(x, call, state)
        return y[..., :-1], state


class Typo(EchoMixer):
    def __call__(self, x, call, state=None):
        return super().__call__(x, call, state) if call.segments is None else None


MIXERS = {
    NoStep: r"mixer echo: NoStep has no step\(x, call, state\) \(.*test_contract.py\)",
    NoCapacity: r"mixer echo: NoCapacity has init_state\(batch, dtype=.*; wanted: init_state\(batch, capacity, dtype\)",
    NoPair: r"mixer echo: NoPair.__call__ returns float32\[2, 3, 16\]; wanted: a pair \(y, state\)",
    OtherName: r"OtherName.__call__ returns the state dict\(ids .*total float32\[2, 16\]\); wanted, "
    r"as init_state gives: dict\(ids int32\[2\], sum float32\[2, 16\]\)",
    OtherType: r"OtherType.step from a state returns the state dict\(.*sum bfloat16.*as it was given: .*sum float32",
    Narrow: r"Narrow.__call__ returns y float32\[2, 3, 15\]; wanted, as x is: float32\[2, 3, 16\]",
    Typo: r"Typo.__call__ fails: AttributeError: 'Call' object has no attribute 'segments'.* \(.*.py:\d+\)",
}


def spec_of(mixer):
    @dataclass(frozen=True)
    class Own(Echo):
        def build(self, dim, length, scope, init, implementation):
            return NoStep(EchoMixer(self, dim, scope, init)) if mixer is NoStep else mixer(self, dim, scope, init)

    return Own()


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.__name__)
def test_a_wrong_method_is_one_line(mixer):
    with pytest.raises(UserError, match=MIXERS[mixer]) as told:
        contract.check(spec_of(mixer), 16, 8)
    assert "\n" not in str(told.value)


def test_a_right_one_passes():
    contract.check(spec_of(Right), 16, 8)
    contract.check(spec_of(Right), 16, 1)  # a text of one token


@dataclass(frozen=True)
class Sized(Echo):
    inner: int = 0

    def build(self, dim, length, scope, init, implementation):
        module = Right(self, dim, scope, init)
        axes = ("embed", f"{scope}/inner")
        module.more = init.param("more", (dim, self.inner), axes, normal_02, Kind.MATRIX)
        return module


@dataclass(frozen=True)
class Unshrunk(Echo):
    def shrink(self, width, heads, state):
        replace(self, ignores="")


@dataclass(frozen=True)
class Forgetful(Echo):
    def build(self, dim, length, scope, init, implementation):
        EchoMixer(self, dim, scope, init)


def test_options_that_do_not_follow_are_one_line():
    with pytest.raises(
        UserError, match=r"more of Right would have no entry with inner=0; wanted: Sized.resolve\(dim\)"
    ):
        contract.check(Sized(), 16, 8)
    with pytest.raises(UserError, match=r"Forgetful.build fails: TypeError: returns .*; wanted: the mixer"):
        contract.check(Forgetful(), 16, 8)
    with pytest.raises(UserError, match=r"Unshrunk.shrink fails: TypeError: returns .*; wanted: a Unshrunk"):
        contract.check(Unshrunk(), 16, 8)


def test_a_kind_that_is_not_there_is_told_with_the_valid_ones():
    with pytest.raises(AttributeError, match=r"Kind.VECTOR is not there; valid: MATRIX, DEPTHWISE, "):
        _ = Kind.VECTOR


@pytest.mark.parametrize("name", sorted(f"{kind}_small" for kind in known()))
def test_every_mixer_of_the_repository_passes(name):
    config = entry(name).config
    assert isinstance(config, SequenceConfig)
    config.check_parts()


def test_setting_up_a_model_judges_its_mixers(monkeypatch):
    judged = []
    monkeypatch.setattr(contract, "check", lambda spec, dim, length: judged.append((spec.kind, dim, length)))
    check_buildable(SequenceConfig(dim=32, depth=3, length=8, pattern="mamba gla mamba"), "sequence", {})
    assert judged == [("mamba", 32, 8), ("gla", 32, 8)]


class Bare(Spec):
    kind: ClassVar[str] = "bare"


@dataclass(frozen=True)
class Kindless(Echo):
    kind: ClassVar[str] = ""


@dataclass(frozen=True)
class Unbuilt(Spec):
    kind: ClassVar[str] = "unbuilt"


@dataclass(frozen=True)
class Changing(Echo):
    size: int = 0
    kind: ClassVar[str] = "two words"


@dataclass(frozen=True, kw_only=True)
class Asking(Echo):
    size: int


@pytest.mark.parametrize(
    "spec, told",
    [
        (Bare, r"mixer bare: Bare is no frozen dataclass; write @register above @dataclass\(frozen=True\)"),
        (Kindless, r"mixer Kindless: Kindless has kind ''; wanted, the name of the mixer"),
        (Changing, r"has kind 'two words'"),
        (Unbuilt, r"mixer unbuilt: Unbuilt has no build\(dim, length, scope, init, implementation\)"),
        (Asking, r"Asking has no default for size"),
        (int, r"register takes a class that derives from Spec"),
    ],
)
def test_registration_judges_the_class(spec, told):
    with pytest.raises(UserError, match=told):
        base.register(spec)
