"""What the two training stages train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.contracts import Generator, Tokenizer, TokenizerOutput
from smalti.core.data.loader import Batch
from smalti.core.losses.terms import LossTerms
from smalti.core.training.adversarial import Adversary, last_weight
from smalti.core.training.options import Optimization, TokenizerTraining
from smalti.core.training.perturbation import LatentPerturbation
from smalti.core.training.task import Objective, Task
from smalti.core.training.token_health import TokenHealth


class TokenizerTask(Task):
    """A tokenizer, fitted to reconstruct, perhaps against a discriminator."""

    health: TokenHealth

    def __init__(self, tokenizer: Tokenizer, options: TokenizerTraining) -> None:
        self.options = options
        self.models = {"tokenizer": tokenizer}
        self.health = TokenHealth(tokenizer)
        self.losses = LossTerms(options.losses, tokenizer)
        self.device = torch.device("cpu")  # of the losses
        self.perturbation = (
            LatentPerturbation(options.perturbation, tokenizer) if options.perturbation is not None else None
        )
        self.adversary: Adversary | None = None
        adversarial = options.adversarial
        if adversarial is not None:
            discriminator = adversarial.discriminator.build(tokenizer.preprocessing.channels)
            self.models["discriminator"] = discriminator
            self.first_steps = {"discriminator": adversarial.discriminator_start}
            self.adversary = Adversary(
                adversarial, discriminator, last_weight(tokenizer) if adversarial.adaptive else None
            )
        if self.losses.trainable:
            self.models["losses"] = self.losses

    def optimization(self, name: str, shared: Optimization) -> Optimization:
        """The discriminator has a learning rate of its own, and perhaps more."""
        adversarial = self.options.adversarial
        if name != "discriminator" or adversarial is None:
            return shared
        own: dict[str, Any] = {
            "learning_rate": adversarial.learning_rate,
            "steps": max(shared.steps - adversarial.discriminator_start, 1),
        }
        if adversarial.weight_decay is not None:
            own |= {"weight_decay": adversarial.weight_decay, "final_weight_decay": None}
        if adversarial.warmup_steps is not None:
            own["warmup_steps"] = adversarial.warmup_steps
        return shared.model_copy(update=own)

    def objectives(self, models: Mapping[str, nn.Module], batch: Batch, step: int) -> Iterator[Objective]:
        """The tokenizer's terms and the discriminator's, on the same reconstructions, in the order of the options."""
        if self.perturbation is not None:
            self.perturbation.step = step
        if self.adversary is not None:
            self.adversary.loss_scale = self.loss_scale
        output = models["tokenizer"](batch.images)
        self.health.update(output.tokens)
        first = self.adversary is not None and self.adversary.options.discriminator_first
        if first:
            yield from self._discriminator(models, batch, output, step)
        yield self._learners, self._tokenizer_terms(models, batch, output, step)
        if not first:
            yield from self._discriminator(models, batch, output, step)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, beside the models."""
        return {} if self.adversary is None else self.adversary.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        if self.adversary is not None:
            self.adversary.load_state_dict(state)

    @property
    def _learners(self) -> tuple[str, ...]:
        return ("tokenizer", "losses") if "losses" in self.models else ("tokenizer",)

    def _tokenizer_terms(
        self, models: Mapping[str, nn.Module], batch: Batch, output: TokenizerOutput, step: int
    ) -> dict[str, Tensor]:
        if batch.images.device != self.device:
            self.device = batch.images.device
            self.losses.to(self.device)
        image_terms: dict[str, Tensor] = models.get("losses", self.losses)(output, batch.images, step)
        terms = image_terms | self._ramped(output.losses, step)
        if self.adversary is not None and step >= self.adversary.options.start:
            reference = torch.stack([term.float() for term in image_terms.values()]).sum()
            terms["adversarial"] = self.adversary.generator_term(output.images, reference, step)
        return terms

    def _ramped(self, losses: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        ramps = self.options.ramps
        return {name: ramps[name](step) * loss if name in ramps else loss for name, loss in losses.items()}

    def _discriminator(
        self, models: Mapping[str, nn.Module], batch: Batch, output: TokenizerOutput, step: int
    ) -> Iterator[Objective]:
        if self.adversary is None or step < self.adversary.options.discriminator_start:
            return
        terms = self.adversary.discriminator_terms(models["discriminator"], batch.images, output.images.detach(), step)
        yield ("discriminator",), terms


class GeneratorTask(Task):
    """A generator, fitted to the tokens of labelled images."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.models = {"generator": generator}

    def objectives(
        self, models: Mapping[str, nn.Module], batch: tuple[Tensor, Tensor], step: int
    ) -> Iterator[Objective]:
        """The generator's own loss."""
        tokens, labels = batch
        self.generator.begin_step(step)
        yield "generator", models["generator"](tokens, labels)
