"""What the training stages train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.autoencoder import Autoencoder, AutoencoderOutput
from smalti.core.contracts import Generator, Tokenizer, TokenizerOutput
from smalti.core.data.loader import Batch
from smalti.core.errors import UserError
from smalti.core.losses.terms import LossTerms
from smalti.core.training.adversarial import Adversary, last_weight
from smalti.core.training.options import Optimization, TokenizerTraining
from smalti.core.training.perturbation import LatentPerturbation
from smalti.core.training.task import Objective, Task
from smalti.core.training.text import TextFeatures
from smalti.core.training.token_health import TokenHealth

Output = TokenizerOutput | AutoencoderOutput


class TokenizerTask(Task):
    """A tokenizer or an autoencoder, fitted to reconstruct, perhaps against a discriminator.

    Args:
        model: what is trained, frozen where it is not.
        options: how.
        text: makes features of the texts of a batch, which the decoder reads.
        classes: names of the classes, for images without a text.

    Raises:
        UserError: losses or terms that cannot be had for the model, or go ill together.
    """

    def __init__(
        self,
        model: Tokenizer | Autoencoder,
        options: TokenizerTraining,
        text: TextFeatures | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.options, self.text, self.classes = options, text, classes
        self.main = model.kind
        self.models = {self.main: model}
        self.losses = LossTerms(options.losses, model)
        self.device = torch.device("cpu")  # of the losses
        self.perturbation: LatentPerturbation | None = None
        if isinstance(model, Tokenizer):
            self.health = TokenHealth(model)
            if options.perturbation is not None:
                self.perturbation = LatentPerturbation(options.perturbation, model)
        elif options.perturbation is not None:
            raise UserError("perturbation needs tokens, which an autoencoder does not have")
        self.adversary: Adversary | None = None
        adversarial = options.adversarial
        if adversarial is not None:
            discriminator = adversarial.discriminator.build(model.preprocessing.channels)
            self.models["discriminator"] = discriminator
            self.first_steps = {"discriminator": adversarial.discriminator_start}
            weight = last_weight(model) if adversarial.adaptive else None
            self.adversary = Adversary(adversarial, discriminator, weight)
            self.whole = () if weight is None else (weight,)
        if self.losses.of_proxy and adversarial is not None:
            raise UserError("proxy codes are learned without pixels: leave adversarial out, or take losses of pixels")
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
        rates = ("warmup_steps", "warmup_from", "final_ratio")
        own |= {rate: value for rate in rates if (value := getattr(adversarial, rate)) is not None}
        return shared.model_copy(update=own)

    def objectives(self, models: Mapping[str, nn.Module], batch: Batch, step: int) -> Iterator[Objective]:
        """The tokenizer's terms and the discriminator's, on the same reconstructions, in the order of the options."""
        if self.perturbation is not None:
            self.perturbation.step = step
        if self.adversary is not None:
            self.adversary.loss_scale = self.loss_scale
        self._follow(batch.images.device)
        output: Output = models[self.main](batch.images, **self._context(batch))
        if self.health is not None and isinstance(output, TokenizerOutput):
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
        return (self.main, "losses") if "losses" in self.models else (self.main,)

    def _follow(self, device: torch.device) -> None:
        """Move what is not trained to where the images are."""
        if device != self.device:
            self.device = device
            self.losses.to(device)
            if self.text is not None:
                self.text.to(device)

    def _context(self, batch: Batch) -> dict[str, Any]:
        """What the model is told beside the images."""
        proxy = {"proxy": True} if self.losses.of_proxy else {}
        return proxy if self.text is None else proxy | {"text": self.text(batch, self.classes)}

    def _tokenizer_terms(
        self, models: Mapping[str, nn.Module], batch: Batch, output: Output, step: int
    ) -> dict[str, Tensor]:
        image_terms: dict[str, Tensor] = models.get("losses", self.losses)(output, batch.images, step)
        terms = image_terms | self._ramped(output.losses, step)
        if self.adversary is not None and step >= self.adversary.options.start:
            reference = torch.stack([term.float() for term in image_terms.values()]).sum()
            terms["adversarial"] = self.adversary.generator_term(output.images, reference, step)
        return terms

    def _ramped(self, losses: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        ramps = self.options.ramps
        for name in ramps:
            if name not in losses:
                given = ", ".join(losses) or "none"
                raise UserError(f"train.{self.main}.ramps: the {self.main} gives no term {name!r}, it gives {given}")
        return {name: ramps[name](step) * loss if name in ramps else loss for name, loss in losses.items()}

    def _discriminator(
        self, models: Mapping[str, nn.Module], batch: Batch, output: Output, step: int
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
