"""From a run directory back to networks: the full one, or any sub-network with its own statistics."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from research.errors import Unregistered, UserError
from research.interop import safetensors_io
from research.interop.safetensors_io import config_from_json
from research.modules.state import Arrays, abstract, require_finite
from research.optim.section import OptimSection, resolve
from research.sections import defaults
from research.train import data, kept
from research.train.build import make_reading_programs
from research.train.evaluation import Evaluator, Weights, extracted, weights_of
from research.train.programs import Programs
from research.train.restore import Wanted, restore_newest
from research.train.rundir import read_config
from research.train.sections import RunConfig
from research.train.setup import Setup, make_setup
from research.train.statistics_files import load_statistics


class Trained:
    """A run opened for reading: its setup, weights (EMA when the run kept one) and statistics."""

    def __init__(self, workdir: str | os.PathLike[str], say: Callable[[str], None] = lambda _: None):
        self.workdir = Path(workdir)
        self.config = RunConfig.of(read_config(workdir))
        # Any optimizer will do: its state is not read.
        readable = dataclasses.replace(self.config, optim=OptimSection(**resolve(defaults(OptimSection))))
        try:
            self.setup: Setup = make_setup(readable, data.read(workdir), say)
        except Unregistered as error:
            raise Unregistered(f"{workdir}: {error.args[0]}") from None
        self.programs: Programs = make_reading_programs(self.setup)
        self.say = say
        self.step, state, self.run = restore_newest(self.workdir / "checkpoints", self._wanted, say)
        self.state = kept.whole(state, self.programs.full, self.programs.layout.stats)
        self.weights: Weights = weights_of(self.programs, self.state)
        require_finite({**self.weights.params, **self.state.stats}, f"{workdir}, step {self.step}")
        self.evaluator = Evaluator(self.setup, self.programs)

    def _wanted(self, run: Mapping[str, Any]) -> Wanted:
        """What a step is asked for, which may hold a network of another shape than the run began with."""
        if "model" in run and (model := config_from_json(run["model"])) != self.setup.space.full:
            self.setup = self.setup.reshaped(model)
            self.programs.close()
            self.programs = make_reading_programs(self.setup)
        shapes, shardings = self.programs.shapes, self.programs.shardings
        return kept.wanted(shapes, shardings, self.programs.full, optimizer=False)

    def add(self, text: str) -> str:
        """Makes the sub-network `text` (a name or choices) known and returns its name."""
        name, config = self.setup.space.resolve(text)
        if name not in self.setup.space.configs:
            configs = {**self.setup.space.configs, name: config}
            self.setup = dataclasses.replace(self.setup, space=type(self.setup.space)(self.setup.space.full, configs))
            self.programs = make_reading_programs(self.setup)
            self.evaluator = Evaluator(self.setup, self.programs)
        return name

    def statistics(self, name: str) -> Arrays:
        """Returns the network's own statistics: those saved at this step, where they are as they were written, else
        recalibrated now."""
        saved, problem = load_statistics(self.workdir, self.step, name, abstract(self.setup.space.configs[name]))
        if saved is not None:
            return {k: jax.device_put(v, self.programs.layout.replicated) for k, v in saved.items()}
        if problem:
            self.say(f"the statistics of {name} are made again from training batches: {problem}")
        try:
            return self.evaluator.statistics(name, self.weights)
        except UserError as error:
            lacking = f"cannot be used: {problem}" if problem else f"are not in {self.workdir}"
            more = f"the statistics of {name} at step {self.step} {lacking}, and making them needs the data"
            raise UserError(f"{more}: {error}") from None

    def model(self, name: str) -> tuple[Any, Arrays, Arrays]:
        """Returns (config, params, stats) of a network as a stand-alone model."""
        config = self.setup.space.configs[name]
        params = {k: jnp.asarray(v) for k, v in extracted(self.programs, name, self.weights).items()}
        return config, params, dict(self.statistics(name))


def load_models(
    workdir: str | os.PathLike[str], subnets: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> list[tuple[Any, Arrays, Arrays]]:
    """Returns (config, params, stats) of several networks of a run, which is opened once; as `load_model`."""
    if (Path(workdir) / "model.safetensors").is_file():
        return [load_model(workdir, subnet) for subnet in subnets]
    trained = Trained(workdir, say)
    try:
        return [trained.model(trained.add(subnet)) for subnet in subnets]
    finally:
        trained.programs.close()


def load_model(
    workdir: str | os.PathLike[str], subnet: str = "full", say: Callable[[str], None] = lambda _: None
) -> tuple[Any, Arrays, Arrays]:
    """Returns (config, params, stats) of a network of a run, or of a folder that convert or extract wrote.

    Raises:
      UserError: nothing usable there, weights that are not finite, or a sub-network outside its space.
    """
    if (Path(workdir) / "model.safetensors").is_file():
        if subnet != "full":
            raise UserError(f"{workdir} holds one stand-alone network; leave out --subnet")
        config, params, stats = safetensors_io.load_folder(workdir)
        require_finite({**params, **stats}, str(workdir))
        return config, params, stats
    trained = Trained(workdir, say)
    return trained.model(trained.add(subnet))
