"""Views of an image: the forms of it, itself among them, by whose tokens a generator learns it.

Legend: C channels, H W pixels, V views.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from smalti.core.data.dataset import Box
from smalti.core.data.decode import decode, decode_ten_crops, ten_views
from smalti.core.data.picture import Pixels
from smalti.core.options import Preprocessing

VIEWS_OF_A_RANGE = 10


class Views(NamedTuple):
    """The views of every image of a set.

    Attributes:
        flip: the mirror image, too.
        ten_crops: in the place of the whole image ten views for each of these crop ranges, see `decode_ten_crops`.
    """

    flip: bool = False
    ten_crops: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """V names."""
        if self.ten_crops:
            return tuple(name for crops in self.ten_crops for name in ten_views(crops))
        return ("original", "flip") if self.flip else ("original",)

    def decode_all(self, image: bytes, preprocessing: Preprocessing, box: Box | None) -> Pixels:
        """All views of an image file, uint8 `(V, C, H, W)`; arguments and errors as of `decode`."""
        if self.ten_crops:
            return np.concatenate([decode_ten_crops(image, preprocessing, box, crops) for crops in self.ten_crops])
        pixels = decode(image, preprocessing, box)
        return np.stack([pixels, pixels[:, :, ::-1]]) if self.flip else pixels[None]

    def decode(self, image: bytes, preprocessing: Preprocessing, box: Box | None, view: int) -> Pixels:
        """One view of an image file, uint8 `(C, H, W)`.

        Args:
            image: the bytes of the file.
            preprocessing: how it is fitted into the size.
            box: the part of the image that counts.
            view: number of the view, below V.

        Raises:
            UndecodableImageError: the bytes are damaged or no image, or the box lies outside of it.
        """
        if self.ten_crops:
            crops = self.ten_crops[view // VIEWS_OF_A_RANGE]
            views: Pixels = decode_ten_crops(image, preprocessing, box, crops)
            return np.ascontiguousarray(views[view % VIEWS_OF_A_RANGE])
        pixels = decode(image, preprocessing, box)
        return np.ascontiguousarray(pixels[:, :, ::-1]) if view else pixels
