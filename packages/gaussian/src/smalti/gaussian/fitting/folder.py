"""The folder of a fit: what `smalti fit` writes, and how it goes on where it was stopped.

gaussians.safetensors   the Gaussians, see `GaussianPicture`
rendering.png           what they draw
ellipses.png            their outlines
metrics.json            PSNR, sizes, settings
quantized.safetensors   the Gaussians in few bits, see `save_quantized`; quantized.png, what those draw
fit.gif                 the fit, from its start
state.safetensors       while it is under way: all it needs to go on; frames/, pictures of the animation
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smalti.core.data.images import gif_bytes, png_bytes
from smalti.core.errors import UserError
from smalti.core.files import TEMPORARY, disk_errors, write_bytes, write_json
from smalti.core.progress import Reporter
from smalti.gaussian.drawing import draw_on_images
from smalti.gaussian.fitting.fit import FitOptions, Fitting, psnr
from smalti.gaussian.fitting.picture import FORMAT as PICTURE_FORMAT
from smalti.gaussian.fitting.picture import GaussianPicture, read_file, rendered_size, write_file
from smalti.gaussian.fitting.quantized import Bits, Tuning, save_quantized

GAUSSIANS, STATE, FRAMES = "gaussians.safetensors", "state.safetensors", "frames"
STATE_FORMAT = "smalti-gaussian-fit-1"
SAVE_SECONDS = 30.0
LARGEST = 2**28  # pixels of a rendering
ANIMATED = 48  # pictures of an animation, more of them where more happens: at the start
ANIMATED_SIDE = 512  # pixels of its longer side
FRAME_MILLISECONDS, LAST_MILLISECONDS = 80, 2000


@dataclass(frozen=True)
class Wanted:
    """What is written of a fit.

    Args:
        scale: of the pictures, 1 is the size of the image.
        bits: of the quantized file; None writes none.
        tuning_steps: updates with rounded numbers before it is written.
        gif: keep an animation.
    """

    scale: float = 1.0
    bits: Bits | None = None
    tuning_steps: int = 200
    gif: bool = False


class FitFolder:
    """One fit in its folder."""

    def __init__(self, path: Path, image: Tensor, options: FitOptions, wanted: Wanted, reporter: Reporter) -> None:
        """Look at what is there already; nothing is written.

        Args:
            path: a folder, made where there is none.
            image: [C, H, W] float in [0, 1]; the fit runs on its device.
            options: of the fit.
            wanted: beside the Gaussians.
            reporter: told how far it is.

        Raises:
            UserError: options that do not go with the image, a rendering that would be too small or too large, or a
                folder that holds something else.
        """
        self.path, self.image, self.wanted, self.reporter = path, image, wanted, reporter
        channels, height, width = image.shape
        rendered_size(height, width, wanted.scale)
        if height * width * wanted.scale**2 > LARGEST:
            raise UserError(
                f"scale {wanted.scale:g} makes more than {LARGEST // 10**6} million pixels of {width} x {height}: "
                f"choose a smaller one"
            )
        levels = (image.cpu() * 65535).round().to(torch.int32).numpy().tobytes()
        self.settings = {
            "image": hashlib.sha256(levels).hexdigest()[:16],
            "size": f"{width} x {height} x {channels}",
            **options.model_dump(mode="json"),
            "gif": wanted.gif,
        }
        self.fitting = Fitting(image, options)
        self._finished = self._taken_up()

    def run(self) -> Iterator[str]:
        """Fit what is left and write the files; yields what is to be said about them."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            picture = self._finished or self._fitted()
            count, done = len(picture.means), self.fitting.options.steps
            metrics: dict[str, Any] = {**self.settings, "psnr": psnr(picture, self.image)}
            metrics |= self._sizes(self.path / GAUSSIANS)
            yield (
                f"{count} Gaussians, {self.settings['size']}, {done} steps: PSNR {metrics['psnr']:.2f} dB, "
                f"{metrics['bits_per_pixel']:.3g} bits per pixel in float32"
            )
            self._draw(picture)
            pictures = ["rendering.png", "ellipses.png"]
            if self.wanted.bits is not None:
                metrics["quantized"] = self._quantized(picture, self.wanted.bits)
                yield (
                    "quantized: PSNR {psnr:.2f} dB ({psnr_rounded:.2f} dB without fine-tuning), "
                    "{bits_per_pixel:.3g} bits per pixel, {bytes} bytes"
                ).format(**metrics["quantized"])
                pictures.append("quantized.png")
            write_json(self.path / "metrics.json", metrics)
            if self.wanted.gif:
                if self._finished is None:  # else it was written when the fit ended
                    self._animate()
                pictures.append("fit.gif")
            (self.path / STATE).unlink(missing_ok=True)
            # After the state: a fit that is taken up again needs all of them.
            shutil.rmtree(self.path / FRAMES, ignore_errors=True)
            yield f"pictures: {', '.join(str(self.path / name) for name in pictures)}"

    def _taken_up(self) -> GaussianPicture | None:
        """Go on with the fit that is there, if one is; give its picture where it was finished."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give a folder")
        if (self.path / STATE).exists():
            tensors, metadata = read_file(self.path / STATE, STATE_FORMAT)
            self._check(metadata["settings"])
            self.fitting.load_state(tensors)
        elif (self.path / GAUSSIANS).exists():
            _, metadata = read_file(self.path / GAUSSIANS, PICTURE_FORMAT)
            self._check(metadata["facts"])
            return GaussianPicture.load(self.path / GAUSSIANS)
        elif self.path.exists() and any(path.suffix != TEMPORARY for path in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no fit: give another folder")
        return None

    def _check(self, settings: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise UserError(
                    f"{self.path} holds a fit with {name} {settings.get(name)}, not {value}: "
                    f"give another folder, or remove it first"
                )

    def _fitted(self) -> GaussianPicture:
        fitting, total = self.fitting, self.fitting.options.steps
        frames = _frames(total) if self.wanted.gif else set()
        saved = time.monotonic()
        try:
            if not fitting.done:
                self._save()  # so that the folder is known as that of a fit from now on
                if frames:
                    self._frame()
            with self.reporter.progress("fit", total, fitting.done) as tell:
                for step in fitting.steps():
                    tell(1, f"PSNR {step.psnr:.2f} dB")
                    if step.number in frames:
                        self._frame()
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save()
                        saved = time.monotonic()
        finally:
            self._save()
        return fitting.picture().detached()

    def _save(self) -> None:
        """The state first: where it is missing, the Gaussians are those of a fit that is done."""
        picture = self.fitting.picture().detached()
        write_file(self.path / STATE, STATE_FORMAT, self.fitting.state(), {"settings": self.settings})
        picture.save(self.path / GAUSSIANS, {**self.settings, "done": self.fitting.done})
        write_bytes(self.path / "rendering.png", png_bytes(_pixels(picture)))

    def _draw(self, picture: GaussianPicture) -> None:
        rendering = _pixels(picture, self.wanted.scale)
        write_bytes(self.path / "rendering.png", png_bytes(rendering))
        image = torch.from_numpy(rendering).permute(2, 0, 1) / 127.5 - 1
        ellipses = draw_on_images(
            picture.gaussians(), image[None], (picture.height, picture.width), (image.shape[1], image.shape[2])
        )
        write_bytes(self.path / "ellipses.png", png_bytes(ellipses[0].permute(1, 2, 0)))

    def _quantized(self, picture: GaussianPicture, bits: Bits) -> dict[str, Any]:
        tuning = Tuning(picture, self.image, bits, self.wanted.tuning_steps)
        best = tuning.picture()
        rounded = psnr(best, self.image)
        with self.reporter.progress("fine-tuning", self.wanted.tuning_steps) as tell:
            for step in tuning.steps():
                tell(1, f"PSNR {step.psnr:.2f} dB")
        tuned = tuning.picture()
        if psnr(tuned, self.image) > rounded:
            best = tuned
        path = self.path / "quantized.safetensors"
        save_quantized(path, best, tuning.levels)
        write_bytes(self.path / "quantized.png", png_bytes(_pixels(best, self.wanted.scale)))
        return {
            **bits.model_dump(mode="json"),
            "tuning_steps": self.wanted.tuning_steps,
            "psnr_rounded": rounded,
            "psnr": psnr(best, self.image),
            **self._sizes(path),
        }

    def _sizes(self, path: Path) -> dict[str, float]:
        size = path.stat().st_size
        return {"bytes": size, "bits_per_pixel": 8 * size / self.image[0].numel()}

    def _frame(self) -> None:
        scale = min(1.0, ANIMATED_SIDE / max(self.image.shape[1:]))
        pixels = _pixels(self.fitting.picture().detached(), scale)
        write_bytes(self.path / FRAMES / f"{self.fitting.done:08d}.png", png_bytes(pixels))

    def _animate(self) -> None:
        frames = []
        for path in sorted((self.path / FRAMES).glob("*.png")):
            with Image.open(path) as file:
                frames.append(file.convert("RGB").quantize(256))
        write_bytes(self.path / "fit.gif", gif_bytes(frames, FRAME_MILLISECONDS, LAST_MILLISECONDS))


@torch.no_grad()
def _pixels(picture: GaussianPicture, scale: float = 1.0) -> NDArray[np.uint8]:
    """The rendering, uint8 [H, W, 3]."""
    levels = (picture.render(scale).clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _frames(steps: int) -> set[int]:
    """The steps after which a picture is kept: 0, the last, and between them ever fewer."""
    exponents = np.linspace(0, math.log(steps + 1), ANIMATED)
    return {round(math.exp(exponent)) - 1 for exponent in exponents.tolist()}
