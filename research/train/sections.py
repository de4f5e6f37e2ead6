"""A run's config as code reads it: `RunConfig`, and the sections of the harness. Those of data, tasks, nested networks
and optimizers stand where they are read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from research.data.section import DataSection
from research.nested.section import NestedSection
from research.optim.section import OptimSection
from research.sections import Only, Section, fields_of, free, free_groups, group, read, setting
from research.tasks.section import TaskSection
from research.values import COUNT, DIGITS, DURATION, SIZE, Rule, fit

PROFILE = Rule(
    pattern=rf"(\d{{1,{DIGITS}}}(:0*[1-9]\d{{0,{DIGITS}}})?)?",
    says="START:COUNT, e.g. 20:5 for five updates from update 20 on",
)
AXES = ("data", "fsdp", "tensor", "expert", "context")


def _duration_is_set(value: str | int) -> bool:
    """Whether a duration is more than none."""
    return not re.fullmatch(r"\s*0*(\.0+)?\s*(ep|ex|%|)\s*", str(value))


def _with(field: str, here: Callable[[Any], bool]) -> Only:
    return Only(f"runs with {field}", here)


@dataclass(frozen=True)
class LearnerSection(Section):
    """What drives the updates; `options` are of the learner."""

    name: str = setting("supervised", "what the run is: supervised training, or another learner")
    options: Mapping[str, Any] = free()


@dataclass(frozen=True)
class TrainSection(Section):
    """How long and in which arithmetic a run trains."""

    duration: str | int = setting("10ep", "length of the run", DURATION)
    accumulate: int = setting(
        1,
        "microbatches of a batch: gradients are those of the whole, but batch norm and losses of routers see a "
        "microbatch each",
        SIZE,
    )
    precision: str = setting("float32", "type of activations", Rule(choices=("float32", "bfloat16")))
    remat: str = setting(
        "none",
        "what is computed again in the backward pass",
        Rule(choices=("none", "full", "dots", "dots_no_batch")),
    )
    nan: str = setting("stop", "what happens at a loss that is not finite", Rule(choices=("stop", "skip")))
    log_every: str | int = setting("2%", "between lines of metrics", DURATION)
    norms: bool = setting(False, "norms of gradients and parameters are logged by role")
    profile: str = setting("", "updates whose profiler trace is kept", PROFILE)
    init_from: str = setting("", "run or folder whose network the run starts from")


@dataclass(frozen=True)
class EvalSection(Section):
    """Evaluations during training."""

    every: str | int = setting("20%", "between evaluations; 0: at the end", DURATION)
    subnets: str = setting("full", "which networks are evaluated on the way", Rule(choices=("full", "all")))
    batch_size: int = setting(500, "examples at a time", SIZE)
    calibrate_batches: int = setting(
        8, "training batches that give a network its statistics; 0: slices of the full one's", COUNT
    )
    stop_at: float | None = setting(
        None,
        "the run ends when the full network's validation metric is this good",
        only=_with("eval.every", lambda config: _duration_is_set(config.eval.every)),
    )


@dataclass(frozen=True)
class CheckpointSection(Section):
    """When checkpoints are made, and which stay."""

    every: str | int = setting("25%", "between checkpoints; 0: at the end", DURATION)
    keep_last: int = setting(2, "newest checkpoints that stay, two at least", SIZE)
    keep_every: int = setting(0, "checkpoints at multiples of this step stay; 0: none more", COUNT)
    keep_best: bool = setting(True, "the one of the best validation metric stays")

    @property
    def keeping(self) -> dict[str, Any]:
        """Which checkpoints stay, as `research.train.checkpoint.Checkpoints` takes it."""
        return {"keep_last": self.keep_last, "keep_every": self.keep_every, "keep_best": self.keep_best}


def _along(axis: str, default: int = 1) -> Any:
    rule = Rule(least=-1, says="from 1, or -1")
    return setting(default, f"devices along the axis {axis}; -1: all that are left", rule)


@dataclass(frozen=True)
class MeshSection(Section):
    """The devices of a run as a mesh of named axes."""

    data: int = _along("data", -1)
    fsdp: int = _along("fsdp")
    tensor: int = _along("tensor")
    expert: int = _along("expert")
    context: int = _along("context")
    across: str = setting("data", "the axis that goes from slice to slice", Rule(choices=AXES))
    min_size: int = setting(2**14, "smallest number of entries of an array that is laid over devices", COUNT)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return dict(zip(AXES, (self.data, self.fsdp, self.tensor, self.expert, self.context), strict=True))


@dataclass(frozen=True)
class ReportSection(Section):
    """What the report of a run holds."""

    latency: bool = setting(True, "the report measures latencies and peak memory")
    latency_batches: tuple[int, ...] = setting(
        (1, 32), "batch sizes at which", SIZE, _with("report.latency", lambda config: config.report.latency)
    )
    test: bool = setting(True, "the report is of the test split, else of the validation split")
    chosen: str = setting("", "what was chosen for the recipe, and on which split: a line of its results' pages")
    sample: str = setting("", "text from which a language model continues at the end")


@dataclass(frozen=True)
class RunConfig(Section):
    """The whole config of a run, every value of the type and in the range that its field says.

    `model` is checked by the family that `model.name` names, options of methods in `method` by the methods, `expect`
    holds the numbers that a recipe's report is compared with.
    """

    seed: int = setting(
        0, "keys every random draw of the run", Rule(least=0, most=2**64 - 1, says="a whole number from 0 to 2^64 - 1")
    )
    learner: LearnerSection = group(LearnerSection)
    model: Mapping[str, Any] = free(lambda: {"name": "unireplknet_a"})
    data: DataSection = group(DataSection)
    task: TaskSection = group(TaskSection)
    methods: tuple[str, ...] = setting((), "methods of training, in order, see research/methods/")
    method: Mapping[str, Any] = free()
    nested: NestedSection = group(NestedSection)
    optim: OptimSection = group(OptimSection)
    train: TrainSection = group(TrainSection)
    eval: EvalSection = group(EvalSection)
    checkpoint: CheckpointSection = group(CheckpointSection)
    mesh: MeshSection = group(MeshSection)
    report: ReportSection = group(ReportSection)
    expect: Mapping[str, Any] = free()

    def check(self) -> None:
        fit(self.model.get("name"), str, "config.model.name")
        for name, bound in self.expect.items():
            fit(bound, float | tuple[float | None, float | None], f"config.expect.{name}")

    @classmethod
    def of(cls, config: "Mapping[str, Any] | RunConfig") -> "RunConfig":
        """Returns a config as it is stored in config.json, typed; one that is so already as it is.

        Raises:
          UserError: an unknown or missing field, or a value of another type or out of range.
        """
        return config if isinstance(config, RunConfig) else read(cls, config)


FIELDS = fields_of(RunConfig)
"""Dotted name -> field."""
FREE = free_groups(RunConfig)
"""Groups whose fields are checked by whoever reads them."""
