"""Multi-scale residual quantization: values and gradients by formula, scales, phi, dropout, inputs of a generator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.core.contracts import Quantizer
from smalti.core.errors import UserError
from smalti.quant.lfq import BinarySphericalOptions, LookupFreeOptions
from smalti.quant.multi_scale import MultiScale, MultiScaleOptions
from smalti.quant.phi import phi_of_scale
from smalti.quant.product import ProductOptions
from smalti.quant.vector import VectorQuantizerOptions

VQ = VectorQuantizerOptions(dim=3, codebook_size=32, initialise="normal")
SCALES = (1, 2, 3, 5)


def _build(**options: object) -> MultiScale:
    torch.manual_seed(0)
    return MultiScaleOptions(**{"quantizer": VQ, "scales": SCALES, "phi": 2, **options}).build()


def _pictures(module: MultiScale, tokens: Tensor) -> list[Tensor]:
    """What every scale adds, `(B, D, h, w)`, by formula."""
    codebook, ratio, side = module.units[0].codebook, module.options.phi_ratio, SCALES[-1]
    added, start = [], 0
    for scale, size in enumerate(SCALES):
        part = tokens[:, start : start + size**2, 0].view(-1, size, size)
        start += size**2
        picture = codebook[part].permute(0, 3, 1, 2)
        if size != side:
            picture = F.interpolate(picture, (side, side), mode=module.options.enlargement)
        convolution = module.phi[module.phi_of_scale[scale]].convolution
        added.append((1 - ratio) * picture + ratio * convolution(picture))
    return added


@pytest.mark.parametrize("enlargement", ["bicubic", "bilinear"])
def test_values_losses_and_gradients_equal_the_formulas(enlargement: str) -> None:
    module = _build(enlargement=enlargement, commitment_weight=0.3, codebook_weight=0.7).train()
    latent, probe = torch.randn(2, 5, 5, 3, requires_grad=True), torch.randn(2, 5, 5, 3)
    quantized = module(latent)
    whole = latent.movedim(-1, 1)
    total, losses, start = torch.zeros(2, 3, 5, 5), [torch.zeros(())] * 2, 0
    for picture, size in zip(_pictures(module, quantized.tokens), SCALES, strict=True):
        averaged = F.interpolate((whole - total).detach(), (size, size), mode="area").flatten(2).transpose(1, 2)
        tokens = torch.cdist(averaged, module.units[0].codebook.detach()).argmin(-1)
        assert torch.equal(quantized.tokens[:, start : start + size**2, 0], tokens)
        start += size**2
        total = total + picture
        losses = [losses[0] + F.mse_loss(whole, total.detach()) / 4, losses[1] + F.mse_loss(total, whole.detach()) / 4]
    torch.testing.assert_close(quantized.latent, total.movedim(1, -1))
    torch.testing.assert_close(quantized.losses, {"commitment": 0.3 * losses[0], "codebook": 0.7 * losses[1]})

    weights = [latent, *module.parameters()]
    found = torch.autograd.grad((quantized.latent * probe).sum() + sum(quantized.losses.values()), weights)
    plain = (latent * probe).sum() + 0.3 * losses[0] + 0.7 * losses[1]
    for one, other in zip(found, torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(one, other)


@settings(deadline=None, max_examples=20)
@given(
    sides=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    phi=st.integers(0, 3),
    decay=st.sampled_from([1.0, 0.7]),
    normalise=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_list_of_scales_decodes(sides: list[int], phi: int, decay: float, normalise: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = MultiScaleOptions(
        quantizer=VQ, scales=sides, phi=min(phi, len(sides)), scale_decay=decay, normalise=normalise
    ).build()
    latent = torch.randn(2, sides[-1], sides[-1], 3)
    quantized = module.eval()(latent)
    assert quantized.tokens.shape[1] == module.layout(latent.shape[1:-1]).positions
    assert torch.equal(module.decode(quantized.tokens, latent.shape[1:-1]), quantized.latent)


def test_the_first_scales_decode_alone() -> None:
    module = _build().eval()
    tokens = module(torch.randn(2, 5, 5, 3)).tokens
    expected = torch.stack(_pictures(module, tokens)).cumsum(0).movedim(2, -1)
    for scale, (end, partial) in enumerate(zip((1, 5, 14, 39), module.partial_sums(tokens), strict=True)):
        torch.testing.assert_close(partial, expected[scale])
        assert torch.equal(module.decode(tokens[:, :end], (5, 5)), partial)


def _from_scale_to_scale(module: Quantizer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The latent of all scales, and the inputs of all but the first one after the other."""
    total, inputs = None, []
    for scale, part in enumerate(tokens.split([size**2 for size in SCALES], 1)):
        total, following = module.advance(total, module.codes(part, scale), scale)
        inputs.append(following)
    assert inputs.pop() is None
    return total, torch.cat(inputs, 1)


def test_a_generator_gets_the_sums_averaged_down() -> None:
    module = _build().eval()
    tokens = module(torch.randn(2, 5, 5, 3)).tokens
    sums = [partial.movedim(-1, 1) for partial in module.partial_sums(tokens)]
    expected = [
        F.interpolate(partial, (size, size), mode="area").flatten(2).transpose(1, 2)
        for partial, size in zip(sums, SCALES[1:], strict=False)
    ]
    total, inputs = _from_scale_to_scale(module, tokens)
    torch.testing.assert_close(inputs, torch.cat(expected, 1))
    assert torch.equal(total, module.decode(tokens, (5, 5)))


def test_branches_of_a_product_stand_side_by_side() -> None:
    torch.manual_seed(0)
    options = MultiScaleOptions(quantizer=VQ, scales=SCALES, phi=1, dropout=1.0)
    module = ProductOptions(quantizers=(options,), branches=2).build()
    latent = torch.randn(2, 5, 5, 6)
    tokens = module.eval()(latent).tokens
    assert module.layout((5, 5)).kind == "scales"
    assert tokens.shape == (2, 39, 2)
    assert module.decode(tokens[:, :5], (5, 5)).shape == (2, 5, 5, 6)
    total, inputs = _from_scale_to_scale(module, tokens)
    assert torch.equal(total, module.decode(tokens, (5, 5)))
    alone = [_from_scale_to_scale(unit, tokens[..., [branch]])[1] for branch, unit in enumerate(module.units)]
    assert torch.equal(inputs, torch.cat(alone, -1))
    drawn = [[unit.kept_scales(8) for unit in module.units] for _ in range(5)]
    assert all(torch.equal(first, second) for first, second in drawn)
    assert len({tuple(first.tolist()) for first, _ in drawn}) == 5


def test_dropout_cuts_the_first_samples_short() -> None:
    module = _build(dropout=0.5, dropout_start=2).train()
    kept = module.kept_scales(8)
    assert kept[4:].tolist() == [4] * 4
    drawn = torch.cat([module.kept_scales(8)[:4] for _ in range(20)])
    assert drawn.unique().tolist() == [2, 3, 4]
    module.kept_scales = lambda batch: torch.tensor([2, 4])  # type: ignore[method-assign]
    latent = torch.randn(2, 5, 5, 3)
    quantized = module(latent)
    torch.testing.assert_close(quantized.latent[0], module.decode(quantized.tokens[:, :5], (5, 5))[0])
    torch.testing.assert_close(quantized.latent[1], module.decode(quantized.tokens, (5, 5))[1])
    sums = torch.stack([partial.detach() for partial in module.partial_sums(quantized.tokens)])
    errors = (sums - latent).square().mean((2, 3, 4))
    expected = (errors[:2].mean(1).sum() + errors[2:, 1].sum()) / 4
    torch.testing.assert_close(quantized.losses["codebook"], expected)


def test_dropout_may_leave_a_scale_to_nobody() -> None:
    module = _build(dropout=1.0).train()
    module.kept_scales = lambda batch: torch.tensor([1, 1])  # type: ignore[method-assign]
    losses = module(torch.randn(2, 5, 5, 3)).losses
    assert bool(torch.isfinite(torch.stack([*losses.values()])).all())


def test_searching_by_cosine_adds_codes_of_any_length() -> None:
    unit = VectorQuantizerOptions(dim=3, codebook_size=32, initialise="normal", cosine=True, unit_length="search")
    module = _build(quantizer=unit, scales=(5,), phi=0).eval()
    latent = torch.randn(2, 5, 5, 3)
    quantized = module(latent)
    cosines = F.cosine_similarity(latent[..., None, :], module.units[0].codebook, dim=-1)
    assert torch.equal(quantized.tokens.view(2, 5, 5), cosines.argmax(-1))
    torch.testing.assert_close(quantized.latent, module.units[0].codebook[cosines.argmax(-1)])


@pytest.mark.parametrize(("unit", "corner"), [(LookupFreeOptions, 1.0), (BinarySphericalOptions, 3**-0.5)])
def test_bits_shrink_with_the_scale_and_keep_their_entropy_loss(unit: type, corner: float) -> None:
    module = _build(quantizer=unit(bits=(3,), entropy_weight=0.1), phi=0, scale_decay=0.5).train()
    quantized = module(torch.randn(2, 5, 5, 3))
    assert quantized.losses.keys() == {"commitment", "codebook", "entropy"}
    *_, third, last = module.partial_sums(quantized.tokens)
    torch.testing.assert_close((last - third).abs(), torch.full((2, 5, 5, 3), corner / 8))


def test_scales_may_have_units_of_their_own() -> None:
    module = _build(shared=False).train()
    quantized = module(torch.randn(2, 5, 5, 3))
    assert len(module.units) == 4
    assert torch.equal(module.eval().decode(quantized.tokens, (5, 5)), quantized.latent)


def test_statistics_are_updated_once_per_step() -> None:
    unit = VectorQuantizerOptions(dim=3, codebook_size=8, update="ema", initialise="normal", ema_decay=0.5)
    module = _build(quantizer=unit).train()
    before = module.units[0].codebook.clone()
    quantized = module(torch.randn(2, 5, 5, 3))
    assert not torch.equal(module.units[0].codebook, before)
    module.units[0].codebook.copy_(before)
    assert torch.equal(module.decode(quantized.tokens, (5, 5)), quantized.latent)


@pytest.mark.parametrize(
    ("scales", "convolutions", "expected"),
    [
        (10, 4, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
        (5, 4, (0, 1, 2, 2, 3)),
        (7, 4, (0, 0, 1, 2, 2, 3, 3)),
        (9, 4, (0, 0, 1, 1, 2, 2, 2, 3, 3)),
        (14, 4, (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)),
        (10, 3, (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)),
        (3, 1, (0, 0, 0)),
        (1, 1, (0,)),
    ],
)
def test_the_table_of_phi_is_that_of_the_published_models(
    scales: int, convolutions: int, expected: tuple[int, ...]
) -> None:
    assert phi_of_scale(scales, convolutions, "ticks") == expected


@pytest.mark.parametrize("rule", ["ticks", "rounded"])
@pytest.mark.parametrize("count", range(1, 12))
def test_as_many_phi_as_scales_is_one_each(rule: str, count: int) -> None:
    assert phi_of_scale(count, count, rule) == tuple(range(count))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"phi": 5}, "phi is 5, but there are 4 scales"),
        ({"dropout_start": 5}, "dropout_start is 5, but there are 4 scales"),
    ],
)
def test_wrong_options_are_told(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        _build(**options)
    assert str(error.value) == sentence


def test_wrong_inputs_are_told() -> None:
    module = _build()
    sentence = r"^the latent space must be that of the last scale, \(5, 5\), got \(4, 5\)$"
    for call in (
        lambda: module(torch.zeros(1, 4, 5, 3)),
        lambda: module.layout((4, 5)),
        lambda: module.decode(torch.zeros(1, 39, 1, dtype=torch.int64), (4, 5)),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
    sentence = r"^tokens of scales must end with one, after 1, 5, 14, 39 positions, got 6$"
    with pytest.raises(UserError, match=sentence):
        module.decode(torch.zeros(1, 6, 1, dtype=torch.int64), (5, 5))
