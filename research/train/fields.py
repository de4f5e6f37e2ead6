"""Every field of a run's config: its type, its range or choices, and what it says in one line.

What a sub-tree of `FREE` (research/train/config.py) holds is typed by whoever reads it.
"""

from dataclasses import dataclass
from typing import Any

from research.optim.fields import FIELDS as OPTIM
from research.values import ANYTHING, COUNT, DIGITS, SHARE, SIZE, WEIGHT, Rule

_DURATION = rf"\s*(\d{{1,{DIGITS}}}((\.\d{{1,{DIGITS}}})?\s*(ep|ex))?|(100|\d{{1,2}})(\.\d{{1,{DIGITS}}})?\s*%)\s*"
DURATION = Rule(least=0, pattern=_DURATION, says="a duration: 500 (updates), '10ep', '50000ex' or '5%' of the run")
PROFILE = Rule(
    pattern=rf"(\d{{1,{DIGITS}}}(:0*[1-9]\d{{0,{DIGITS}}})?)?",
    says="START:COUNT, e.g. 20:5 for five updates from update 20 on",
)


@dataclass(frozen=True)
class Field:
    """One field: the annotation of its type (see `research.values.fit`), what it says, and the rule that its values
    keep."""

    kind: Any
    meaning: str
    rule: Rule = ANYTHING


def _one_of(*choices: str) -> Rule:
    return Rule(choices=choices)


FIELDS: dict[str, Field] = {
    "seed": Field(
        int,
        "keys every random draw of the run",
        Rule(least=0, most=2**64 - 1, says="a whole number from 0 to 2^64 - 1"),
    ),
    "learner.name": Field(str, "what the run is: supervised training, or another learner"),
    "data.name": Field(str, "data set, see research/data/sources.py"),
    "data.dir": Field(str, "where its files lie"),
    "data.validation_fraction": Field(
        float, "part of the training images held out for validation", Rule(least=0, below=1)
    ),
    "data.batch_size": Field(int, "examples of an update", SIZE),
    "data.stall_s": Field(float, "seconds that a batch may take before the run ends; 0: for ever", COUNT),
    "task.name": Field(str, "the task by name; by default that of the data's examples"),
    "task.label_smoothing": Field(float, "share of a target that is spread over all classes", Rule(least=0, below=1)),
    "task.mixup": Field(float, "alpha of mixup's Beta distribution; 0: off", WEIGHT),
    "task.cutmix": Field(float, "alpha of cutmix's Beta distribution; 0: off", WEIGHT),
    "task.switch": Field(float, "where both are on, the probability of cutmix", SHARE),
    "task.metric": Field(str, "the number that ranks networks; '': the task's own choice"),
    "task.contrastive.loss": Field(str, "loss of pairs of texts", _one_of("mnr", "symmetric", "mnr_plus")),
    "task.contrastive.temperature": Field(float, "what products of vectors are divided by", Rule(above=0)),
    "task.contrastive.normalize": Field(bool, "vectors are scaled to length 1 before their products"),
    "task.local_counting": Field(float, "weight of the relative local counting loss", WEIGHT),
    "methods": Field(tuple[str, ...], "methods of training, in order, see research/methods/"),
    "nested.execution": Field(
        str,
        "networks of an update one after the other on all devices, or on different ones",
        _one_of("sliced", "parallel"),
    ),
    "nested.reduce": Field(str, "how the losses of an update's networks are joined", _one_of("mean", "sum")),
    "nested.sort_importance": Field(bool, "channels are permuted by importance before the first update"),
    "nested.tensor_shards": Field(int, "parts from each of which a leading slice is taken", SIZE),
    **{f"optim.{name}": Field(*parts) for name, parts in OPTIM.items()},
    "optim.warmup": Field(str | int, "updates of linear rise", DURATION),
    "train.duration": Field(str | int, "length of the run", DURATION),
    "train.accumulate": Field(
        int,
        "microbatches of a batch: gradients are those of the whole, but batch norm and losses of routers see a "
        "microbatch each",
        SIZE,
    ),
    "train.precision": Field(str, "type of activations", _one_of("float32", "bfloat16")),
    "train.remat": Field(
        str, "what is computed again in the backward pass", _one_of("none", "full", "dots", "dots_no_batch")
    ),
    "train.nan": Field(str, "what happens at a loss that is not finite", _one_of("stop", "skip")),
    "train.log_every": Field(str | int, "between lines of metrics", DURATION),
    "train.norms": Field(bool, "norms of gradients and parameters are logged by role"),
    "train.profile": Field(str, "updates whose profiler trace is kept", PROFILE),
    "train.init_from": Field(str, "run or folder whose network the run starts from"),
    "eval.every": Field(str | int, "between evaluations; 0: at the end", DURATION),
    "eval.subnets": Field(str, "which networks are evaluated on the way", _one_of("full", "all")),
    "eval.batch_size": Field(int, "examples at a time", SIZE),
    "eval.calibrate_batches": Field(
        int, "training batches that give a network its statistics; 0: slices of the full one's", COUNT
    ),
    "eval.stop_at": Field(float | None, "the run ends when the full network's validation metric is this good"),
    "checkpoint.every": Field(str | int, "between checkpoints; 0: at the end", DURATION),
    "checkpoint.keep_last": Field(int, "newest checkpoints that stay, two at least", SIZE),
    "checkpoint.keep_every": Field(int, "checkpoints at multiples of this step stay; 0: none more", COUNT),
    "checkpoint.keep_best": Field(bool, "the one of the best validation metric stays"),
    **{
        f"mesh.{axis}": Field(
            int, f"devices along the axis {axis}; -1: all that are left", Rule(least=-1, says="from 1, or -1")
        )
        for axis in ("data", "fsdp", "tensor", "expert", "context")
    },
    "mesh.across": Field(
        str, "the axis that goes from slice to slice", _one_of("data", "fsdp", "tensor", "expert", "context")
    ),
    "mesh.min_size": Field(int, "smallest number of entries of an array that is laid over devices", COUNT),
    "report.latency": Field(bool, "the report measures latencies and peak memory"),
    "report.latency_batches": Field(tuple[int, ...], "batch sizes at which", SIZE),
    "report.test": Field(bool, "the report is of the test split, else of the validation split"),
    "report.chosen": Field(str, "what was chosen for the recipe, and on which split: a line of its results' pages"),
    "report.sample": Field(str, "text from which a language model goes on at the end"),
}
"""Dotted name -> field."""
