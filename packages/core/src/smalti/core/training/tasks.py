"""What the two training stages train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.func import functional_call

from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.loader import Batch
from smalti.core.training.hinge import hinge_discriminator, hinge_generator
from smalti.core.training.loop import Objective, Task
from smalti.core.training.options import TokenizerTraining
from smalti.core.training.token_health import TokenHealth


class TokenizerTask(Task):
    """A tokenizer, fitted to reconstruct, perhaps against a discriminator."""

    health: TokenHealth

    def __init__(self, tokenizer: Tokenizer, options: TokenizerTraining) -> None:
        self.models = {"tokenizer": tokenizer}
        self.health = TokenHealth(tokenizer)
        self.losses = [(loss.name, loss.weight, loss.build()) for loss in options.losses]
        self.adversarial = options.adversarial
        if self.adversarial is not None:
            channels = tokenizer.preprocessing.channels
            self.models["discriminator"] = self.adversarial.discriminator.build(channels)
            self.learning_rates = {"discriminator": self.adversarial.learning_rate}

    def objectives(self, models: Mapping[str, nn.Module], batch: Batch, step: int) -> Iterator[Objective]:
        """The tokenizer's terms, then the discriminator's on the same reconstructions."""
        output = models["tokenizer"](batch.images)
        self.health.update(output.tokens)
        terms: dict[str, Tensor] = {
            name: weight * loss(output.images, batch.images) for name, weight, loss in self.losses
        }
        terms |= output.losses
        adversarial = self.adversarial
        if adversarial is not None and step >= adversarial.start:
            terms["adversarial"] = adversarial.weight * hinge_generator(self._judged(output.images))
        yield "tokenizer", terms
        if adversarial is not None:
            discriminator = models["discriminator"]
            real, generated = discriminator(batch.images), discriminator(output.images.detach())
            yield "discriminator", {"discriminator": hinge_discriminator(real, generated)}

    def _judged(self, images: Tensor) -> Tensor:
        """The discriminator's logits with gradients to the images but none to its weights.

        Calls the network beneath DDP's wrapper, which would wait for gradients that never come.
        """
        discriminator = self.models["discriminator"]
        frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
        logits: Tensor = functional_call(discriminator, frozen, (images,))
        return logits


class GeneratorTask(Task):
    """A generator, fitted to the tokens of labelled images."""

    def __init__(self, generator: Generator) -> None:
        self.models = {"generator": generator}

    def objectives(
        self, models: Mapping[str, nn.Module], batch: tuple[Tensor, Tensor], step: int
    ) -> Iterator[Objective]:
        """The generator's own loss."""
        tokens, labels = batch
        yield "generator", models["generator"](tokens, labels)
