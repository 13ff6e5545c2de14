"""A picture as a set of Gaussians: rendered at any resolution, kept in a safetensors file.

Shapes: N Gaussians, C channels, H W pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import parse_json, write_bytes
from smalti.gaussian.gaussians import Gaussians

FORMAT = "smalti-gaussian-picture-1"
# Pixels are sampled in their middle, so that a rendering at another resolution shows the same picture unshifted.
PIXEL_CENTER = 0.5


@dataclass(frozen=True)
class GaussianPicture:
    """Gaussians whose plain sum is a picture: image_c = Σ_n exp(-½ dᵀ Σ_n⁻¹ d) colours_nc.

    Args:
        means: [N, 2], centres (x, y): -1 is the left or upper edge of the picture, +1 the right or lower.
        scales: [N, 2], standard deviations along the axes of each ellipse, in pixels of a picture of `height` and
            `width`.
        rotations: [N], radians, as in `rasterize_gaussians_2d`.
        colours: [N, C], any values; their sums are 0 for black and 1 for white. Opacity is part of them.
        height: H of the picture they were fitted to.
        width: W of it.
    """

    means: Tensor
    scales: Tensor
    rotations: Tensor
    colours: Tensor
    height: int
    width: int

    def render(self, scale: float = 1.0) -> Tensor:
        """Draw the picture, [C, round(scale H), round(scale W)], not clamped; differentiable.

        Raises:
            UserError: what `rendered_size` says.
        """
        height, width = rendered_size(self.height, self.width, scale)
        return self.gaussians().enlarged(scale).rasterize(height, width, pixel_center=PIXEL_CENTER)[0]

    def gaussians(self) -> Gaussians:
        """The same as one image of a batch."""
        opacities = torch.ones_like(self.rotations)
        return Gaussians(
            *(tensor[None] for tensor in (self.means, self.scales, self.rotations, self.colours, opacities))
        )

    def detached(self) -> GaussianPicture:
        """The same without gradients, on the CPU."""
        return self.replaced({name: tensor.detach().cpu() for name, tensor in self.tensors().items()})

    def replaced(self, tensors: Mapping[str, Tensor]) -> GaussianPicture:
        """The same size with other tensors, all of them by name."""
        return GaussianPicture(**tensors, height=self.height, width=self.width)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}

    def save(self, path: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write a safetensors file with the tensors under their names, float32.

        The entry `smalti` of its metadata is JSON: `format`, `height`, `width`, `pixel_center`, and `facts`.
        """
        tensors = {name: tensor.float().contiguous() for name, tensor in self.detached().tensors().items()}
        known = {"height": self.height, "width": self.width, "pixel_center": PIXEL_CENTER}
        write_file(Path(path), FORMAT, tensors, {**known, "facts": dict(facts or {})})

    @classmethod
    def load(cls, path: str | Path) -> GaussianPicture:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or holds something else.
        """
        tensors, facts = read_file(Path(path), FORMAT)
        try:
            return cls(**tensors, height=facts["height"], width=facts["width"])
        except (LookupError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from None


def rendered_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Rows and columns of a picture that is drawn `scale` times as large.

    Raises:
        UserError: nothing would be left.
    """
    if not math.isfinite(scale) or min(round(scale * height), round(scale * width)) < 1:
        raise UserError(f"scale {scale:g} leaves nothing of a picture of {width} x {height} pixels")
    return round(scale * height), round(scale * width)


def write_file(path: Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
    """Write tensors with `facts` and their `format`; gives the size in bytes.

    All facts are one entry: safetensors writes several in an order of chance.
    """
    content = save(dict(tensors), {"smalti": json.dumps({"format": kind, **facts})})
    write_bytes(path, content)
    return len(content)


def read_file(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file that `write_file` wrote as `kind`.

    Raises:
        UserError: the file is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a file of the format {kind}")
    try:
        with safe_open(path, "pt") as file:
            facts = parse_json((file.metadata() or {}).get("smalti", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != kind:
        raise UserError(f"{path} has the format {found!r}, expected {kind!r}")
    return tensors, facts
