"""What smalti.quant brings to the registry; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the components of this package."""
    yield Component(
        "quantizer",
        "vq",
        "smalti.quant.vector:VectorQuantizerOptions",
        "vector quantization: nearest code of a learned codebook, Euclidean or cosine",
    )
    yield Component(
        "quantizer",
        "simvq",
        "smalti.quant.simvq:SimVQOptions",
        "SimVQ: a frozen random codebook behind one learned linear map",
    )
    yield Component(
        "quantizer",
        "ibq",
        "smalti.quant.ibq:IndexBackpropagationOptions",
        "index backpropagation: gradients to all codes through a softmax",
    )
    yield Component(
        "quantizer",
        "gumbel",
        "smalti.quant.gumbel:GumbelOptions",
        "Gumbel-softmax: codes drawn by a layer of logits, kept near uniform",
    )
    yield Component(
        "quantizer",
        "projected",
        "smalti.quant.projected:ProjectedOptions",
        "any quantizer between two linear projections",
    )
    yield Component(
        "quantizer",
        "rotated",
        "smalti.quant.rotated:RotatedOptions",
        "any quantizer in a randomly rotated frame",
    )
    yield Component(
        "quantizer",
        "product",
        "smalti.quant.product:ProductOptions",
        "product quantization: groups of channels, each with a quantizer of its own",
    )
    yield Component(
        "quantizer",
        "factorized",
        "smalti.quant.factorized:FactorizedOptions",
        "FQGAN: independent sub-codebooks that are kept apart",
    )
    yield Component(
        "quantizer",
        "residual",
        "smalti.quant.residual:ResidualOptions",
        "residual quantization: every level quantizes what is left",
    )
    yield Component(
        "quantizer",
        "multi-scale",
        "smalti.quant.multi_scale:MultiScaleOptions",
        "VAR: residual quantization over grids from coarse to fine",
    )
    yield Component(
        "quantizer",
        "lfq",
        "smalti.quant.lfq:LookupFreeOptions",
        "lookup-free quantization: every channel is a bit",
    )
    yield Component(
        "quantizer",
        "bsq",
        "smalti.quant.lfq:BinarySphericalOptions",
        "binary spherical quantization: lookup-free, on the unit sphere",
    )
    yield Component(
        "quantizer",
        "fsq",
        "smalti.quant.fsq:FiniteScalarOptions",
        "finite scalar quantization: every channel rounded to a few levels",
    )
    yield Component(
        "quantizer",
        "latent",
        "smalti.quant.latent:LatentOptions",
        "latent quantization: every channel the nearest of a few learned values",
    )
    yield Component(
        "quantizer",
        "fsp",
        "smalti.quant.fsp:FiniteScalarPerturbationOptions",
        "finite scalar perturbation: channels made uniform, in equal bins",
    )
    yield Component(
        "quantizer",
        "qinco",
        "smalti.quant.qinco:ImplicitCodebooksOptions",
        "QINCo: residual quantization with implicit neural codebooks",
    )
