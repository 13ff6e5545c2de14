from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smalti.core.testing import parity as cases
from smalti.quant.vector import VectorQuantizer, VectorQuantizerOptions


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """How cases of what the original systems compute are filled and compared."""
    return cases


@pytest.fixture(scope="session")
def load_case() -> Callable[[str], dict[str, Any]]:
    """Parity cases by name."""
    return lambda name: cases.read_case(Path(__file__).parent / "parity" / f"{name}.json.gz")


@pytest.fixture
def build_vq() -> Callable[..., VectorQuantizer]:
    """A vector quantizer of 16 codes of 4 channels, unless told otherwise."""

    def build(**options: Any) -> VectorQuantizer:
        torch.manual_seed(0)
        return VectorQuantizerOptions(**{"dim": 4, "codebook_size": 16, **options}).build()

    return build


@pytest.fixture
def place() -> Callable[..., VectorQuantizer]:
    """Puts the codes of a vector quantizer somewhere."""

    def placed(quantizer: VectorQuantizer, codes: Tensor) -> VectorQuantizer:
        with torch.no_grad():
            quantizer.codebook.copy_(codes)
        if quantizer.learning.ema is not None:
            quantizer.learning.ema.sums.copy_(codes)
        return quantizer

    return placed


@pytest.fixture
def spread(place: Callable[..., VectorQuantizer]) -> Callable[..., VectorQuantizer]:
    """Puts the codes as far apart as the latents are, so that many are used."""
    return lambda quantizer: place(quantizer, torch.randn(quantizer.codebook.shape))


class Largest(TorchDispatchMode):
    """A context that notes how many elements the largest tensor has that is made in it."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.fixture
def largest() -> Largest:
    return Largest()
