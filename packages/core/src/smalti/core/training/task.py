"""What the training loop asks of what it trains, and of the batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from smalti.core.training.generator_validator import GeneratorValidator
from smalti.core.training.options import Optimization
from smalti.core.training.token_health import TokenHealth
from smalti.core.training.validator import Validator

Objective = tuple[str | tuple[str, ...], dict[str, Tensor]]


class Batches(Protocol):
    """An endless stream of this process's batches that can tell and take its position."""

    def __next__(self) -> Any:
        """The next batch, a tuple with tensors."""

    def state_dict(self) -> dict[str, Any]:
        """The position: which batch comes next, as `smalti.core.data.position` has it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""


class Task(ABC):
    """What is trained.

    Attributes:
        models: networks by name, each with an optimizer of its own; the first is the one that is kept and
            averaged.
        first_steps: for models that begin to train later; their schedules begin there.
        health: of the tokens it sees, told beside the losses.
        validator: looks at the first model between updates.
        whole: parameters of the first model that objectives look at, so that sharding must not divide them.
        loss_scale: what the loop multiplies losses by before they go back; it keeps this up to date.
    """

    models: dict[str, nn.Module]
    first_steps: Mapping[str, int] = {}
    health: TokenHealth | None = None
    validator: Validator | GeneratorValidator | None = None
    whole: Sequence[nn.Parameter] = ()
    loss_scale: float = 1.0

    def optimization(self, name: str, shared: Optimization) -> Optimization:
        """How the model `name` is trained: as all are, where a task says nothing else."""
        del name
        return shared

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on beside the models, as tensors and plain data, equal on all processes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        del state

    @abstractmethod
    def objectives(self, models: Mapping[str, nn.Module], batch: Any, step: int) -> Iterator[Objective]:
        """Yield, one after the other, whose optimizers step and the weighted terms they minimise.

        `models` are `self.models` as the loop wrapped them: call these. The next objective is asked for
        after the step of the one before.
        """
