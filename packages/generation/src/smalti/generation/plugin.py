"""What smalti.generation brings to the registry; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the components of this package."""
    yield Component(
        "generator",
        "ar",
        "smalti.generation.ar:AROptions",
        "autoregressive transformer, one token after the other (LlamaGen)",
    )
    yield Component(
        "generator",
        "far",
        "smalti.generation.far:FAROptions",
        "autoregressive transformer with an inner head over the streams of a position (FQGAN, Open-MAGVIT2)",
    )
    yield Component("generator", "var", "smalti.generation.var:VAROptions", "next-scale prediction (VAR, ImageFolder)")
    yield Component(
        "generator", "rar", "smalti.generation.rar:RAROptions", "autoregression trained in random orders (RAR)"
    )
    yield Component(
        "generator", "maskgit", "smalti.generation.maskgit:MaskGITOptions", "masked generation, many tokens at a time"
    )
    published = "smalti.generation.layouts"
    yield Component("checkpoint", "llamagen-gpt", f"{published}.llamagen:LlamaGenGPT", "LlamaGen's transformers")
    yield Component(
        "checkpoint", "llamagen-gpt-t2i", f"{published}.llamagen:LlamaGenTextGPT", "LlamaGen's, from captions"
    )
    yield Component("checkpoint", "far", f"{published}.far:FARLayout", "FAR, dual, triple or more")
    yield Component(
        "checkpoint", "open-magvit2-gpt", f"{published}.seed_voken:OpenMAGVIT2GPT", "Open-MAGVIT2's transformers"
    )
    yield Component("checkpoint", "ibq-llama", f"{published}.seed_voken:IBQLlama", "IBQ's transformers")
    yield Component("checkpoint", "sejal-gpt", f"{published}.mingpt:MinGPT", "minGPT of taming-transformers")
    yield Component("checkpoint", "var", f"{published}.var:VARLayout", "VAR's transformers")
    yield Component("checkpoint", "imagefolder-var", f"{published}.var:ImageFolderLayout", "ImageFolder's transformer")
    yield Component("checkpoint", "rar", f"{published}.rar:RARLayout", "RAR's transformers, also RobustTok's")
    yield Component(
        "checkpoint", "titok-maskgit", f"{published}.titok_maskgit:TiTokMaskGIT", "TiTok's MaskGIT generators"
    )
