"""Scalar and lookup-free quantizers: the contract over their options, and what is particular to each."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from smalti.core.contracts import Quantizer
from smalti.core.options import QuantizerOptions
from smalti.core.testing import QuantizerContract
from smalti.quant.entropy import affinity_entropy_plain
from smalti.quant.fsp import DISTRIBUTIONS, FiniteScalarPerturbationOptions
from smalti.quant.fsq import FiniteScalarOptions
from smalti.quant.latent import LatentOptions
from smalti.quant.lfq import BinarySphericalOptions, LookupFreeOptions
from smalti.quant.packing import pack_digits, place_values, unpack_digits


class TestLookupFree(QuantizerContract):
    options = LookupFreeOptions(bits=(8,))


class TestFactorized(QuantizerContract):
    options = LookupFreeOptions(
        bits=(3, 5),
        bit_order="msb",
        scale=0.5,
        soft_clamp=2.0,
        entropy_group=2,
        entropy_floor="clamp",
        entropy_offset=5,
    )
    space: ClassVar[tuple[int, ...]] = (16,)


class TestWithoutLosses(QuantizerContract):
    options = LookupFreeOptions(bits=(40, 20), entropy_weight=0, commitment_weight=0)


class TestBinarySpherical(QuantizerContract):
    options = BinarySphericalOptions(bits=(9,), entropy_group=3)


class TestFiniteScalar(QuantizerContract):
    options = FiniteScalarOptions(levels=(8, 5, 5, 5))


class TestSymmetricFiniteScalar(QuantizerContract):
    options = FiniteScalarOptions(levels=(2, 3, 8), symmetric=True, noise=0.5)


class TestClampedFiniteScalar(QuantizerContract):
    options = FiniteScalarOptions(levels=(3, 4, 5, 6), bound="clamp")


class TestLatent(QuantizerContract):
    options = LatentOptions(levels=(5, 8, 3))


class TestFixedLatent(QuantizerContract):
    options = LatentOptions(levels=(5, 8, 3), learned=False)


class TestPerturbation(QuantizerContract):
    options = FiniteScalarPerturbationOptions(levels=(8, 5, 5))


class TestInversePerturbation(QuantizerContract):
    options = FiniteScalarPerturbationOptions(
        levels=(8, 5), activation="cauchy", variance=3, output="inverse", noise=0.5, kurtosis_weight=0.1
    )


ALL: list[QuantizerOptions] = [
    LookupFreeOptions(bits=(3, 4)),
    BinarySphericalOptions(bits=(5,)),
    FiniteScalarOptions(levels=(8, 5, 4)),
    FiniteScalarOptions(levels=(2, 5, 4), symmetric=True),
    LatentOptions(levels=(8, 5, 4)),
    *(
        FiniteScalarPerturbationOptions(levels=(8, 5), activation=name, output=output, variance=1)
        for name in DISTRIBUTIONS
        for output in ("uniform", "inverse")
    ),
]


def _every_token(quantizer: Quantizer) -> Tensor:
    """All tokens `(1, L, S)` of a small quantizer."""
    return torch.tensor(list(itertools.product(*map(range, quantizer.vocab))))[None]


@pytest.mark.parametrize("options", ALL, ids=str)
def test_codes_differ(options: QuantizerOptions) -> None:
    quantizer = options.build().eval()
    tokens = _every_token(quantizer)
    codes = quantizer.decode(tokens, (tokens.shape[1],))[0]
    assert len(codes.unique(dim=0)) == math.prod(quantizer.vocab)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_every_code_is_reached(options: QuantizerOptions) -> None:
    quantizer = options.build().eval()
    generator = torch.Generator().manual_seed(0)
    spread = 0.4 if isinstance(options, LatentOptions) else 1.5
    tokens = quantizer(spread * torch.randn(1, 20_000, quantizer.dim, generator=generator)).tokens
    for stream, size in enumerate(quantizer.vocab):
        assert len(tokens[..., stream].unique()) == size


@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(options: QuantizerOptions, backend: str) -> None:
    torch.compiler.reset()
    quantizer = options.build().eval()
    latent = torch.randn(2, 3, 4, quantizer.dim)
    compiled = torch.compile(quantizer, fullgraph=True, backend=backend)
    with torch.no_grad():
        found, expected = compiled(latent), quantizer(latent)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.latent, expected.latent)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_decoding_keeps_to_the_type_of_the_module(options: QuantizerOptions) -> None:
    quantizer = options.build().eval().bfloat16()
    latent = torch.randn(2, 30, quantizer.dim).bfloat16()
    quantized = quantizer(latent)
    assert quantized.latent.dtype == torch.bfloat16
    assert torch.equal(quantizer.decode(quantized.tokens, (30,)), quantized.latent)
    if not isinstance(options, LatentOptions):  # whose values are weights
        assert torch.equal(quantized.tokens, options.build().eval()(latent.float()).tokens)


@given(levels=st.lists(st.integers(2, 30), min_size=1, max_size=12))
@settings(deadline=None, max_examples=30)
def test_packing_is_inverted(levels: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, places = torch.tensor(levels), torch.tensor(place_values(levels))
    digits = (torch.rand(50, len(levels), generator=generator) * sizes).long()
    digits[0], digits[1] = 0, sizes - 1
    tokens = pack_digits(digits, places)
    assert tokens[:2].tolist() == [0, math.prod(levels) - 1]
    assert torch.equal(unpack_digits(tokens, places, sizes), digits)


# ---------------------------------------------------------------------------- LFQ and BSQ


def test_bit_order() -> None:
    latent = torch.tensor([[[1.0, -1, -1, -1, 2]]])
    assert LookupFreeOptions(bits=(5,)).build().eval()(latent).tokens.flatten().tolist() == [17]
    assert LookupFreeOptions(bits=(5,), bit_order="msb").build().eval()(latent).tokens.flatten().tolist() == [17]
    assert LookupFreeOptions(bits=(3, 2)).build().eval()(latent).tokens.flatten().tolist() == [1, 2]
    assert LookupFreeOptions(bits=(3, 2), bit_order="msb").build().eval()(latent).tokens.flatten().tolist() == [4, 1]


def test_zero_is_a_code() -> None:
    quantized = LookupFreeOptions(bits=(2,), scale=3).build().eval()(torch.zeros(1, 1, 2))
    assert quantized.latent.tolist() == [[[-3, -3]]]


def test_spherical_codes_lie_on_the_sphere() -> None:
    quantizer = BinarySphericalOptions(bits=(7,), scale=2).build().eval()
    torch.testing.assert_close(quantizer(torch.randn(3, 5, 7)).latent.norm(dim=-1), torch.full((3, 5), 2.0))


@pytest.mark.parametrize("options", [LookupFreeOptions, BinarySphericalOptions])
@pytest.mark.parametrize(
    "changes", [{}, {"soft_clamp": 1.5, "scale": 0.5, "bit_order": "msb"}, {"entropy_offset": 2.0}]
)
def test_lookup_free_losses_are_their_definitions(options: Any, changes: dict[str, Any]) -> None:
    weights = {"commitment_weight": 0.3, "entropy_weight": 0.2, "sample_weight": 0.7, "batch_weight": 1.3}
    quantizer = options(bits=(2, 3), entropy_temperature=0.5, **weights, **changes).build().train().double()
    latent = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    losses = quantizer(latent).losses

    bounded, scale = latent, changes.get("scale", 1.0)
    if "soft_clamp" in changes:
        bounded = 1.5 * torch.tanh(latent / 1.5)
    if options is BinarySphericalOptions:
        bounded = scale * F.normalize(bounded, dim=-1)
    tokens = _every_token(quantizer)
    table = quantizer.decode(tokens, (32,))[0]
    codes = quantizer.decode(quantizer(latent).tokens, (6,))
    entropies = affinity_entropy_plain(2 * bounded.flatten(0, 1) @ table.t(), 0.5)
    entropy = 0.7 * entropies.sample - 1.3 * entropies.batch
    expected = {
        "commitment": 0.3 * (bounded - codes.detach()).square().mean(),
        "entropy": 0.2 * (F.softplus(entropy + 2.0) if "entropy_offset" in changes else entropy),
    }
    assert losses.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-6, atol=1e-9)
        found = torch.autograd.grad(losses[name], latent, retain_graph=True)[0]
        torch.testing.assert_close(found, torch.autograd.grad(expected[name], latent, retain_graph=True)[0])


def test_large_codebooks_need_no_table() -> None:
    quantizer = LookupFreeOptions(bits=(18,)).build().train()
    latent = torch.randn(2, 16, 16, 18, requires_grad=True)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sum(quantizer(latent).losses.values()).backward()
    assert max(saved) <= 512 * 2**9
    assert sum(saved) < 512 * 2**18 / 50


def test_entropy_survives_extreme_latents() -> None:
    quantizer = LookupFreeOptions(bits=(6,)).build().train()
    latent = torch.cat([1e4 * torch.randn(1, 50, 6), torch.zeros(1, 50, 6)]).requires_grad_()
    loss = quantizer(latent).losses["entropy"]
    loss.backward()
    assert math.isfinite(loss.item())
    assert latent.grad is not None
    assert bool(torch.isfinite(latent.grad).all())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": [6], "entropy_group": 4}, "entropy_group 4 must divide the 6 bits"),
        ({"bits": [36]}, "the entropy of 36 bits at once needs a table of 2\\^36, give an entropy_group of at most 24"),
        ({"bits": []}, "bits\n"),
        ({"bits": [0]}, "bits.0\n"),
        ({"bits": [63], "entropy_weight": 0}, "bits.0\n"),
    ],
)
def test_wrong_bits_are_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        LookupFreeOptions(**options)


# ---------------------------------------------------------------------------- FSQ


@pytest.mark.parametrize("levels", range(3, 12))
def test_values_of_finite_scalars(levels: int) -> None:
    latent = torch.linspace(-6, 6, 4001).view(1, -1, 1)
    found = FiniteScalarOptions(levels=(levels,)).build().eval()(latent).latent.unique()
    half = levels // 2
    expected = torch.arange(-half, levels - half) / half
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bound", ["tanh", "clamp"])
@pytest.mark.parametrize("levels", range(2, 12))
def test_symmetric_values_of_finite_scalars(levels: int, bound: Any) -> None:
    latent = torch.linspace(-6, 6, 4001).view(1, -1, 1)
    quantizer = FiniteScalarOptions(levels=(levels,), symmetric=True, bound=bound).build().eval()
    quantized = quantizer(latent)
    torch.testing.assert_close(quantized.latent.unique(), torch.linspace(-1, 1, levels))
    # The nearest level, and the same on both sides of zero.
    target = torch.tanh(latent) if bound == "tanh" else latent.clamp(-1, 1)
    assert (quantized.latent - target).abs().max() <= 1 / (levels - 1) + 1e-6
    torch.testing.assert_close(quantizer(-latent - 1e-4).latent, -quantizer(latent + 1e-4).latent)


@pytest.mark.parametrize("bound", ["tanh", "clamp"])
@pytest.mark.parametrize(("levels", "margin"), [(1024, 1e-3), (2001, 1e-3), (5000, 1e-3), (200, 9e-3)])
def test_many_levels_are_no_more_than_there_are(levels: int, margin: float, bound: Any) -> None:
    quantizer = FiniteScalarOptions(levels=(levels, 3), margin=margin, bound=bound).build().eval()
    quantized = quantizer(torch.tensor([[[-20.0, 20.0], [20.0, -20.0]]]))
    assert quantized.tokens.flatten().tolist() == [2 * levels, levels - 1]
    assert torch.equal(quantizer.decode(quantized.tokens, (2,)), quantized.latent)


def test_gradients_of_finite_scalars_are_those_of_the_bound() -> None:
    latent = torch.randn(2, 40, 3, dtype=torch.float64, requires_grad=True)
    levels = torch.tensor([8, 5, 4])
    probe = torch.randn(2, 40, 3)
    half, offset = (levels - 1) * 1.001 / 2, 0.5 * (levels % 2 == 0)
    bounded = (torch.tanh(latent + torch.atanh(offset / half)) * half - offset) / (levels // 2)
    output = FiniteScalarOptions(levels=(8, 5, 4)).build().double()(latent).latent
    expected, found = (torch.autograd.grad((value * probe).sum(), latent)[0] for value in (bounded, output))
    torch.testing.assert_close(found, expected)
    output = FiniteScalarOptions(levels=(8, 5, 4), symmetric=True).build().double()(latent).latent
    expected, found = (torch.autograd.grad((v * probe).sum(), latent)[0] for v in (torch.tanh(latent), output))
    torch.testing.assert_close(found, expected)


def test_old_models_have_a_negative_margin() -> None:
    latent = torch.full((1, 1, 1), 9.0)
    old, new = (FiniteScalarOptions(levels=(5,), margin=margin).build() for margin in (-1e-3, 1e-3))
    assert old(latent).latent.item() == new(latent).latent.item() == 1
    # Where the two ranges round differently: 1.5 lies between the codes 1 and 2 of [-2, 2].
    near = torch.atanh(torch.tensor(1.5 / 2)).view(1, 1, 1)
    assert old(near).latent.item() == 0.5
    assert new(near).latent.item() == 1


def test_noise_replaces_the_rounding_of_some_channels() -> None:
    torch.manual_seed(0)
    latent = torch.randn(1, 4000, 2)
    plain = FiniteScalarOptions(levels=(5, 3), symmetric=True).build().train()(latent)
    noisy = FiniteScalarOptions(levels=(5, 3), symmetric=True, noise=0.25).build().train()(latent)
    changed = noisy.latent != plain.latent
    assert torch.equal(noisy.tokens, plain.tokens)
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.03)
    error = (noisy.latent - torch.tanh(latent))[changed]
    assert abs(error.mean().item()) < 0.03
    assert error.abs().max().item() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"levels": [8, 2]}, "a channel of 2 levels needs symmetric: true"),
        ({"levels": [8, 5], "noise": 0.5}, "noise needs symmetric: true"),
        ({"levels": [1, 5]}, "levels.0\n"),
        ({"levels": [2**32, 2**31]}, f"{2**63} codes do not fit into a token of 64 bits, use a product of quantizers"),
    ],
)
def test_wrong_levels_are_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        FiniteScalarOptions(**options)


# ---------------------------------------------------------------------------- latent quantization, FSP


def test_latent_values_start_on_a_grid_and_learn() -> None:
    quantizer = LatentOptions(levels=(5, 4)).build().train()
    assert quantizer.values[0].tolist() == [-0.5, -0.25, 0, 0.25, 0.5]
    assert quantizer.values[1].tolist() == [-0.5, -0.25, 0, 0.25]
    latent = torch.tensor([[[0.3, 0.0], [0.2, 0.1]]], requires_grad=True)
    losses = quantizer(latent).losses
    losses["codebook"].backward()
    assert latent.grad is None
    torch.testing.assert_close(quantizer.values[0].grad, 0.1 * torch.tensor([0, 0, 0, 0.0, 0]))
    torch.testing.assert_close(quantizer.values[1].grad, 0.1 / 4 * 2 * torch.tensor([0, 0, -0.1, 0]))
    quantizer.zero_grad()
    losses["commitment"].backward()
    assert quantizer.values[0].grad is None
    torch.testing.assert_close(latent.grad, 0.1 / 4 * 2 * torch.tensor([[[0.05, 0.0], [-0.05, 0.1]]]))


def test_moved_latent_values_are_searched_and_decoded() -> None:
    quantizer = LatentOptions(levels=(3,)).build().eval()
    with torch.no_grad():
        quantizer.values[0].copy_(torch.tensor([4.0, -7, 1]))
    quantized = quantizer(torch.tensor([[[3.0], [-9], [0], [2.4]]]))
    assert quantized.tokens.flatten().tolist() == [0, 1, 2, 2]
    assert quantized.latent.flatten().tolist() == [4, -7, 1, 1]


@pytest.mark.parametrize("activation", DISTRIBUTIONS)
def test_distributions_are_inverted_and_have_their_variance(activation: Any) -> None:
    cumulative, inverse, variance = DISTRIBUTIONS[activation]
    shares = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    values = inverse(shares)
    torch.testing.assert_close(cumulative(values), shares)
    if math.isfinite(variance):
        assert values.square().mean().item() == pytest.approx(variance, rel=1e-3)


def test_bins_are_equally_likely() -> None:
    torch.manual_seed(0)
    quantizer = FiniteScalarPerturbationOptions(levels=(8,), activation="normal").build().eval()
    quantized = quantizer(torch.randn(1, 100_000, 1))
    shares = torch.bincount(quantized.tokens.flatten()) / 100_000
    torch.testing.assert_close(shares, torch.full((8,), 1 / 8), atol=0.005, rtol=0.0)
    assert quantized.latent.square().mean().item() == pytest.approx(1 - 1 / 64, abs=0.01)


def test_perturbation_stays_near_and_inside() -> None:
    torch.manual_seed(0)
    quantizer = FiniteScalarPerturbationOptions(levels=(4,), activation="sigmoid").build().train()
    latent = 3 * torch.randn(1, 10_000, 1)
    shares = quantizer(latent).latent / math.sqrt(12) + 0.5
    assert shares.min() > 0
    assert shares.max() < 1
    assert (shares - torch.sigmoid(latent)).abs().max() <= 0.125 + 1e-6
    assert len(shares.unique()) > 5000


def test_moments_are_their_definition() -> None:
    torch.manual_seed(0)
    latent = torch.randn(2, 30, 2, dtype=torch.float64).exp()
    options = FiniteScalarPerturbationOptions(levels=(4, 4), variance=2, skewness_weight=0.3, kurtosis_weight=0.2)
    found = options.build().double().train()(latent).losses["moments"]
    expected = 0.0
    for channel in latent.flatten(0, 1).unbind(1):
        standard = (channel - channel.mean()) / channel.std()
        expected += 0.1 * channel.mean() ** 2 + 0.07 * (channel.var() - 2) ** 2
        expected += 0.3 * standard.pow(3).mean() ** 2 + 0.2 * (standard.pow(4).mean() - 3) ** 2
    torch.testing.assert_close(found, expected / 2)


def test_a_variance_of_cauchy_is_asked_for() -> None:
    sentence = "a Cauchy distribution has no variance, give one or variance_weight: 0"
    with pytest.raises(ValidationError, match=sentence):
        FiniteScalarPerturbationOptions(levels=(4,), activation="cauchy")
    quantizer = FiniteScalarPerturbationOptions(levels=(4,), activation="cauchy", variance_weight=0).build().train()
    assert math.isfinite(quantizer(torch.randn(1, 5, 1)).losses["moments"].item())
