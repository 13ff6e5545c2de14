"""A fitted picture in few bits: uniform levels for every number, Gaussians in Morton order, entropy coding.

Rounding costs quality; `fine_tuned` wins most of it back by fitting on with the rounding in the loop.

Shapes: N Gaussians, C channels.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.options import Options
from smalti.gaussian.fitting.fit import FitOptions, Fitting, Step
from smalti.gaussian.fitting.picture import GaussianPicture, read_file, write_file

FORMAT = "smalti-gaussian-quantized-1"
# Shares of the values that lie below the lowest level and above the highest: a few outliers would coarsen all others.
TAILS = (0.001, 0.999)
# Of an LZMA coder without matches over several bytes, an adaptive arithmetic coder of each byte by itself.
CODER = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]
# Fine-tuning starts with this share of a fit's learning rates.
TUNING_RATE = 0.03

Depth = Annotated[int, Field(ge=1, le=16)]


class Bits(Options):
    """How many bits a number gets before entropy coding.

    Args:
        means: each of the two coordinates of a centre.
        scales: each of the logarithms of the two scales.
        rotations: the angle, over half a turn.
        colours: each channel.
    """

    means: Depth = 12
    scales: Depth = 7
    rotations: Depth = 7
    colours: Depth = 7

    def of_columns(self, channels: int) -> list[int]:
        """Bits of each of the 5 + C numbers of a Gaussian: x, y, two scales, angle, colours."""
        return [self.means] * 2 + [self.scales] * 2 + [self.rotations] + [self.colours] * channels


def parsed_bits(text: str) -> Bits:
    """`Bits` from four numbers with commas between: of means, scales, rotations and colours.

    Raises:
        UserError: anything else.
    """
    try:
        means, scales, rotations, colours = (int(part) for part in text.split(","))
        return Bits(means=means, scales=scales, rotations=rotations, colours=colours)
    except ValueError:  # pydantic's is one, too
        raise UserError(
            f"bits must be four numbers from 1 to 16, of means, scales, rotations and colours, e.g. 12,7,7,7, "
            f"got {text!r}"
        ) from None


@dataclass(frozen=True)
class Levels:
    """The levels of each of the 5 + C numbers of a Gaussian: `low` + code · `width`, codes 0 to 2^bits - 1.

    Args:
        low: [5 + C], float32.
        width: [5 + C], float32.
        bits: 5 + C numbers.
    """

    low: Tensor
    width: Tensor
    bits: tuple[int, ...]

    @classmethod
    def of(cls, picture: GaussianPicture, bits: Bits) -> Levels:
        """The levels that fit a picture's numbers: from their smallest to their largest, without a few outliers."""
        values = _values(picture.detached())
        depths = tuple(bits.of_columns(values.shape[1] - 5))
        low, high = (torch.quantile(values, share, dim=0) for share in TAILS)
        width = ((high - low) / values.new_tensor([2.0**depth - 1 for depth in depths])).clamp(min=1e-6)
        # Angles have levels all around the half turn, where the last is beside the first.
        low[4], width[4] = 0.0, torch.pi / 2 ** depths[4]
        return cls(low, width, depths)

    def codes(self, picture: GaussianPicture) -> Tensor:
        """The nearest level of every number, [N, 5 + C], int64."""
        steps = ((_values(picture) - self.low) / self.width).round().long()
        highest = torch.tensor([2**depth for depth in self.bits])
        codes = steps.clamp(min=0).minimum(highest - 1)
        codes[:, 4] = steps[:, 4] % highest[4]
        return codes

    def picture(self, codes: Tensor, height: int, width: int) -> GaussianPicture:
        """The picture that codes stand for."""
        values = self.low + codes * self.width
        return GaussianPicture(
            means=values[:, :2].contiguous(),
            scales=values[:, 2:4].exp(),
            rotations=values[:, 4].contiguous(),
            colours=values[:, 5:].contiguous(),
            height=height,
            width=width,
        )

    def rounded(self, picture: GaussianPicture) -> GaussianPicture:
        """The same with the numbers of the nearest levels, and gradients as if they had not been rounded."""
        nearest = self.picture(self.codes(picture.detached()), picture.height, picture.width)
        near, exact = nearest.tensors(), picture.tensors()
        return picture.replaced(
            {name: exact[name] + (near[name].to(exact[name]) - exact[name]).detach() for name in exact}
        )


class Tuning:
    """Fitting on with rounded numbers; the levels stay where they were."""

    def __init__(self, picture: GaussianPicture, image: Tensor, bits: Bits, steps: int) -> None:
        """Start from a fitted picture.

        Args:
            picture: N Gaussians.
            image: [C, H, W] float in [0, 1], what they were fitted to.
            bits: of each number.
            steps: updates.
        """
        self.levels = Levels.of(picture, bits)
        options = FitOptions(gaussians=len(picture.means), steps=steps, rate=TUNING_RATE)
        self._fitting = Fitting(image, options, start=picture)

    def steps(self) -> Iterator[Step]:
        """Do them, one at a time."""
        return self._fitting.steps(self.levels.rounded)

    def picture(self) -> GaussianPicture:
        """The rounded Gaussians as they are now."""
        return self.levels.rounded(self._fitting.picture()).detached()


def save_quantized(path: Path, picture: GaussianPicture, levels: Levels) -> int:
    """Write the nearest codes of a picture; gives the size of the file in bytes.

    It is a safetensors file: `codes`, uint8, the streams one after the other, each compressed by LZMA2; `lengths`,
    int32, bytes of each; `low` and `width`, float32, of the levels. The first stream is the distance of each centre's
    place on the Morton curve to that of the one before, 4 bytes; the others are one number of all Gaussians each. Those
    that need several bytes have all lowest bytes first, then the next. Facts: `format`, `height`, `width`, `bits`.
    """
    codes = levels.codes(picture.detached()).numpy()
    order = np.argsort(_interleaved(codes[:, 0], codes[:, 1]), kind="stable")
    codes = codes[order]
    places = _interleaved(codes[:, 0], codes[:, 1])
    planes = _planes(np.diff(places, prepend=places.dtype.type(0)), 4)
    for column, depth in enumerate(levels.bits[2:], 2):
        planes += _planes(codes[:, column], -(-depth // 8))
    streams = [lzma.compress(plane.tobytes(), lzma.FORMAT_RAW, filters=CODER) for plane in planes]
    tensors = {
        "codes": torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8),
        "lengths": torch.tensor([len(stream) for stream in streams], dtype=torch.int32),
        "low": levels.low.float(),
        "width": levels.width.float(),
    }
    return write_file(path, FORMAT, tensors, {"height": picture.height, "width": picture.width, "bits": levels.bits})


def load_quantized(path: str | Path) -> GaussianPicture:
    """Read what `save_quantized` wrote.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    tensors, facts = read_file(Path(path), FORMAT)
    try:
        return _decoded(tensors, facts)
    except (lzma.LZMAError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _decoded(tensors: dict[str, Tensor], facts: dict[str, Any]) -> GaussianPicture:
    bits = tuple(facts["bits"])
    content, ends = tensors["codes"].numpy().tobytes(), tensors["lengths"].cumsum(0).tolist()
    planes = [
        np.frombuffer(lzma.decompress(content[start:end], lzma.FORMAT_RAW, filters=CODER), np.uint8)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    places = np.cumsum(_joined(planes[:4]))
    columns = [_separated(places), _separated(places >> 1)]
    taken = 4
    for depth in bits[2:]:
        columns.append(_joined(planes[taken : taken + -(-depth // 8)]))
        taken += -(-depth // 8)
    levels = Levels(tensors["low"], tensors["width"], bits)
    codes = torch.from_numpy(np.stack(columns, 1).astype(np.int64))
    return levels.picture(codes, facts["height"], facts["width"])


def _values(picture: GaussianPicture) -> Tensor:
    """The 5 + C numbers of each Gaussian: x, y, logarithms of the scales, angle in [0, π), colours."""
    return torch.cat(
        (picture.means, picture.scales.log(), picture.rotations.remainder(torch.pi)[:, None], picture.colours), 1
    )


def _planes(numbers: NDArray[np.int64], count: int) -> list[NDArray[np.uint8]]:
    return [(numbers >> 8 * plane & 255).astype(np.uint8) for plane in range(count)]


def _joined(planes: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    numbers = np.zeros(len(planes[0]), np.int64)
    for index, plane in enumerate(planes):
        numbers |= plane.astype(np.int64) << 8 * index
    return numbers


def _interleaved(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place on the Morton curve: the bits of y and x in turn."""
    place = np.zeros_like(x)
    for bit in range(16):
        place |= (x >> bit & 1) << 2 * bit | (y >> bit & 1) << 2 * bit + 1
    return place


def _separated(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every other bit, the lowest first."""
    number = np.zeros_like(places)
    for bit in range(16):
        number |= (places >> 2 * bit & 1) << bit
    return number
