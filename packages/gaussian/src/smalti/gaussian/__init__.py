"""smalti.gaussian: 2-D Gaussian splatting in plain torch.

Importing this package costs nothing: torch is imported when an operator is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smalti.gaussian.attention.deformable import multi_scale_deformable_attention
    from smalti.gaussian.attention.module import DeformableAttention
    from smalti.gaussian.rasterizer.rasterize import rasterize_gaussians_2d

__all__ = ["DeformableAttention", "multi_scale_deformable_attention", "rasterize_gaussians_2d"]

_MODULES = {
    "DeformableAttention": "smalti.gaussian.attention.module",
    "multi_scale_deformable_attention": "smalti.gaussian.attention.deformable",
    "rasterize_gaussians_2d": "smalti.gaussian.rasterizer.rasterize",
}


def __getattr__(name: str) -> Any:
    """Import an operator on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """What can be imported from here."""
    return sorted({*globals(), *_MODULES})
