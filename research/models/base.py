"""What the config of every model declares: all that the rest of the package asks of a model before its arrays are
there."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from flax import nnx

from research.errors import UserError
from research.models import implementations
from research.modules.axes import Init
from research.modules.renamed import Renamed
from research.modules.state import Arrays, abstract


class ModelConfig(Renamed):
    """Base of the frozen dataclasses that describe models.

    A family gives `family`, `elastic`, `build`, `input_shape` and `shrink`; everything else has a default, of a plain
    network whose ops leave no choice, that is its own deployed form and sends every example through all of its
    parameters.

    Attributes:
      family: name of the family, unique.
      renamed: what a field was called in earlier versions -> its name.
      elastic: dimension along which sub-networks are cut -> what a choice of it means.
      derived: field -> the fields that it follows from where it is not given itself.
      predicts: what the outputs are, "labels" (of examples or tokens, or embeddings) or "density" (a map).
      router: what the names of the router's parameters start with, where images are sent along one of several pathways.
    """

    family: ClassVar[str]
    elastic: ClassVar[Mapping[str, str]] = {}
    derived: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    predicts: ClassVar[str] = "labels"
    router: ClassVar[str] = ""
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    """As every subclass is a dataclass, so that type checkers take a config for one."""

    def build(self, init: Init) -> nnx.Module:
        """Builds the module; `init` names, shapes and initialises its arrays."""
        raise NotImplementedError

    def input_shape(self) -> tuple[int, ...]:
        """Returns the shape of one example."""
        raise NotImplementedError

    def shrink(self, *args: Any, **choices: Any) -> Self:
        """Returns the sub-network with these choices (see `elastic`).

        Raises:
          UserError: a choice lies outside the space.
        """
        raise NotImplementedError

    def check_sizes(self, *names: str) -> None:
        """Raises UserError for a field of these names that is below 1."""
        for name in names:
            if vars(self)[name] < 1:
                raise UserError(f"{self.family}: {name}={vars(self)[name]}; valid: whole numbers from 1")

    def kept(self) -> Mapping[str, tuple[int, ...]]:
        """Returns, for each axis of layers, which layers of the full network are there."""
        return {}

    @property
    def embedding(self) -> tuple[int, str] | None:
        """Returns (size, axis name) of the vector that the classifier reads of an example, None where there is none.

        A model that has one has a module with `embed(x, mode=..., key=...)` and `head`: its outputs are
        `head(embed(x))`.
        """
        return None

    def check_parts(self) -> None:
        """Judges what the shapes of its arrays do not tell of parts that a user may bring, such as mixers; nothing by
        default.

        Raises:
          UserError: a part that does not keep its contract.
        """

    # -- implementation of its ops -----------------------------------------------------------------------------

    def with_implementation(self, implementation: str) -> Self:
        """Returns the model with another choice of its ops' implementations, see `research.models.implementations`."""
        del implementation
        return self

    def on_cpu(self) -> Self:
        """Returns the model as it runs on a CPU: what is left to the platform is chosen for it."""
        return self

    def counted(self) -> tuple[Self, int]:
        """Returns the model whose FLOPs are the nominal ones, and the number of examples to count them over."""
        return self, 1

    # -- inference ---------------------------------------------------------------------------------------------

    def deployed(self) -> Self:
        """Returns the config of the network that runs at inference."""
        return self

    @property
    def merges(self) -> bool:
        """Whether the network that runs at inference is another one than that which is trained."""
        return False

    def merge(self, params: Arrays, stats: Arrays) -> tuple[Self, Arrays, Arrays]:
        """Returns (config, params, stats) of the network that runs at inference and computes the same."""
        return self, params, stats

    @property
    def streams(self) -> bool:
        """Whether a state can carry the model on, token by token."""
        return False

    @property
    def pathways(self) -> int:
        """Pathways of which every image takes one, 0 or 1 where there is no choice. Where there is, `router` says which
        parameters choose, and the module has the methods `scores` and `with_scores` of
        `research.modules.routed_conv.RoutedNetwork`."""
        return 0

    def active_params(self) -> int:
        """Returns how many parameters one token, or image, meets: where it is sent to some of them, those."""
        return abstract(self).num_params()

    # -- what is told of its layers ----------------------------------------------------------------------------

    def layer_places(self) -> tuple[tuple[str, int], ...]:
        """Returns where the arrays of each layer lie, in order: (prefix of their names, index on their first axis); ()
        where nobody asks."""
        return ()

    def layer_labels(self, path: str, stacked: tuple[int, ...] = ()) -> list[str]:
        """Returns what the log calls the layers of the module at `path`: layer0, layer1, ... in the order of
        `layer_places` where that names them, else by their path.

        Args:
          stacked: shape of the axes of layers in front of the module's arrays, () of a layer by itself.
        """
        places = enumerate(self.layer_places())
        names = {i: f"layer{n}" for n, (prefix, i) in places if f"{path}/".startswith(f"{prefix}/")}
        return [names.get(i, f"{path}[{i}]" if stacked else path) for i in range(math.prod(stacked))]

    def observations(self, params: Arrays, stats: Arrays) -> Mapping[str, float]:
        """Returns what an evaluation logs of the weights themselves, name in metrics.jsonl -> number.

        Args:
          params, stats: of the full network, as they are evaluated.
        """
        del params, stats
        return {}


class ChoosesImplementations(ModelConfig):
    """A model whose field `implementation` chooses among the implementations of its ops."""

    renamed: ClassVar[dict[str, str]] = {"form": "implementation"}

    implementation: str

    def with_implementation(self, implementation: str) -> Self:
        return dataclasses.replace(self, implementation=implementation)

    def on_cpu(self) -> Self:
        return self.with_implementation(implementations.on_cpu(self.implementation))

    def counted(self) -> tuple[Self, int]:
        """By the reference implementations."""
        return self.with_implementation("naive"), 1
