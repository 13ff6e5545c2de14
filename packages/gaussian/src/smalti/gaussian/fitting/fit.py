"""Fitting one picture with Gaussians by gradient descent (the task of GaussianImage, arXiv 2403.08551).

Shapes: N Gaussians, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.options import Options, sentences
from smalti.gaussian.fitting.picture import GaussianPicture
from smalti.gaussian.fitting.start import starting_picture

# Adam's step sizes: centres in distances between neighbours, logarithms of scales, radians, levels of colour.
LEARNING_RATES = {"centres": 0.1, "log_scales": 0.06, "rotations": 0.06, "colours": 0.04}
BETAS = (0.9, 0.9)
EPSILON = 1e-15  # gradients of a mean over many pixels are tiny; Adam's usual 1e-8 would damp them


class FitOptions(Options):
    """How a picture is fitted.

    Args:
        gaussians: N.
        steps: updates of all Gaussians on the whole picture.
        seed: of the centres they begin at.
        rate: multiplies all learning rates.
        final_rate: what is left of the learning rates at the last step; they fall exponentially.
    """

    gaussians: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=0)] = 2000
    seed: Annotated[int, Field(ge=0)] = 0
    rate: Annotated[float, Field(gt=0)] = 1.0
    final_rate: Annotated[float, Field(gt=0, le=1)] = 0.05


class Step(NamedTuple):
    """After how many updates, and the PSNR in dB that the picture had before the last of them."""

    number: int
    psnr: float


@dataclass(frozen=True)
class Fit:
    """What `fit_image` gives: the Gaussians, and the PSNR in dB of their rendering in 8 bits."""

    picture: GaussianPicture
    psnr: float


class Fitting:
    """A fit under way; it can be stopped after any step and taken up from its `state`."""

    def __init__(self, image: Tensor, options: FitOptions, start: GaussianPicture | None = None) -> None:
        """Begin from `start`, by default from the picture's own changes.

        Args:
            image: [C, H, W] float in [0, 1]; the fit runs on its device.
            options: of the fit.
            start: N Gaussians for a picture of this size.

        Raises:
            UserError: not such an image, or more Gaussians than pixels.
        """
        check_image(image)
        _, height, width = image.shape
        if options.gaussians > height * width:
            raise UserError(
                f"gaussians must be at most one per pixel, {height * width} for {width} x {height} pixels, "
                f"got {options.gaussians}"
            )
        self.image = image.detach()
        self.options = options
        self.done = 0
        self._size = image.new_tensor((width, height))
        self._spacing = math.sqrt(height * width / options.gaussians)
        start = start or starting_picture(self.image, options.gaussians, options.seed)
        values = {
            "centres": (start.means.to(image) + 1) / 2 * self._size / self._spacing,
            "log_scales": start.scales.to(image).log(),
            "rotations": start.rotations.to(image),
            "colours": start.colours.to(image),
        }
        self._parameters = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            for name, tensor in values.items()
        }
        groups = [{"params": [tensor], "lr": LEARNING_RATES[name]} for name, tensor in self._parameters.items()]
        self._optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)

    def picture(self) -> GaussianPicture:
        """The Gaussians as they are now, with gradients to the parameters."""
        values = self._parameters
        return GaussianPicture(
            means=values["centres"] * self._spacing / self._size * 2 - 1,
            scales=values["log_scales"].exp(),
            rotations=values["rotations"],
            colours=values["colours"],
            height=self.image.shape[1],
            width=self.image.shape[2],
        )

    def steps(self, seen: Callable[[GaussianPicture], GaussianPicture] = lambda picture: picture) -> Iterator[Step]:
        """Do the steps that are left, one at a time; `seen` changes what is rendered, e.g. rounds it."""
        while self.done < self.options.steps:
            rate = self.options.rate * self.options.final_rate ** (self.done / self.options.steps)
            for group, base in zip(self._optimizer.param_groups, LEARNING_RATES.values(), strict=True):
                group["lr"] = base * rate
            loss = (seen(self.picture()).render() - self.image).square().mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self.done += 1
            yield Step(self.done, decibels(loss.item()))

    def state(self) -> dict[str, Tensor]:
        """Parameters, moments and step, as tensors by name."""
        tensors = {"done": torch.tensor(self.done)}
        for name, tensor in self._parameters.items():
            tensors[name] = tensor.detach().cpu().clone()
            for key, value in self._optimizer.state[tensor].items():
                tensors[f"{name}.{key}"] = value.detach().cpu().clone()
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave for the same image and options: the steps that follow are the same."""
        self.done = int(state["done"])
        for name, tensor in self._parameters.items():
            tensor.data.copy_(state[name])
            prefix = f"{name}."
            moments = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
            self._optimizer.state[tensor] = {key: value.to(tensor.device).clone() for key, value in moments.items()}


def fit_image(
    image: Tensor, gaussians: int, *, steps: int = 2000, seed: int = 0, told: Callable[[Step], None] | None = None
) -> Fit:
    """Fit one picture with Gaussians.

    Args:
        image: [C, H, W] float in [0, 1].
        gaussians: how many, at most one per pixel.
        steps: updates; more are better, at the same time each.
        seed: of the centres they begin at.
        told: called after every step.

    Raises:
        UserError: not such an image, or numbers out of range.
    """
    try:
        options = FitOptions(gaussians=gaussians, steps=steps, seed=seed)
    except ValidationError as error:
        raise UserError(f"fit: {sentences(error)}") from None
    fitting = Fitting(image, options)
    for step in fitting.steps():
        if told is not None:
            told(step)
    picture = fitting.picture().detached()
    return Fit(picture, psnr(picture, image))


@torch.no_grad()
def psnr(picture: GaussianPicture, image: Tensor) -> float:
    """PSNR in dB of the rendering in 8 bits against an image [C, H, W] in [0, 1]."""
    rendering = (picture.detached().render().clamp(0, 1) * 255).round() / 255
    return decibels((rendering - image.cpu()).square().mean().item())


def decibels(mean_square: float) -> float:
    """PSNR in dB for values in [0, 1]; 100 where there is no difference, as far as 8 bits can tell."""
    return min(100.0, -10 * math.log10(max(mean_square, 1e-10)))


def check_image(image: Tensor) -> None:
    """Raise a `UserError` unless `image` is a float [C, H, W] in [0, 1] with pixels."""
    if image.ndim != 3 or not image.is_floating_point() or not image.numel():
        raise UserError(f"image must be float [channels, height, width], got {image.dtype} {list(image.shape)}")
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise UserError("image must have values in [0, 1], but some lie outside")
