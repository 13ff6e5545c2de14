"""The adversarial objectives of tokenizer training and their regularisation.

Legend: B batch, C channels, H W pixels. Logits have the batch first and any axes behind.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from smalti.core import distributed
from smalti.core.errors import UserError
from smalti.core.training.augmentation import augmented
from smalti.core.training.options import Adversarial, LeCam

ADAPTIVE_EPSILON = 1e-4


def generator_loss(generated: Tensor, objective: Literal["hinge", "non-saturating"]) -> Tensor:
    """What the generator minimises of logits: `-mean D`, or `-mean log sigmoid(D)`."""
    return -generated.mean() if objective == "hinge" else F.softplus(-generated).mean()


def discriminator_loss(real: Tensor, generated: Tensor, objective: Literal["hinge", "vanilla"]) -> Tensor:
    """What the discriminator minimises, half the sum of a term for real and one for generated images.

    `hinge`: max(0, 1 - D(real)) and max(0, 1 + D(generated)); `vanilla`: -log sigmoid(D(real)) and
    -log sigmoid(-D(generated)).
    """
    if objective == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + generated).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(generated).mean())


def gradient_penalty(logits: Tensor, images: Tensor, scale: float = 1.0) -> Tensor:
    """R1, half the mean squared norm of the gradient of logits at real images (Mescheder et al. 2018, equation 9).

    Logits are multiplied by `scale` on their way back, so that gradients in float16 do not become 0.
    """
    (gradient,) = torch.autograd.grad(scale * logits.sum(), images, create_graph=True)
    return 0.5 * (gradient.float() / scale).square().flatten(1).sum(1).mean()


def adaptive_weight(reference: Tensor, adversarial: Tensor, weight: Tensor, limit: float, scale: float = 1.0) -> Tensor:
    """The ratio of the gradients' norms at `weight`, `|d reference| / (|d adversarial| + 1e-4)` (VQGAN, equation 7).

    Norms are taken in float32. A gradient that left the range of half precision makes the ratio 0: better no
    adversarial term in one update than a wrong one.

    Args:
        reference: the sum of the losses between reconstructions and images.
        adversarial: the generator's term.
        weight: of the decoder's last layer.
        limit: of the ratio.
        scale: of both values on their way back, so that gradients in float16 do not become 0.

    Returns:
        A scalar without gradient, in [0, limit].

    Raises:
        UserError: one of the two does not depend on `weight`.
    """
    norms = []
    for value in (reference, adversarial):
        (gradient,) = torch.autograd.grad(scale * value, weight, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise UserError(
                "adaptive: the losses do not depend on what was found to be the decoder's last layer, of shape "
                f"{tuple(weight.shape)}; give the decoder an attribute last_weight"
            )
        norms.append(gradient.float().norm() / scale)
    ratio = norms[0] / (norms[1] + ADAPTIVE_EPSILON)
    return torch.where(torch.isfinite(ratio), ratio, 0.0).clamp(0.0, limit).detach()


def last_weight(tokenizer: nn.Module) -> nn.Parameter:
    """The weight of the decoder's last layer that learns: its `last_weight`, or the last one of two axes or more.

    Raises:
        UserError: nothing in the decoder learns.
    """
    decoder = getattr(tokenizer, "decoder", tokenizer)
    named = getattr(decoder, "last_weight", None)
    if isinstance(named, nn.Parameter) and named.requires_grad:
        return named
    weights = [weight for weight in decoder.parameters() if weight.requires_grad and weight.ndim >= 2]
    if not weights:
        raise UserError("adaptive: no layer of the decoder learns, so there is no gradient to compare")
    return weights[-1]


class LeCamRegularization:
    """LeCam regularisation with its running averages (Tseng et al. 2021).

    Attributes:
        averages: of the real and of the generated logits, `(2,)`, over all processes, from 0.
    """

    def __init__(self, options: LeCam) -> None:
        self.options = options
        self.averages = torch.zeros(2)

    def __call__(self, real: Tensor, generated: Tensor) -> Tensor:
        """The unweighted term for a batch's logits; moves the averages."""
        if self.options.update == "before":
            self._move(real, generated)
        average_real, average_generated = self.averages.to(real.device, torch.float32).clone()
        if self.options.of == "mean":
            real, generated = real.mean(), generated.mean()
        term = F.relu(real - average_generated).square().mean() + F.relu(average_real - generated).square().mean()
        if self.options.update == "after":
            self._move(real, generated)
        return term

    @torch.no_grad()
    def _move(self, real: Tensor, generated: Tensor) -> None:
        means = torch.stack([real.detach().float().mean(), generated.detach().float().mean()])
        means = distributed.all_reduce_sum(means) / distributed.world_size()
        self.averages = torch.lerp(means, self.averages.to(means.device), self.options.decay)


class Adversary:
    """A discriminator's part in the training of a tokenizer.

    Args:
        options: of the adversarial term.
        discriminator: the network itself, not what data-parallel training wraps around it.
        weight: of the decoder's last layer, for the adaptive weight.

    Attributes:
        loss_scale: what losses are multiplied by before they go back.
    """

    def __init__(self, options: Adversarial, discriminator: nn.Module, weight: nn.Parameter | None) -> None:
        self.options = options
        self.discriminator = discriminator
        self.weight = weight
        self.lecam = LeCamRegularization(options.lecam) if options.lecam is not None else None
        self.loss_scale = 1.0

    def generator_term(self, images: Tensor, reference: Tensor, step: int) -> Tensor:
        """The weighted term of reconstructions `(B, C, H, W)`; `reference` is the sum of their other losses."""
        term = generator_loss(
            self._pooled(self._judged(self._seen(images, step)), "generator"), self.options.generator_objective
        )
        if self.weight is None:
            return self.options.weight * term
        ratio = adaptive_weight(reference, term, self.weight, self.options.adaptive_limit, self.loss_scale)
        return self.options.weight * ratio * term

    def discriminator_terms(
        self, discriminator: nn.Module, images: Tensor, reconstructions: Tensor, step: int
    ) -> dict[str, Tensor]:
        """The discriminator's weighted terms.

        Args:
            discriminator: as the loop wrapped it.
            images: `(B, C, H, W)`.
            reconstructions: the same without gradients.
            step: updates so far.
        """
        options = self.options
        if options.r1 is not None:
            images = images.detach().requires_grad_()
        real = discriminator(self._seen(images, step))
        generated = discriminator(self._seen(reconstructions, step))
        terms = {"discriminator": self._objective(real, generated)}
        if self.lecam is not None:
            terms["lecam"] = self.lecam.options.weight * self.lecam(real, generated)
        if options.r1 is not None:
            terms["r1"] = options.r1 * gradient_penalty(real, images, self.loss_scale)
        return {name: options.discriminator_weight * term for name, term in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, beside the discriminator."""
        return {} if self.lecam is None else {"lecam": self.lecam.averages.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        if self.lecam is not None and "lecam" in state:
            self.lecam.averages = state["lecam"].clone()

    def _objective(self, real: Tensor, generated: Tensor) -> Tensor:
        return discriminator_loss(self._pooled(real, "all"), self._pooled(generated, "all"), self.options.objective)

    def _pooled(self, logits: Tensor, whose: Literal["generator", "all"]) -> Tensor:
        """Logits, averaged over each image where that is asked for `whose` objective."""
        chosen = self.options.image_logits
        return logits.flatten(1).mean(1) if chosen in ("all", whose) else logits

    def _seen(self, images: Tensor, step: int) -> Tensor:
        return images if self.options.augment is None else augmented(images, self.options.augment, step)

    def _judged(self, images: Tensor) -> Tensor:
        """The discriminator's logits with gradients to the images but none to its weights.

        Calls the network beneath DDP's wrapper, which would wait for gradients that never come.
        """
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        logits: Tensor = functional_call(self.discriminator, frozen, (images,))
        return logits
