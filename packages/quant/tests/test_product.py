"""Wrappers around units: projected, rotated, product, factorized; values, gradients, and what they say to mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.quant.factorized import FactorizedOptions, disentanglement
from smalti.quant.fsq import FiniteScalarOptions
from smalti.quant.lfq import LookupFreeOptions
from smalti.quant.multi_scale import MultiScaleOptions
from smalti.quant.product import ProductOptions
from smalti.quant.projected import ProjectedOptions
from smalti.quant.residual import ResidualOptions
from smalti.quant.rotated import RotatedOptions
from smalti.quant.vector import VectorQuantizerOptions

VQ = VectorQuantizerOptions(dim=3, codebook_size=16, initialise="normal")
FSQ = FiniteScalarOptions(levels=(5, 4, 3))
LFQ = LookupFreeOptions(bits=(2, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_projections_pass_values_and_gradients(bias: bool, layer_norm: bool) -> None:
    torch.manual_seed(0)
    module = ProjectedOptions(dim=7, quantizer=VQ, bias=bias, layer_norm=layer_norm).build().train()
    latent, probe = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    quantized = module(latent)
    (quantized.latent * probe).sum().backward()
    found = latent.grad
    latent.grad = None

    inner = module.project_in(latent)
    inner = module.layer_norm(inner) if module.layer_norm else inner
    codes = module.unit.decode(quantized.tokens, (5,)).detach()
    expected = module.project_out(inner + (codes - inner).detach())
    torch.testing.assert_close(quantized.latent, expected)
    (expected * probe).sum().backward()
    torch.testing.assert_close(found, latent.grad)
    assert (module.project_in.bias is not None) == bias


def test_a_cosine_projection_gives_cosines() -> None:
    module = ProjectedOptions(dim=7, quantizer=FSQ, cosine=2.0).build()
    seen: list[Tensor] = []
    module.unit.register_forward_pre_hook(lambda unit, inputs: seen.append(inputs[0]))
    latent = torch.randn(2, 5, 7)
    module(latent)
    expected = 2 * F.cosine_similarity(latent[..., None, :], module.project_in.weight, dim=-1)
    torch.testing.assert_close(seen[0], expected)
    assert module.project_in.bias is None
    assert module.project_out.bias is not None


def test_a_rotation_keeps_lengths_and_is_undone() -> None:
    torch.manual_seed(0)
    module = RotatedOptions(quantizer=VectorQuantizerOptions(dim=6, codebook_size=50, initialise="normal")).build()
    torch.testing.assert_close(module.rotation @ module.rotation.T, torch.eye(6))
    latent = torch.randn(2, 5, 6, requires_grad=True)
    quantized = module(latent)
    codes = module.unit.codebook
    expected = torch.cdist(latent.detach() @ module.rotation, codes).argmin(-1)
    assert torch.equal(quantized.tokens[..., 0], expected)
    torch.testing.assert_close(quantized.latent, codes[expected] @ module.rotation.T)
    probe = torch.randn(2, 5, 6)
    (quantized.latent * probe).sum().backward()
    torch.testing.assert_close(latent.grad, probe)
    assert not list(module.unit.named_buffers())


def test_a_product_is_its_units_side_by_side() -> None:
    torch.manual_seed(0)
    module = ProductOptions(quantizers=(VQ, LFQ, FSQ)).build().train()
    latent = torch.randn(2, 4, 6, module.dim)
    quantized = module(latent)
    parts = [unit(group) for unit, group in zip(module.units, latent.split([3, 5, 3], -1), strict=True)]
    assert torch.equal(quantized.latent, torch.cat([part.latent for part in parts], -1))
    assert torch.equal(quantized.tokens, torch.cat([part.tokens for part in parts], -1))
    assert module.vocab == (16, 4, 8, 60)
    assert str(module.layout((4, 6))) == "grid 4x6, 4 streams of 16 and 4 and 8 and 60 codes"
    assert torch.equal(quantized.losses["codebook"], parts[0].losses["codebook"] / 3)
    commitment = (parts[0].losses["commitment"] + parts[1].losses["commitment"]) / 3
    torch.testing.assert_close(quantized.losses["commitment"], commitment)


def test_a_shared_unit_sees_the_groups_as_one_batch() -> None:
    torch.manual_seed(0)
    options = VectorQuantizerOptions(dim=3, codebook_size=16, update="ema", initialise="normal", ema_decay=0.5)
    module = ProductOptions(quantizers=(options,), branches=4, shared=True).build().train()
    alone = options.build().train()
    alone.load_state_dict(module.units[0].state_dict())
    latent = torch.randn(2, 5, 12)
    quantized = module(latent)
    expected = alone(latent.view(2, 5, 4, 3).flatten(1, 2))
    assert torch.equal(quantized.tokens.flatten(), expected.tokens.flatten())
    assert torch.equal(quantized.latent.flatten(), expected.latent.flatten())
    torch.testing.assert_close(module.units[0].codebook, alone.codebook)
    assert len(module.units) == 1
    assert module.vocab == (16,) * 4


@settings(deadline=None, max_examples=20)
@given(
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    space=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    seed=st.integers(0, 1000),
)
def test_decode_inverts_any_product(widths: list[int], space: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    units = [VectorQuantizerOptions(dim=width, codebook_size=7, initialise="normal") for width in widths]
    module = ProductOptions(quantizers=units, branches=2).build().eval()
    quantized = module(torch.randn(3, *space, module.dim))
    assert torch.equal(module.decode(quantized.tokens, tuple(space)), quantized.latent)


def test_factorized_sums_losses_and_keeps_branches_apart() -> None:
    torch.manual_seed(0)
    module = FactorizedOptions(quantizers=(VQ,), branches=3, disentanglement_weight=0.1).build().train()
    latent = torch.randn(2, 5, 9, requires_grad=True)
    quantized = module(latent)
    parts = [unit(group) for unit, group in zip(module.product.units, latent.split(3, -1), strict=True)]
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(quantized.losses[name], sum(part.losses[name] for part in parts))
    pairs = itertools.combinations([part.latent for part in parts], 2)
    cosines = [F.cosine_similarity(first, second, dim=-1).square().mean() for first, second in pairs]
    torch.testing.assert_close(quantized.losses["disentanglement"], 0.1 * sum(cosines) / 3)
    quantized.losses["disentanglement"].backward()
    assert latent.grad is not None
    assert bool(latent.grad.any())


def test_disentanglement_is_that_of_fqgan(parity: ModuleType, load_case: Callable[[str], dict[str, Any]]) -> None:
    case = load_case("fqgan-training-losses-disentanglement")
    latents = [tensor.movedim(1, -1) for tensor in parity.fill_case_inputs(case).values()]
    ratio = case["config"]["disentanglement_ratio"]
    found = torch.stack([ratio * disentanglement(latents[:2]), ratio * disentanglement(latents)])
    assert parity.compare(case["outputs"]["losses"], found) == []


def test_units_come_from_the_registry_with_dotted_errors() -> None:
    options = registry().options("quantizer", "product")
    with pytest.raises(ValidationError) as error:
        options.model_validate({"quantizers": [{"name": "vq", "dim": 0, "codebook_size": 4}]})
    assert error.value.errors()[0]["loc"] == ("quantizers", 0, "dim")
    nested = {"name": "residual", "quantizers": [{"name": "vq", "dim": 2, "codebook_size": 4}], "depth": 3}
    built = options.model_validate({"quantizers": [nested], "branches": 2}).build()
    assert built.vocab == (4,) * 6
    again = options.model_validate(built.options.model_dump(mode="json"))
    assert again == built.options


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"^a shared quantizer is one quantizer, got 2$"):
        ProductOptions(quantizers=(VQ, VQ), shared=True).build()
    scales = MultiScaleOptions(quantizer=VQ, scales=(1, 2), phi=0)
    with pytest.raises(UserError) as error:
        ProductOptions(quantizers=(VQ, scales)).build().layout((2, 2))
    assert str(error.value) == (
        "units side by side need tokens at the same positions, got grid 2x2, 1 stream of 16 codes "
        "and scales 1x1, 2x2, 1 stream of 16 codes"
    )
    with pytest.raises(UserError, match=r"^tokens must be int64 \(B, L, 2\), got torch.int64 \(1, 4, 1\)$"):
        ProductOptions(quantizers=(VQ,), branches=2).build().decode(torch.zeros(1, 4, 1, dtype=torch.int64), (4,))


def test_only_scales_go_from_scale_to_scale() -> None:
    module = ProductOptions(quantizers=(VQ,)).build()
    with pytest.raises(UserError, match=r"^the quantizer 'vq' does not go from scale to scale$"):
        module.codes(torch.zeros(1, 4, 1, dtype=torch.int64), 0)
    with pytest.raises(UserError, match=r"^the quantizer 'vq' does not go from scale to scale$"):
        module.advance(None, torch.zeros(1, 4, VQ.dim), 0)


def test_grouped_residuals_drop_the_same_levels() -> None:
    torch.manual_seed(0)
    stack = ResidualOptions(quantizers=(VQ,), depth=4, dropout_from=1)
    first, second = ProductOptions(quantizers=(stack,), branches=2).build().units
    drawn = [(first.kept_levels(), second.kept_levels()) for _ in range(20)]
    assert all(one == other for one, other in drawn)
    assert {one for one, _ in drawn} == {1, 2, 3, 4}
